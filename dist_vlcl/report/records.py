"""Reading back what a run has logged, whole or not."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dist_vlcl.model.statistics import FIGURES

if TYPE_CHECKING:  # a run without pictures does without it
    import pyarrow


@dataclass(frozen=True)
class Records:
    """The lines of a metrics.jsonl, by kind, in the order of the run."""

    steps: list[dict[str, Any]]
    tasks: list[dict[str, Any]]

    @property
    def matrix(self) -> list[list[float | None]]:
        """Row after-task i, column task j: a fraction, or None where it was not measured."""
        return [list(record.get("per_task") or []) for record in self.tasks]

    @property
    def seen(self) -> list[float | None]:
        """A_t after every task."""
        return [record.get("seen") for record in self.tasks]

    @property
    def zero_shot(self) -> list[float | None]:
        """The accuracy without training, over the classes that A_t is over."""
        return [record.get("zero_shot") for record in self.tasks]


def read_records(folder: Path | str) -> Records:
    """The records of a run folder; lines that are not whole are passed over."""
    path = Path(folder) / "metrics.jsonl"
    lines = path.read_text(errors="replace").splitlines() if path.exists() else []
    records = [record for record in map(_parsed, lines) if isinstance(record, dict)]
    # Each kind is indexed by the field of its name.
    return Records(*([record for record in records if record.get("kind") == kind and kind in record] for kind in ("step", "task")))


def read_units(folder: Path | str) -> "pyarrow.Table":
    """Return the records of every unit of a run folder, in the order of the steps; a table without rows where there are none.

    Columns: step (int64, from 1), task (int32, from 0), branch, layer (int32, from 1), order (first, zeroth, frozen), and as float32
    gradient_norm, gradient_mean, gradient_variance (of the first-order gradient, or of the zeroth-order estimate before its sign is
    taken; NaN for a frozen unit), update_norm (of what the step changed), parameter_norm (after the step). A skipped step has no rows.
    """
    import pyarrow
    import pyarrow.parquet

    types = {"step": "int64", "task": "int32", "branch": "string", "layer": "int32", "order": "string", **dict.fromkeys(FIGURES, "float")}
    schema = pyarrow.schema([(name, pyarrow.type_for_alias(alias)) for name, alias in types.items()])
    parts = [pyarrow.parquet.read_table(path, schema=schema) for path in sorted(Path(folder, "units").glob("step-*.parquet"))]
    return pyarrow.concat_tables([schema.empty_table(), *parts])


def _parsed(line: str) -> Any:
    try:
        return json.loads(line)
    except ValueError:
        return None
