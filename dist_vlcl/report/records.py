"""Reading back what a run has logged, whole or not."""

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from dist_vlcl.model.statistics import STATISTICS

if TYPE_CHECKING:  # a run without pictures does without them
    import pandas as pd
    import pyarrow


class NoRun(ValueError):
    """A folder is not that of a run, or cannot be read; the message says what is wrong with it."""


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
    taken; NaN for a frozen unit), update_norm, update_mean, update_variance (of what the step changed), parameter_norm (after it), and
    projected_gradient (the size of s, the mean over probes; null for a unit that is not of zeroth order). numel (int32) is how many
    parameters the unit has. A skipped step has no rows.
    """
    import pyarrow
    import pyarrow.parquet

    types = {
        "step": "int64",
        "task": "int32",
        "branch": "string",
        "layer": "int32",
        "order": "string",
        "numel": "int32",
        "projected_gradient": "float",
        **dict.fromkeys(STATISTICS, "float"),
    }
    schema = pyarrow.schema([(name, pyarrow.type_for_alias(alias)) for name, alias in types.items()])
    parts = [pyarrow.parquet.read_table(path, schema=schema) for path in sorted(Path(folder, "units").glob("step-*.parquet"))]
    return pyarrow.concat_tables([schema.empty_table(), *parts])


@dataclass(frozen=True)
class Run:
    """A run folder, read back."""

    path: Path
    config: dict[str, Any]
    accuracy: dict[str, Any]  # accuracy.json; empty before the first task has ended

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def seed(self) -> int:
        return int(self.config["seed"])

    @property
    def is_complete(self) -> bool:
        """Whether every task is done."""
        return self.accuracy.get("complete") is True

    @property
    def num_tasks_done(self) -> int:
        return len(self.accuracy.get("rows", ()))

    @property
    def zero_shot(self) -> list[float]:
        """A_t of the model before any training, for every task t, as fractions; empty where it was not measured."""
        by_task = self.accuracy.get("zero_shot") or {}
        return [by_task[task] for task in sorted(by_task, key=int)]

    @cached_property
    def records(self) -> Records:
        return read_records(self.path)

    @property
    def peak_gib(self) -> float | None:
        """The most memory that a step has held on its accelerator; None where no step says."""
        return max((record["peak_gib"] for record in self.records.steps if record.get("peak_gib") is not None), default=None)

    @property
    def accelerators(self) -> list[str]:
        """The accelerators that the newest start of the run had."""
        try:
            return list(json.loads((self.path / "env.json").read_text())[-1].get("accelerators", ()))
        except (OSError, ValueError, LookupError):
            return []

    def losses(self) -> "pd.DataFrame":
        """The base loss of every step: step, task, loss."""
        import pandas as pd

        columns = ["step", "task", "loss"]
        return pd.DataFrame([[record.get(column) for column in columns] for record in self.records.steps], columns=columns).dropna()

    def units(self) -> "pd.DataFrame":
        """What was recorded of every unit at every step, as `read_units` has it."""
        return read_units(self.path).to_pandas()


def read_run(folder: Path | str) -> Run:
    """The run of a folder; raises NoRun where there is none."""
    folder = Path(folder)
    try:
        config = yaml.safe_load((folder / "config.yaml").read_text())
        accuracy = json.loads((folder / "accuracy.json").read_text()) if (folder / "accuracy.json").exists() else {}
    except FileNotFoundError:
        raise NoRun("no run folder: config.yaml is missing") from None
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise NoRun(f"cannot be read: {str(error).splitlines()[0]}") from None
    if not isinstance(config, dict) or not isinstance(accuracy, dict):
        raise NoRun("cannot be read: config.yaml or accuracy.json holds no mapping")
    return Run(folder, config, accuracy)


def _parsed(line: str) -> Any:
    try:
        return json.loads(line)
    except ValueError:
        return None
