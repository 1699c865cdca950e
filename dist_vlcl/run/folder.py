"""The folder of a run: made by rank 0, agreed on by all ranks, refused when it belongs to another configuration.

config.yaml     the configuration, resolved
env.json        one entry a start: versions, host, code, command line
metrics.jsonl   one line a step and a task             (log.py)
journal.jsonl   seeds and accepted coefficients        (log.py)
units/          every unit's gradient and update       (units.py)
checkpoints/    the newest few                         (checkpoint.py)
accuracy.json   the accuracy matrix; "complete": true once every task is done
plots/  summary.md                                     (report/)
REQUEUE         there while the run wants to be started again; exit codes do not survive a launcher
"""

import fcntl
import json
import os
import re
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, Protocol, TextIO

import yaml

from dist_vlcl.masking import masked
from dist_vlcl.run.environment import describe_environment, is_restart
from dist_vlcl.run.files import make_folder, replace_file

MAY_CHANGE = (
    *("run.*", "cluster.*", "eval.batch_size", "model.graphs"),
    *("train.check_every_steps", "train.on_disagreement", "train.max_skips"),
    *("data.root", "data.url", "data.timeout_s", "data.allow_pipe", "data.num_workers", "data.cache_gib", "data.encoding", "data.on_error"),
)
PATIENCE_S = 300  # of a start by a scheduler, while ranks on a node that it has lost sight of may still run
WANDB_MODES = ("auto", "online", "offline", "off")


@dataclass
class RunConfig:
    """What a run is called, where it lives and what it keeps."""

    name: str = "default"
    root: str = "runs"
    resume: bool = True  # continue a folder that has the same configuration
    overwrite: bool = False  # set an existing folder aside as <name>.old-N and start anew
    save_every_steps: int = 0  # 0: only at the end of a task
    keep: int = 2  # checkpoints
    record_every_steps: int = 1  # every unit's gradient and update, in units/*.parquet; 0: never
    wandb: str = "auto"  # online where the user is logged in, else offline; or online, offline, off
    wandb_project: str = "dist_vlcl"
    progress: bool = True
    plots: bool = True  # pictures of the finished run, in plots/

    def check(self) -> None:
        """Raise ValueError for a setting that cannot be."""
        if not re.fullmatch(r"[A-Za-z0-9._-]+", self.name) or self.name in (".", ".."):
            raise ValueError(f"run.name={self.name!r}: use letters, digits, '.', '_' and '-' only")
        if self.wandb not in WANDB_MODES:
            raise ValueError(f"run.wandb={self.wandb!r}: choose from {', '.join(WANDB_MODES)}")
        if self.keep < 1:
            raise ValueError(f"run.keep={self.keep}: keep at least 1 checkpoint")
        if self.record_every_steps < 0:
            raise ValueError(f"run.record_every_steps={self.record_every_steps}: give a number of steps, or 0 for no records of units")
        if self.save_every_steps < 0:
            raise ValueError(f"run.save_every_steps={self.save_every_steps}: give a number of steps, or 0 for task ends only")


class RunRefused(ValueError):
    """A run cannot use its folder; every rank raises it with the same words."""


class RunBusy(RunRefused):
    """Another process has the folder: later it may not."""


class World(Protocol):
    """What a run needs to know of the ranks."""

    rank: int
    size: int

    @property
    def is_main(self) -> bool: ...

    def share(self, value: Any) -> Any:
        """Rank 0's value, on every rank; all ranks call this."""

    def barrier(self) -> None:
        """Wait for every rank; all ranks call this."""


