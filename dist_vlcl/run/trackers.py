"""Experiment trackers as listeners: wandb, TensorBoard and MLflow, through Accelerate. They may be missing, and never stop a run."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dist_vlcl.options import flatten
from dist_vlcl.reading import or_warn, read_json, warn
from dist_vlcl.run.files import replace_file
from dist_vlcl.run.folder import TRACKERS, RunConfig


class Trackers:
    """Repeats records to the chosen trackers. If one fails, it is dropped after one warning, and the run goes on.

    trackers.json in the run folder keeps their ids. A resume continues the same wandb and MLflow run.
    """

    def __init__(self, folder: Path, settings: RunConfig, config: dict[str, Any]) -> None:
        self._trackers: dict[str, Any] = {}
        ids = or_warn(lambda: read_json(folder / "trackers.json", dict.fromkeys(TRACKERS, (None, str)), {}), {})
        for name in settings.trackers:
            with self._dropped_if_it_fails(name):
                self._trackers[name], id = _started(name, folder, settings, ids.get(name))
                if name not in ids:
                    self._trackers[name].store_init_configuration({key: str(value) for key, value in flatten(config).items()})
                    replace_file(folder / "trackers.json", json.dumps(ids := {**ids, name: id}) + "\n")

    def log(self, record: dict[str, Any]) -> None:
        """Send the numbers of a record; nested keys are joined by '/'. Lists and texts are left out."""
        numbers = numbers_of(record)
        for name, tracker in list(self._trackers.items()):
            with self._dropped_if_it_fails(name):
                if name == "wandb":  # its own step counter cannot go back, as a resume from an earlier checkpoint does
                    tracker.log({"global_step": record["step"], **numbers})
                else:
                    tracker.log(numbers, step=record["step"])

    def close(self) -> None:
        """Finish the trackers. A second call does nothing."""
        for name, tracker in list(self._trackers.items()):
            with self._dropped_if_it_fails(name):
                tracker.finish()
        self._trackers.clear()

    @contextmanager
    def _dropped_if_it_fails(self, name: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # whatever it is, training is more important
            self._trackers.pop(name, None)
            # accelerate names another package than the one that is missing
            why = f"pip install {name}" if isinstance(error, ImportError) else f"{type(error).__name__}: {error}"
            warn(f"run.trackers: {name} is off for this run: {why}")


def numbers_of(record: dict[str, Any]) -> dict[str, float]:
    """Return the numbers of a nested record; joined keys begin with its kind: {"kind": "task", "seen": 1} gives {"task/seen": 1}."""
    own = {key: value for key, value in record.items() if key not in ("kind", "step", "time")}
    return {name.replace(".", "/"): value for name, value in flatten({record["kind"]: own}).items() if isinstance(value, int | float)}


def _started(name: str, folder: Path, settings: RunConfig, id: str | None) -> tuple[Any, str]:
    """Return a tracker and the id that continues its run. It imports late: a tracker is optional, and slow to import."""
    from accelerate import tracking

    tracker: Any
    if name == "wandb":
        import wandb

        # wandb itself waits 90 s for a network, which is long on a compute node that has none, and reads WANDB_MODE if it is given no mode.
        own = wandb.Settings(console="off", silent=True, init_timeout=30)
        mode = None if os.environ.get("WANDB_MODE") or wandb.login(prompt=False) else "offline"
        options: dict[str, Any] = {"id": id, "resume": "allow", "settings": own, "mode": mode}
        tracker = tracking.WandBTracker(settings.project, dir=str(folder), name=settings.name, **options)
    elif name == "mlflow":
        tracker = tracking.MLflowTracker(settings.project, run_id=id, run_name=settings.name)
    else:
        tracker = tracking.TensorBoardTracker(name, logging_dir=str(folder))
    tracker.start()
    if name == "wandb":
        tracker.tracker.define_metric("global_step")
        tracker.tracker.define_metric("*", step_metric="global_step")
        return tracker, tracker.tracker.id
    return tracker, tracker.tracker.info.run_id if name == "mlflow" else name  # TensorBoard has no id, but a folder of its name
