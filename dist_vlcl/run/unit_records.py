"""Gradient and update of every unit in each step: units/*.parquet, one part per checkpoint interval.

`units/step-00000001.parquet` holds the records from step 1 to the first step of the next part.

A part is written before the checkpoint that ends it. A resume drops the records after its checkpoint, so that no step appears twice. Steps
that are replayed from the journal have no rows. `dist_vlcl.report.records.read_units` reads all parts as one table.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dist_vlcl.model.statistics import STATISTICS
from dist_vlcl.reading import warn
from dist_vlcl.run.files import make_folder, replace_file
from dist_vlcl.saved import read_unit_records

NAME = re.compile(r"step-(\d{8,})\.parquet")

# U units, S steps, F statistics


class UnitRecords:
    """The records of a run, in memory until `flush`. Rank 0 writes; on other ranks every method does nothing.

    units: (branch, layer, order, numel) of each unit, in the order of the rows. every: steps between two records, 0 for none.
    """

    def __init__(self, folder: Path | str, units: Sequence[tuple[str, int, str, int]], every: int, step: int, is_main: bool = True) -> None:
        """Open the folder at a resume after `step`: later records are deleted."""
        self.folder, self.units, self.every, self.is_main = Path(folder) / "units", units, every, is_main
        self._kept: list[tuple[int, int, Tensor, Sequence[float | None]]] = []  # the arguments of `add`; tensors stay on the device
        if is_main and self.folder.is_dir():
            _drop_after(self.folder, step)

    def is_due(self, step: int) -> bool:
        """Whether step `step`, counted from 1, is recorded; the same on every rank."""
        return self.every > 0 and (step - 1) % self.every == 0

    def add(self, step: int, task: int, statistics_UF: Tensor, sizes_U: Sequence[float | None]) -> None:
        """Keep the STATISTICS of every unit after a step, and the size of its projected gradient (None if it has none)."""
        if self.is_main:
            self._kept.append((step, task, statistics_UF, sizes_U))

    def flush(self) -> None:
        """Write the records in memory as one part. Call it before the checkpoint of the same step."""
        if self._kept:
            make_folder(self.folder)
            _write(self.folder / f"step-{self._kept[0][0]:08d}.parquet", self._table())
            self._kept = []

    def _table(self) -> Any:
        import pyarrow

        steps, tasks, statistics_SUF, sizes_SU = zip(*self._kept, strict=True)
        branches, layers, orders, numels = zip(*self.units, strict=True)
        statistics = torch.stack(statistics_SUF).flatten(0, 1).cpu().numpy()  # [S * U, F], copied to the CPU together
        repeats, count = len(self.units), len(steps)
        per_step = {"step": np.repeat(steps, repeats).astype(np.int64), "task": np.repeat(tasks, repeats).astype(np.int32)}
        per_unit = {"branch": list(branches) * count, "layer": np.tile(np.array(layers, dtype=np.int32), count)}
        per_unit |= {"order": list(orders) * count, "numel": np.tile(np.array(numels, dtype=np.int32), count)}
        values = {"projected_gradient": pyarrow.array([size for sizes_U in sizes_SU for size in sizes_U], "float")}
        return pyarrow.table({**per_step, **per_unit, **values, **{name: statistics[:, k] for k, name in enumerate(STATISTICS)}})


def _write(path: Path, table: Any) -> None:
    import pyarrow.parquet

    stream = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(table, stream, write_page_checksum=True)
    replace_file(path, stream.getvalue().to_pybytes())


def _drop_after(folder: Path, step: int) -> None:
    import pyarrow.compute

    for path in sorted(folder.iterdir(), reverse=True):  # newest first, so that an interruption leaves no gap
        match = NAME.fullmatch(path.name.removesuffix(".tmp"))
        if match is None:  # not ours
            continue
        if path.suffix == ".tmp" or int(match[1]) > step:
            path.unlink()
            continue
        try:
            table = read_unit_records(path)
        except (OSError, ValueError) as error:
            aside = path.rename(folder.parent / f"{path.name}.damaged")
            warn(f"{error}; it is now {aside}, and the run goes on without these records")
            continue
        if pyarrow.compute.max(table["step"]).as_py() <= step:
            return
        _write(path, table.filter(pyarrow.compute.field("step") <= step))