@dataclass
class RunFolder:
    """The folder of one run; its methods that write do so on rank 0 and do nothing elsewhere."""

    path: Path
    settings: RunConfig
    is_main: bool
    is_new: bool  # no earlier start of this run has left anything
    is_complete: bool
    message: str  # what the user should know about the folder, in one line
    failed_saves: int = 0  # in a row
    _lock: TextIO | None = field(default=None, repr=False)

    @classmethod
    def open(
        cls,
        settings: RunConfig,
        config: dict[str, Any],
        world: World,
        may_change: Sequence[str] = MAY_CHANGE,
        data: str | None = None,
        code: str | None = None,
        patience_s: float = PATIENCE_S,
    ) -> "RunFolder":
        """Make or reopen runs/<name>/ for a configuration; all ranks call this.

        `config` is the resolved configuration, nested; `may_change` are patterns of dotted keys that a resume may alter. `data`: a digest
        of the data set, which has to stay. `code`: what ran, where a change is only said. `patience_s`: how long a start by a scheduler
        waits for a process that has the folder.
        Raises ValueError for an impossible setting and RunRefused where the folder cannot be used.
        """
        settings.check()
        lock, outcome = None, None
        if world.is_main:
            lock, outcome = _prepared(settings, _plain(config), may_change, {"data": data, "code_digest": code}, patience_s)
        outcome = world.share(outcome)
        if "error" in outcome:
            raise (RunBusy if outcome["is_busy"] else RunRefused)(outcome["error"])
        return cls(**{**outcome, "path": Path(outcome["path"])}, settings=settings, is_main=world.is_main, _lock=lock)

    def is_time_to_save(self, step: int) -> bool:
        """Whether a checkpoint is due after this many steps."""
        return self.settings.save_every_steps > 0 and step % self.settings.save_every_steps == 0

    def write_accuracy(self, accuracy: dict[str, Any]) -> None:
        """Write accuracy.json of a run that goes on; a full disk is only warned of, since the checkpoint holds the same."""
        try:
            self._write_accuracy(accuracy, complete=False)
        except OSError as error:
            warnings.warn(f"{self.path}/accuracy.json: {error}", RuntimeWarning, stacklevel=2)

    def complete(self, accuracy: dict[str, Any]) -> None:
        """Write accuracy.json of a run whose every task is done."""
        self._write_accuracy(accuracy, complete=True)
        self.is_complete = True

    def request_requeue(self) -> None:
        """Leave word that the run wants to be started again."""
        if self.is_main:
            try:
                replace_file(self.path / "REQUEUE", "start this run again\n")
            except OSError as error:
                warnings.warn(f"{self.path}/REQUEUE: {error}", RuntimeWarning, stacklevel=2)

    def close(self) -> None:
        """Let another process have the folder."""
        if self._lock:
            self._lock.close()
            self._lock = None

    def _write_accuracy(self, accuracy: dict[str, Any], complete: bool) -> None:
        if self.is_main:
            replace_file(self.path / "accuracy.json", json.dumps({**accuracy, "complete": complete}, indent=1) + "\n")


def differences(was: dict[str, Any], now: dict[str, Any]) -> dict[str, str]:
    """Dotted key -> "was -> is" for every leaf in which two nested configurations differ."""
    old, new = _flat(_plain(was)), _flat(_plain(now))
    changed = [key for key in {**old, **new} if old.get(key, "(absent)") != new.get(key, "(absent)")]
    return {key: f"{old.get(key, '(absent)')} -> {new.get(key, '(absent)')}" for key in changed}


def _prepared(
    settings: RunConfig, config: dict[str, Any], may_change: Sequence[str], facts: dict[str, str | None], patience_s: float
) -> tuple[TextIO | None, dict[str, Any]]:
    try:
        return _prepare(settings, config, may_change, facts, patience_s)
    except (RunRefused, OSError, yaml.YAMLError) as error:
        # The other ranks are waiting for word, so an error is an answer too.
        told = str(error) if isinstance(error, RunRefused) else f"run folder {_path(settings)}: {error}"
        return None, {"error": told, "is_busy": isinstance(error, RunBusy)}


def _prepare(
    settings: RunConfig, config: dict[str, Any], may_change: Sequence[str], facts: dict[str, str | None], patience_s: float
) -> tuple[TextIO, dict[str, Any]]:
    path = _path(settings)
    make_folder(path)
    lock = _locked(path, patience_s if is_restart() else 0)
    notes = []
    # A requeued job has the command line of the first one, and must not set its own work aside.
    if settings.overwrite and not is_restart() and _is_used(path):
        lock, aside = _set_aside(path, lock)
        notes.append(f"the earlier run is now {aside}")
    is_new = not _is_used(path)
    if not is_new:
        notes += _check_same_run(path, settings, config, may_change)
        notes += _check_same_facts(path, facts)
    replace_file(path / "config.yaml", yaml.safe_dump(config, sort_keys=False, allow_unicode=True))
    replace_file(path / "env.json", json.dumps([*_starts(path), {**describe_environment(), **facts}], indent=1) + "\n")
    (path / "REQUEUE").unlink(missing_ok=True)
    for name in ("checkpoints", "plots"):
        make_folder(path / name)
    accuracy = _read_accuracy(path)
    is_complete = accuracy.get("complete") is True
    message = _message(path, is_new, is_complete, notes)
    return lock, {"path": str(path), "is_new": is_new, "is_complete": is_complete, "message": message}


