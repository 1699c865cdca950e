"""Experiment trackers as listeners: wandb, TensorBoard and MLflow, through Accelerate. They may be missing, and never stop a run."""

import json
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dist_vlcl.run.files import replace_file
from dist_vlcl.run.folder import RunConfig, flatten

IDS = "trackers.json"


class Trackers:
    """Repeats records to the chosen trackers. If one fails, it is dropped after one warning, and the run goes on.

    trackers.json in the run folder keeps the ids, so that a resume continues the same wandb and MLflow run.
    """

    def __init__(self, folder: Path, settings: RunConfig, config: dict[str, Any]) -> None:
        self.urls: list[str] = []
        self._trackers: dict[str, Any] = {}
        self._ids = json.loads((folder / IDS).read_text()) if (folder / IDS).exists() else {}
        for name in settings.trackers:
            with self._dropped_if_it_fails(name):
                self._start(name, folder, settings, config)

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

    def _start(self, name: str, folder: Path, settings: RunConfig, config: dict[str, Any]) -> None:
        known = self._ids.get(name)
        if name == "wandb":
            tracker = _wandb(settings, dir=str(folder), name=settings.name, id=known, resume="allow")
            tracker.tracker.define_metric("global_step")
            tracker.tracker.define_metric("*", step_metric="global_step")
            self._ids[name] = tracker.tracker.id
            self.urls += [] if tracker.tracker.offline else [tracker.tracker.url]
        elif name == "mlflow":
            tracker = _mlflow(settings, known)
            self._ids[name] = tracker.tracker.info.run_id
        else:
            tracker = _tensorboard(folder)
        if not known:
            tracker.store_init_configuration({key: str(value) for key, value in flatten(config).items()})
        self._trackers[name] = tracker
        replace_file(folder / IDS, json.dumps(self._ids) + "\n")

    @contextmanager
    def _dropped_if_it_fails(self, name: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # whatever it is, training is more important
            self._trackers.pop(name, None)
            warnings.warn(f"run.trackers: {name} is off for this run: {type(error).__name__}: {error}", RuntimeWarning, stacklevel=3)


def numbers_of(record: dict[str, Any]) -> dict[str, float]:
    """Return the numbers of a nested record; joined keys begin with its kind: {"kind": "task", "seen": 1} gives {"task/seen": 1}."""
    own = {key: value for key, value in record.items() if key not in ("kind", "step", "time")}
    return {name: value for name, value in flatten({record["kind"]: own}, "/").items() if isinstance(value, int | float)}


def _wandb(settings: RunConfig, **options: Any) -> Any:
    import wandb  # here, since it takes a second and is optional
    from accelerate.tracking import WandBTracker

    # wandb itself waits 90 s, which is long on a compute node without a network.
    options["settings"] = wandb.Settings(console="off", silent=True, init_timeout=30)
    if os.environ.get("WANDB_MODE"):  # wandb reads it
        tracker = WandBTracker(settings.project, **options)
        tracker.start()
        return tracker
    try:
        mode = "online" if wandb.login(prompt=False) else "offline"
        tracker = WandBTracker(settings.project, mode=mode, **options)
        tracker.start()
    except Exception as error:
        warnings.warn(f"wandb continues offline: {type(error).__name__}: {error}", RuntimeWarning, stacklevel=2)
        tracker = WandBTracker(settings.project, mode="offline", **options)
        tracker.start()
    return tracker


def _mlflow(settings: RunConfig, known: str | None) -> Any:
    from accelerate.tracking import MLflowTracker

    tracker = MLflowTracker(settings.project, run_id=known, run_name=settings.name)
    tracker.start()
    return tracker


def _tensorboard(folder: Path) -> Any:
    from accelerate.tracking import TensorBoardTracker

    tracker = TensorBoardTracker("tensorboard", logging_dir=str(folder))
    tracker.start()
    return tracker
