"""Per step and unit, what the step did to it: units/*.parquet, one part a checkpoint interval.

units/step-00000001.parquet     the records from step 1 to the next part's first step

A part is written whole before the checkpoint that ends it. A resume drops what lies beyond its checkpoint, so that no step is there
twice; steps that a run of zeroth order alone takes from its journal have no rows. `dist_vlcl.report.records.read_units` reads the parts as
one table.
"""

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dist_vlcl.model.statistics import STATISTICS
from dist_vlcl.run.files import make_folder, sync_folder, write_durably

if TYPE_CHECKING:
    from torch import Tensor

NAME = re.compile(r"step-(\d{8,})\.parquet")


class UnitRecords:
    """The records of a run, kept in memory until `flush`; rank 0 writes, the others do nothing.

    units: (branch, layer, order, numel) in the order of the figures' rows. every: steps between two records, 0 for none.
    """

    def __init__(self, folder: Path | str, units: Sequence[tuple[str, int, str, int]], every: int, step: int, is_main: bool = True) -> None:
        """Open the folder where a resume at `step` left it: later records are dropped."""
        self.folder, self.units, self.every, self.is_main = Path(folder) / "units", units, every, is_main
        self._steps: list[tuple[int, int]] = []
        self._figures: list[Tensor] = []  # on the device: fetched together
        self._sizes: list[float | None] = []  # a number a unit and step
        if is_main and self.folder.is_dir():
            _drop_after(self.folder, step)

    def is_due(self, step: int) -> bool:
        """Whether the step of this number, counted from 1, is to be recorded: the same on every rank."""
        return self.every > 0 and (step - 1) % self.every == 0

    def add(self, step: int, task: int, figures_UF: "Tensor", sizes_U: Sequence[float | None]) -> None:
        """Keep the STATISTICS of every unit after a step, and the size of its projected gradient, None where it has none."""
        if self.is_main:
            self._steps.append((step, task))
            self._figures.append(figures_UF)
            self._sizes += sizes_U

    def flush(self) -> None:
        """Write what was kept as one part; call it before the checkpoint of the same step."""
        if not self._steps:
            return
        make_folder(self.folder)
        _write(self.folder / f"step-{self._steps[0][0]:08d}.parquet", self._table())
        self._steps, self._figures, self._sizes = [], [], []

    def _table(self) -> Any:
        import pyarrow
        import torch

        steps, tasks = np.array(self._steps).T
        branches, layers, orders, numels = zip(*self.units, strict=True)
        figures = torch.stack(self._figures).flatten(0, 1).cpu().numpy()
        repeats, count = len(self.units), len(steps)
        columns = {
            "step": np.repeat(steps, repeats).astype(np.int64),
            "task": np.repeat(tasks, repeats).astype(np.int32),
            "branch": list(branches) * count,
            "layer": np.tile(np.array(layers, dtype=np.int32), count),
            "order": list(orders) * count,
            "numel": np.tile(np.array(numels, dtype=np.int32), count),
            "projected_gradient": pyarrow.array(self._sizes, "float"),
        }
        return pyarrow.table(columns | {name: figures[:, k] for k, name in enumerate(STATISTICS)})


def _write(path: Path, table: Any) -> None:
    import pyarrow.parquet

    stream = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(table, stream)
    aside = path.with_suffix(".tmp")
    write_durably(aside, stream.getvalue().to_pybytes())
    os.replace(aside, path)
    sync_folder(path.parent)


def _drop_after(folder: Path, step: int) -> None:
    import pyarrow.compute
    import pyarrow.parquet

    for path in sorted(folder.iterdir(), reverse=True):  # the newest first: an interruption leaves no gap
        match = NAME.fullmatch(path.name)
        if match is None or int(match[1]) > step:
            path.unlink()
            continue
        table = pyarrow.parquet.read_table(path)
        if pyarrow.compute.max(table["step"]).as_py() <= step:
            return
        _write(path, table.filter(pyarrow.compute.field("step") <= step))