def _path(settings: RunConfig) -> Path:
    return Path(settings.root) / settings.name


def _is_used(path: Path) -> bool:
    # Other files may be there before the run is, such as the scheduler's own output.
    return any((path / name).exists() for name in ("config.yaml", "metrics.jsonl", "checkpoints"))


def _locked(path: Path, patience_s: float = 0) -> TextIO:
    # lockf, not flock: it ends with the process, is not inherited by its workers, and lets one process open twice.
    file = open(path / ".lock", "a")  # noqa: SIM115, it stays open as long as the run
    deadline = time.monotonic() + patience_s
    while True:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            if time.monotonic() < deadline:
                time.sleep(0.5)
                continue
            file.close()
            raise RunBusy(f"{path} is in use by another process; wait for it, or choose another run.name") from None
        except OSError as error:  # a file system without locks
            words = f"{path}: no lock here ({error}), so a second job would not be noticed; let no other job have this run.name"
            warnings.warn(words, RuntimeWarning, stacklevel=2)
        return file


def _set_aside(path: Path, lock: TextIO) -> tuple[TextIO, Path]:
    number = 1
    while (aside := path.with_name(f"{path.name}.old-{number}")).exists():
        number += 1
    os.replace(path, aside)
    lock.close()
    make_folder(path)
    return _locked(path), aside


def _check_same_run(path: Path, settings: RunConfig, config: dict[str, Any], may_change: Sequence[str]) -> list[str]:
    """The changes that a resume takes over, one text each; raises RunRefused for any other."""
    if not settings.resume and not is_restart():
        raise RunRefused(f"{path} exists: run.resume=true continues it, run.overwrite=true starts anew, or choose another run.name")
    if not (path / "config.yaml").exists():
        raise RunRefused(f"{path} holds a run without its config.yaml: run.overwrite=true starts anew, or choose another run.name")
    changes = differences(yaml.safe_load((path / "config.yaml").read_text()) or {}, config)
    allowed = {key: change for key, change in changes.items() if any(fnmatch(key, pattern) for pattern in may_change)}
    refused = [f"  {key}: {change}" for key, change in changes.items() if key not in allowed]
    if refused:
        advice = "run.overwrite=true starts anew, or choose another run.name"
        raise RunRefused(f"{path} was started with another configuration (was -> is):\n" + "\n".join(refused) + f"\n{advice}")
    return [f"{key}: {change}" for key, change in allowed.items() if not key.startswith("run.")]


def _check_same_facts(path: Path, facts: dict[str, str | None]) -> list[str]:
    """Words about what changed since the last start and may; raises RunRefused for another data set."""
    last: dict[str, Any] = next(reversed(_starts(path)), {})
    if last.get("data") and facts["data"] and last["data"] != facts["data"]:
        raise RunRefused(
            f"{path} was started on other data (digest was {last['data'][:16]}, is {facts['data'][:16]}): the shards have been built again "
            "from other images or names; run.overwrite=true starts anew, or choose another run.name"
        )
    if last.get("code_digest") and facts["code_digest"] and last["code_digest"] != facts["code_digest"]:
        return [f"the code is not that of the last start ({last['code_digest']} -> {facts['code_digest']})"]
    return []


def _starts(path: Path) -> list[dict[str, Any]]:
    try:
        return list(json.loads((path / "env.json").read_text()))
    except (OSError, ValueError, TypeError):
        return []


def _read_accuracy(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads((path / "accuracy.json").read_text()))
    except FileNotFoundError:
        return {}
    except ValueError:
        raise RunRefused(f"{path / 'accuracy.json'} cannot be read; remove it to have it written again") from None


def _message(path: Path, is_new: bool, is_complete: bool, notes: list[str]) -> str:
    if is_complete:
        begin = f"{path} is complete: see summary.md, accuracy.json and plots/ in it; run.overwrite=true starts anew"
    else:
        begin = f"{'starting' if is_new else 'continuing'} {path}"
    return "; ".join([begin, *notes])


def _flat(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    leaves: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, dict) and value:
            leaves |= _flat(value, f"{prefix}{key}.")
        else:
            leaves[f"{prefix}{key}"] = value
    return leaves


def _plain(value: Any) -> Any:
    """A value as YAML gives it back, so that a saved configuration equals the one it was saved from; without secrets."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, str):
        return masked(str(value))
    # The exact types: YAML's safe writer refuses subclasses, such as an Enum of strings.
    return value if type(value) in (type(None), bool, int, float, str) else str(value)
