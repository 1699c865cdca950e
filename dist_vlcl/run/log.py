"""What a run says: to its files first, then to those who listen (wandb, the terminal). Rank 0 speaks; the others are silent."""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from rich import box
from rich.console import Console
from rich.table import Table

from dist_vlcl.run import journal
from dist_vlcl.run.folder import RunConfig, World
from dist_vlcl.run.jsonl import JsonLines
from dist_vlcl.run.mirror import WandbMirror
from dist_vlcl.run.progress import ProgressDisplay
from dist_vlcl.run.state import TrainState

T = TypeVar("T")
METRICS = "metrics.jsonl"
PLAIN_WIDTH = 160  # of a log file, where there is no terminal to ask


class RunLog:
    """The records of one run.

    metrics.jsonl has one object a line with "kind" (run, step, task, note), "step", "task" and "time". A step's record
    carries the number of steps taken with it, so a resume from `state` keeps the lines up to `state.step` and the task
    lines of the tasks before `state.task`: the file becomes that of a run that was never interrupted, but for times.
    Therefore log a task before the checkpoint that ends it.
    """

    def __init__(
        self,
        folder: Path | str,
        settings: RunConfig,
        world: World,
        config: dict[str, Any],
        state: TrainState | None = None,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Open the files where `state` left them and start the listeners; without a state, or at step 0, begin anew."""
        self._is_main = world.is_main
        self._shows_progress = settings.progress and world.is_main
        if not world.is_main:
            return
        folder, state = Path(folder), state or TrainState()
        self._console = console or default_console()
        self._display = ProgressDisplay(self._console, clock)
        self._metrics = JsonLines(folder / METRICS, lambda record: is_before(record, state))
        self._folder = folder
        self._journal = JsonLines(folder / journal.FILE, lambda record: is_before(record, state))
        self._tasks = [record for record in self._metrics.kept if record.get("kind") == "task"]
        self._mirror = WandbMirror(folder, settings.wandb, settings.wandb_project, settings.name, config, state.wandb_id)
        if self._mirror.url:
            self.say(f"wandb: {self._mirror.url}")
        if not self._metrics.kept:
            self._write("run", {"step": 0, "task": 0, "name": settings.name, "world_size": world.size})

    @property
    def wandb_id(self) -> str | None:
        """The id to keep in the state, so that a resume goes on in the same wandb run; None on ranks that do not log."""
        return self._mirror.id if self._is_main else None

    def step(self, record: dict[str, Any]) -> None:
        """Log one step; `record` has at least `step`, counted after it, and `task`."""
        if self._is_main:
            self._write("step", record)
            self._display.note(record)

    def task(self, record: dict[str, Any]) -> None:
        """Log what an evaluation after a task has found and print the accuracy matrix so far.

        `record` has `step`, `task`, and as far as known `per_task`, `seen`, `last`, `avg`, `forgetting` (fractions),
        `correct` and `total` (counts).
        """
        if not self._is_main:
            return
        self._tasks.append(record)
        self._write("task", record)
        self._print_accuracy()

    def note(self, text: str, step: int, task: int) -> None:
        """Log and print an event that any run of this configuration would have, such as a skipped update."""
        if self._is_main:
            self._write("note", {"step": step, "task": task, "text": text})
            self.say(text)

    def say(self, text: str) -> None:
        """Print what belongs in no record, such as that this start resumes an earlier one."""
        if self._is_main:
            with suppress(OSError):  # a log on a full disk is no reason to stop
                self._console.print(text, highlight=False, markup=False, soft_wrap=True)

    def journal(self, record: dict[str, Any]) -> None:
        """Append to journal.jsonl; `record` has at least `step`, and is the last that is logged of its step."""
        if self._is_main:
            self._journal.append(journal.sealed(record))

    def sync(self) -> None:
        """Wait until the disk has all that was logged; call it before a checkpoint, which then never outlives the records up to it."""
        if self._is_main:
            self._metrics.sync()
            self._journal.sync()

    def truncate_after(self, after: int) -> None:
        """Take back the journal's lines beyond step `after`: they may rest on the losses of a rank that went astray."""
        if self._is_main:
            self._journal.close()
            self._journal = JsonLines(self._folder / journal.FILE, lambda record: record["step"] <= after)

    def progress(self, items: Iterable[T], total: int, completed: int = 0, description: str = "") -> Iterator[T]:
        """Iterate over the batches that are left, showing how far they are; `completed` of `total` were done before."""
        if not self._shows_progress:
            return iter(items)
        return self._display.over(items, total, completed, description)

    def table(self, title: str, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
        """Print a table, its first column to the left and the others to the right."""
        if not self._is_main:
            return
        table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
        for index, column in enumerate(columns):
            table.add_column(column, justify="right" if index else "left")
        for row in rows:
            table.add_row(*map(str, row))
        with suppress(OSError):
            self._console.print(table)

    def close(self) -> None:
        """Finish the files and listeners; harmless when repeated."""
        if self._is_main:
            self._mirror.close()
            self._metrics.close()
            self._journal.close()

    def _write(self, kind: str, record: dict[str, Any]) -> None:
        line = {"kind": kind, **record, "time": round(time.time(), 3)}
        self._metrics.append(line)
        self._mirror.log(line)

    def _print_accuracy(self) -> None:
        num_tasks = max(len(record.get("per_task") or ()) for record in self._tasks)
        shown = _shown_tasks(num_tasks, self._console.width)
        columns = ["after task", *(f"{task + 1}" for task in shown), "A_t"]
        cells = [[*(_item(record, task) for task in shown), record.get("seen")] for record in self._tasks]
        rows = [[record["task"] + 1, *map(_percent, row)] for record, row in zip(self._tasks, cells, strict=True)]
        newest = self._tasks[-1]
        means = [f"{name} {_percent(newest[key])}" for key, name in MEANS.items() if newest.get(key) is not None]
        hidden = f", {num_tasks - len(shown)} tasks not shown" if len(shown) < num_tasks else ""
        self.table(f"accuracy in % by task{hidden}", columns, rows)
        if means:
            self.say("  ".join(means))


MEANS = {"last": "Last", "avg": "Avg", "forgetting": "forgetting"}


def is_before(record: dict[str, Any], state: TrainState) -> bool:
    """Whether a line was written before the moment that a state describes; at step 0 nothing was."""
    if state.step == state.task == 0 or record.get("step", 0) > state.step:
        return False
    return record.get("kind") != "task" or record.get("task", 0) < state.task


def default_console() -> Console:
    """A console as wide as its terminal, or as wide as a log can bear."""
    console = Console()
    return console if console.is_terminal else Console(width=PLAIN_WIDTH)


def _shown_tasks(num_tasks: int, width: int) -> list[int]:
    """The first task and the newest ones, as many as a line holds."""
    fitting = max((width - 24) // 8, 2)
    return list(range(num_tasks)) if num_tasks <= fitting else [0, *range(num_tasks - fitting + 1, num_tasks)]


def _item(record: dict[str, Any], task: int) -> float | None:
    per_task = record.get("per_task") or []
    return per_task[task] if task < len(per_task) else None


def _percent(fraction: float | None) -> str:
    return "" if fraction is None else f"{100 * fraction:.2f}"
