"""The folder of a run: created by rank 0, and refused if it belongs to another configuration or another data set.

`config.yaml`          The configuration, resolved.
`classes.json`         The class names of each task.
`env.json`             One entry per start: the run's id, versions, host, code, command line.
`metrics.jsonl`        One line per step and per task (log.py).
`journal.jsonl`        The seed and accepted coefficients of each step (log.py).
`units/`               Gradient and update of every unit (unit_records.py).
`checkpoints/`         The newest ones (checkpoint.py).
`accuracy.json`        The accuracy matrix; "complete": true when every task is done.
`trackers.json`        The ids of the run in wandb and MLflow (trackers.py).
`plots/`               Figures (report/).
`REQUEUE`              Exists while the run waits to be started again.
"""

import errno
import fcntl
import json
import os
import re
import time
import uuid
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TextIO, cast

import yaml

from dist_vlcl.dist.world import World
from dist_vlcl.masking import explained, masked, masked_values
from dist_vlcl.options import flatten, matches, option
from dist_vlcl.reading import or_warn, read_file, seal, warn
from dist_vlcl.run.checkpoint import load_newest
from dist_vlcl.run.environment import ELASTIC, describe_environment, is_restart
from dist_vlcl.run.files import make_folder, replace_file
from dist_vlcl.saved import MAY_CHANGE, digest_of, read_accuracy, read_config, read_starts

LOCK_WAIT_S = 300  # after a restart by a scheduler: ranks on a node that it has lost contact with may still run
WAITING = ".waiting"  # a file that asks the process that holds the folder to save and stop, if it is of the elastic start that it names
PASSING = (errno.ESTALE, errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.ETIMEDOUT, errno.ENOTCONN)  # after these a new start may succeed
TRACKERS = ("wandb", "tensorboard", "mlflow")
ADVICE = "choose another run.name, or move this folder away to start anew"
STARTED = {"data": "on other data", "weights": "with other weights of the model"}  # what must be the same in every start


@dataclass
class RunConfig:
    """The name of a run, its folder, and what it saves and reports."""

    name: str = option("default", "Name of the run and its folder; auto derives it from the configuration, auto-TEXT adds a text to that.")
    root: str = option("runs", "Folder that holds the folders of all runs.")
    save_every_steps: int = option(0, "Steps between two checkpoints within a task; 0 saves at the end of each task only.", min=0)
    keep: int = option(2, "Number of checkpoints that are kept.", min=1)
    record_every_steps: int = option(1, "Steps between two records of every unit's gradient and update in units/; 0 writes none.", min=0)
    trackers: list[str] = option(["wandb"], "Services for all metrics; [] for none. Without a login wandb is offline.", choices=TRACKERS)
    project: str = option("dist_vlcl", "Name of the project in the trackers.")
    progress: bool = option(True, "Show a progress bar on a terminal, or a line every ten seconds in a log file.")
    plots: bool = option(True, "Draw plots of the finished run in plots/.")

    def check(self) -> None:
        """Raise ValueError if the name is not a plain folder name."""
        if not re.fullmatch(r"[A-Za-z0-9._-]+", self.name) or self.name in (".", ".."):
            raise ValueError(f"run.name={self.name!r}: use letters, digits, '.', '_' and '-' only")

    @property
    def folder(self) -> Path:
        return Path(self.root) / self.name


class RunRefused(ValueError):
    """A run cannot use its folder. Every rank raises it with the same message."""


class RunBusy(RunRefused):
    """Another process uses the folder; later the folder may be free."""


@dataclass
class RunFolder:
    """The folder of one run. Methods that write do so on rank 0 and do nothing on other ranks."""

    path: Path
    is_main: bool
    is_complete: bool
    message: str  # for the user, in one line
    identity: dict[str, str]  # of the run, its configuration and its data; every checkpoint has it
    _lock: TextIO | None = field(default=None, repr=False)

    @classmethod
    def open(cls, settings: RunConfig, config: dict[str, Any], world: World, **digests: str) -> "RunFolder":
        """Create or reopen the folder of a run. All ranks call this.

        `config`: the resolved configuration, nested. `digests`: of `data` and frozen `weights`, which must not change between starts, and
        `code_digest`, whose change is reported. Raises RunRefused on all ranks if the folder cannot be used.
        """
        # The other ranks wait for rank 0 in a collective.
        wait_s = LOCK_WAIT_S if world.size == 1 else min(LOCK_WAIT_S, world.collectives.timeout_s / 2)
        lock: TextIO | None = None

        def prepare() -> dict[str, Any]:
            nonlocal lock
            try:
                lock, prepared = _prepare(settings, as_saved(config), digests, wait_s)
            except OSError as error:
                raise (OSError if error.errno in PASSING else RunRefused)(masked(f"run folder {settings.folder}: {error}")) from error
            return prepared

        return cls(**world.on_main(prepare, "the run folder"), is_main=world.is_main, _lock=lock)

    def write_accuracy(self, accuracy: dict[str, Any], complete: bool = False) -> None:
        """Write accuracy.json."""
        if self.is_main:
            self.check_owner()
            owner = {key: self.identity[key] for key in ("run", "config")}
            replace_file(self.path / "accuracy.json", json.dumps(seal({**owner, **accuracy, "complete": complete}), indent=1) + "\n")

    def request_requeue(self) -> None:
        """Leave the marker of a run that waits to be started again."""
        if self.is_main:
            self.check_owner()
            replace_file(self.path / "REQUEUE", "start this run again\n")

    @property
    def another_start_waits(self) -> bool:
        """Whether ranks of the same elastic start wait for this folder, on machines that had lost contact with these."""
        own = os.environ.get(ELASTIC) if self.is_main else None
        return bool(own) and (self.path / WAITING).exists() and or_warn(lambda: read_file(self.path / WAITING, 1000).decode(), "") == own

    def check_owner(self) -> None:
        """Raise RunRefused if the folder is no longer the one that this process has opened: moved, removed, or another run's."""
        if self._lock:
            lock = self.path / ".lock"
            if not lock.exists() or not os.path.samestat(lock.stat(), os.fstat(self._lock.fileno())):
                raise RunRefused(f"{self.path} was moved or replaced while this run used it: the run stops and writes nothing there")

    def close(self) -> None:
        """Let another process use the folder."""
        if self._lock:
            self._lock.close()
            self._lock = None


