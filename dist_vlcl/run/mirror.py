"""Weights & Biases as a listener: it may be absent, logged out or offline, and never stops a run."""

import os
import uuid
import warnings
from pathlib import Path
from typing import Any

from dist_vlcl.run.files import replace_file


class WandbMirror:
    """Repeats records to wandb until something goes wrong, which it says once.

    `id` names the wandb run; given again on a resume, both parts become one run there. Without one, the folder remembers it.
    """

    def __init__(self, folder: Path, mode: str, project: str, name: str, config: dict[str, Any], id: str | None = None) -> None:
        """Start the mirror; `mode` is auto, online, offline or off. It writes below folder/wandb/."""
        self.id = id or _id_of(folder)
        self._run: Any = None
        if mode == "off":
            return
        arguments = {"dir": str(folder), "project": project, "name": name, "config": config, "id": self.id, "resume": "allow"}
        try:
            import wandb  # here, since it takes a second and is optional

            self._run = _started(wandb, mode, arguments)
            self._run.define_metric("global_step")
            self._run.define_metric("*", step_metric="global_step")  # wandb's own counter starts anew on a resume
        except Exception as error:
            self._give_up(error)

    @property
    def is_on(self) -> bool:
        """Whether records still reach wandb."""
        return self._run is not None

    @property
    def url(self) -> str | None:
        """Where the run can be watched; None offline."""
        return None if self._run is None or self._run.offline else self._run.url

    def log(self, record: dict[str, Any]) -> None:
        """Repeat a record; nested keys are joined by '/', lists and texts are left out."""
        if self._run is None:
            return
        try:
            self._run.log({"global_step": record["step"], **flat_numbers(record)})
        except Exception as error:
            self._give_up(error)

    def close(self) -> None:
        """Finish the wandb run; harmless when repeated."""
        run, self._run = self._run, None
        if run is None:
            return
        try:
            run.finish()
        except Exception as error:
            self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        self._run = None
        warnings.warn(f"wandb is off for this run: {type(error).__name__}: {error}", RuntimeWarning, stacklevel=3)


def _id_of(folder: Path) -> str:
    """The id that an earlier start in this folder has drawn, which may have died before its first checkpoint; else a new one."""
    file = folder / ".wandb_id"
    if not file.exists():
        replace_file(file, uuid.uuid4().hex[:12])
    return file.read_text()


def flat_numbers(record: dict[str, Any], prefix: str = "") -> dict[str, float]:
    """The numbers of a nested record under joined keys, which carry its kind: {"kind": "task", "seen": 1} -> {"task/seen": 1}."""
    prefix = f"{record['kind']}/" if "kind" in record else prefix
    numbers: dict[str, float] = {}
    for key, value in record.items():
        if key in ("step", "time"):
            continue  # wandb has them as global_step and its own clock
        if isinstance(value, dict):
            numbers |= flat_numbers(value, f"{prefix}{key}/")
        elif isinstance(value, (int, float)):
            numbers[f"{prefix}{key}"] = value
    return numbers


def _started(wandb: Any, mode: str, arguments: dict[str, Any]) -> Any:
    # init_timeout: wandb's own 90 s are long to stand still on a compute node without a way out.
    arguments = {**arguments, "settings": wandb.Settings(console="off", silent=True, init_timeout=30)}
    if mode == "auto":
        mode = os.environ.get("WANDB_MODE") or "auto"  # which is how wandb itself is told
    if mode != "auto":
        return wandb.init(mode=mode, **arguments)
    try:
        if wandb.login(prompt=False):
            return wandb.init(mode="online", **arguments)
    except Exception as error:
        warnings.warn(f"wandb goes on offline: {type(error).__name__}: {error}", RuntimeWarning, stacklevel=3)
    return wandb.init(mode="offline", **arguments)