def as_saved(config: dict[str, Any]) -> dict[str, Any]:
    """Return a configuration as config.yaml gives it back: lists for tuples, texts for enums, without secrets."""
    return cast(dict[str, Any], json.loads(json.dumps(masked_values(config), default=str)))


def differences(was: dict[str, Any], now: dict[str, Any]) -> dict[str, str]:
    """Return "was -> is" by dotted key for every leaf in which two nested configurations differ."""
    old, new = flatten(was), flatten(now)
    pairs = {key: (old.get(key, "(absent)"), new.get(key, "(absent)")) for key in {**old, **new}}
    return {key: f"{before} -> {after}" for key, (before, after) in pairs.items() if before != after}


def _prepare(settings: RunConfig, config: dict[str, Any], facts: dict[str, str], wait_s: float) -> tuple[TextIO, dict[str, Any]]:
    path = settings.folder
    make_folder(path)
    lock = _lock(path, wait_s if is_restart() else 0)
    # Other files may be there before the run is, such as the scheduler's own output.
    is_new = not any((path / name).exists() for name in ("config.yaml", "metrics.jsonl", "checkpoints"))
    starts = [] if is_new else read_starts(path)
    notes = [] if is_new else [*_check_configuration(path, config), *_check_facts(path, facts, starts)]
    run = _id_of(path, starts) or uuid.uuid4().hex
    replace_file(path / "config.yaml", yaml.safe_dump(config, sort_keys=False, allow_unicode=True))
    identity = {"run": run, "config": digest_of(config)} | ({"data": facts["data"]} if facts.get("data") else {})
    replace_file(path / "env.json", json.dumps([*starts, seal({"run": run, **describe_environment(), **facts})], indent=1) + "\n")
    for name in ("REQUEUE", WAITING):
        (path / name).unlink(missing_ok=True)
    for name in ("checkpoints", "plots"):
        make_folder(path / name)
    is_complete = or_warn(lambda: read_accuracy(path, config, run), {}).get("complete") is True
    begin = f"{'starting' if is_new else 'continuing'} {path}"
    if is_complete:
        begin = f"{path} is complete: see accuracy.json and plots/. To train again, choose another run.name or seed"
    return lock, {"path": path, "is_complete": is_complete, "identity": identity, "message": "; ".join([begin, *notes])}


def _lock(path: Path, wait_s: float = 0) -> TextIO:
    # lockf, not flock: it ends with the process, workers do not inherit it, and one process can open the folder twice.
    flags = os.O_NOFOLLOW | os.O_NONBLOCK  # the folder may be someone else's: neither follow a link nor wait for the other end of a pipe
    opened = partial(open, opener=lambda name, given: os.open(name, given | flags, 0o666))
    file = opened(path / ".lock", "a")
    deadline = time.monotonic() + wait_s
    while True:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            if time.monotonic() < deadline:
                if ELASTIC in os.environ:
                    with opened(path / WAITING, "w") as waiting:
                        waiting.write(os.environ[ELASTIC])
                time.sleep(0.5)
                continue
            file.close()
            raise RunBusy(f"{path} is in use by another process; wait for it, or choose another run.name") from None
        except OSError as error:  # a file system without locks
            warn(f"{path}: this file system has no locks ({error}); make sure that no other job uses this run.name")
        return file


def _check_configuration(path: Path, config: dict[str, Any]) -> list[str]:
    """Return one text per change that a resume accepts; raise RunRefused for any other change."""
    with explained("cannot continue", ADVICE, (FileNotFoundError, ValueError), RunRefused):
        changes = differences(read_config(path / "config.yaml"), config)
    if refused := [f"  {key}: {change}" for key, change in changes.items() if not matches(key, MAY_CHANGE)]:
        raise RunRefused("\n".join([f"{path} was started with another configuration (was -> is):", *refused, ADVICE]))
    return [f"{key}: {change}" for key, change in changes.items() if not key.startswith("run.")]


def _id_of(path: Path, starts: list[dict[str, Any]]) -> str | None:
    """Return the id of the run in the folder, as its newest start or, if env.json is lost, its newest checkpoint has it."""
    saved = None if starts else load_newest(path)
    return next((start["run"] for start in reversed([saved.identity if saved else {}, *starts]) if start.get("run")), None)


def _check_facts(path: Path, facts: dict[str, str], starts: list[dict[str, Any]]) -> list[str]:
    """Return a text if the code has changed since the last start; raise RunRefused if what is in STARTED has."""
    last = {name: value for start in starts for name, value in start.items() if value}
    changed = [name for name, value in facts.items() if last.get(name) and value and last[name] != value]
    for name, cause in STARTED.items():
        if name in changed:
            raise RunRefused(f"{path} was started {cause} (digest was {last[name][:16]}, is {facts[name][:16]}); {ADVICE}")
    return [f"the code has changed since the last start ({last[name]} -> {facts[name]})" for name in changed]
