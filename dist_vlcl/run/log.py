"""What a run reports: to its files first, then to the trackers and the terminal. Rank 0 reports; the other ranks are silent.

metrics.jsonl   {"kind": "step", "step": 7, "task": 0, "loss": ..., "lr": ..., "zo": {...}, ...}      kinds: run, step, task, note
journal.jsonl   {"step": 7, "task": 0, "seed": 8, "lr": 0.1, "device": "cpu", "moves": [{"group": "vision", "projected_gradient": ...,
                "coefficient": ...}], "crc": "..."}

The zeroth-order units can be rebuilt from the journal. A step's journal line is written last and survives kill -9; a power cut may take
the lines after the last checkpoint. Every line ends with `crc`, the CRC-32 of its rest, which detects damage.
"""

import itertools
import os
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn
from rich.table import Column, Table

from dist_vlcl.dist.world import World
from dist_vlcl.masking import masked, masked_values
from dist_vlcl.reading import read_lines
from dist_vlcl.run.files import JsonLines
from dist_vlcl.run.folder import RunConfig
from dist_vlcl.run.state import TrainState
from dist_vlcl.run.trackers import Trackers
from dist_vlcl.saved import JOURNAL_FORM, METRICS_FORM, misplaced

METRICS, JOURNAL = "metrics.jsonl", "journal.jsonl"
LOG_WIDTH = 160  # characters of a line in a log file
LINE_EVERY_S = 10.0  # between two lines of progress in a log file
MEANS = {"transfer": "Transfer", "last": "Last", "avg": "Avg", "forgetting": "forgetting"}


class Terminal(Console):
    """A console whose reader may go, as in `| head`: the run goes on without it. Rich's own would end the process."""

    def on_broken_pipe(self) -> None:
        """Write what follows to nowhere, also what others print."""
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class RunLog:
    """The records of one run.

    A resume from a state keeps the lines up to `state.step`, and the task lines of the tasks before `state.task`. Except for times, the
    files become those of a run that was never interrupted. For that, a task is logged before the checkpoint that ends it.
    """

    def __init__(
        self, folder: Path, settings: RunConfig, world: World, config: dict[str, Any], state: TrainState, console: Console | None = None
    ) -> None:
        """Open the files at the position of `state` and start the trackers. At step 0 the files begin empty."""
        self._is_main, self._shows_progress = world.is_main, settings.progress and world.is_main
        if not world.is_main:
            return
        self._folder, self._console = folder, console or Terminal()
        if console is None and not self._console.is_terminal:
            self._console.width = LOG_WIDTH
        self._newest, self._images, self._seconds = "", 0.0, 0.0  # what the progress shows of the newest step, and of all its steps
        self._metrics = JsonLines(self._folder / METRICS, METRICS_FORM, lambda record: is_before(record, state))
        self._journal = JsonLines(self._folder / JOURNAL, JOURNAL_FORM, lambda record: is_before(record, state))
        self._tasks = [record for record in self._metrics.kept if record.get("kind") == "task"]
        self._trackers = Trackers(self._folder, settings, masked_values(config))
        for name, kept, num_tasks in ((METRICS, self._metrics.kept, state.task), (JOURNAL, self._journal.kept, 0)):
            if wrong := misplaced(kept, state.step, num_tasks):
                self.say(f"warning: {self._folder / name} was damaged before the checkpoint of step {state.step}: {wrong}")
        if not self._metrics.kept:
            self._write("run", {"step": 0, "task": 0, "name": settings.name, "world_size": world.size})

    def step(self, record: dict[str, Any]) -> None:
        """Log one step. `record` has at least `step`, counted from 1, and `task`."""
        if self._is_main:
            self._write("step", record)
            if seconds := record.get("seconds"):
                self._images += record["images_per_second"] * seconds
                self._seconds += seconds
            parts = [f"loss {record['loss']:.4f}"] if record.get("loss") is not None else []
            parts += [f"{self._images / self._seconds:.0f} images/s"] if self._seconds else []  # the mean rate
            self._newest = "  ".join(parts)

    def task(self, record: dict[str, Any]) -> None:
        """Log the evaluation after a task, and print the accuracy matrix so far.

        `record` has `step`, `task`, and as far as known `per_task`, `seen`, `last`, `avg`, `forgetting` (fractions), `correct` and `total`
        (counts).
        """
        if self._is_main:
            self._tasks.append(record)
            self._write("task", record)
            self._print_accuracy()

    def note(self, text: str, step: int, task: int) -> None:
        """Log and print an event that any run of this configuration would have, such as a skipped update."""
        if self._is_main:
            self._write("note", {"step": step, "task": task, "text": text})
            self.say(text)

    def journal(self, record: dict[str, Any]) -> None:
        """Append to journal.jsonl. `record` has at least `step`. Call it last in a step."""
        if self._is_main:
            self._journal.append(record)

    def say(self, text: str) -> None:
        """Print a message that belongs to this start only, such as that it resumes a run."""
        if self._is_main:
            with suppress(OSError):  # the terminal may be gone, and the run goes on or saves
                self._console.print(masked(text), highlight=False, markup=False, soft_wrap=True)

    def table(self, title: str, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
        """Print a table; the first column is aligned left, the others right."""
        if self._is_main:
            heads = [Column(column, justify="right" if index else "left") for index, column in enumerate(columns)]
            table = Table(*heads, title=title or None, title_justify="left", box=box.SIMPLE_HEAD)
            for row in rows:
                table.add_row(*(masked(str(cell)) for cell in row))
            with suppress(OSError):
                self._console.print(table)

    def progress(self, items: Iterable[Any], total: int, completed: int = 0, description: str = "") -> Iterator[Any]:
        """Iterate over the items that are left of `total`, and show the progress: a bar on a terminal, lines in a log file."""
        return self._shown(items, total, completed, description) if self._shows_progress else iter(items)

    def sync(self) -> None:
        """Wait until the disk has every line. Call it before a checkpoint, so that no step of a checkpoint is missing in the files."""
        if self._is_main:
            self._metrics.sync()
            self._journal.sync()

    def truncate_after(self, step: int) -> None:
        """Remove the journal's lines after `step`: they may come from the losses of a rank that has diverged."""
        if self._is_main:
            self._journal.close()
            self._journal = JsonLines(self._folder / JOURNAL, JOURNAL_FORM, lambda record: record["step"] <= step)

    def close(self) -> None:
        """Close the files and the trackers. A second call does nothing."""
        if self._is_main:
            self._trackers.close()
            self._metrics.close()
            self._journal.close()

    def _write(self, kind: str, record: dict[str, Any]) -> None:
        line = {"kind": kind, **record, "time": round(time.time(), 3)}
        self._metrics.append(line)
        self._trackers.log(line)

    def _shown(self, items: Iterable[Any], total: int, completed: int, description: str) -> Iterator[Any]:
        columns = ("{task.description}", BarColumn(bar_width=10), MofNCompleteColumn(), TimeRemainingColumn(), "{task.fields[newest]}")
        is_live, shown = self._console.is_terminal, self._console.get_time()
        self._newest, self._images, self._seconds = "", 0.0, 0.0
        with Progress(*columns, console=self._console, disable=not is_live) as bar:
            task = bar.add_task(description, total=total, completed=completed, newest="")
            for done, item in enumerate(items, completed + 1):
                yield item
                bar.update(task, completed=done, newest=self._newest)
                if not is_live and (self._console.get_time() - shown >= LINE_EVERY_S or done == total):
                    shown = self._console.get_time()
                    seconds = bar.tasks[0].time_remaining
                    left = f"{timedelta(seconds=round(seconds))} left" if seconds else ""
                    words = (description, f"{done}/{total}", f"{100 * done / max(total, 1):3.0f} %", self._newest, left)
                    self.say("  ".join(filter(None, words)))

    def _print_accuracy(self) -> None:
        num_tasks = max(len(record.get("per_task") or ()) for record in self._tasks)
        fitting = max((self._console.width - 24) // 8, 2)  # columns in a line: the first task, and the newest ones
        shown = list(range(num_tasks)) if num_tasks <= fitting else [0, *range(num_tasks - fitting + 1, num_tasks)]
        hidden = f", {num_tasks - len(shown)} tasks not shown" if len(shown) < num_tasks else ""
        rows = []
        for record in self._tasks:
            by_task = dict(enumerate(record.get("per_task") or []))
            rows.append([record["task"] + 1, *(_percent(by_task.get(task)) for task in shown), _percent(record.get("seen"))])
        self.table(f"accuracy in % by task{hidden}", ["after task", *(f"{task + 1}" for task in shown), "A_t"], rows)
        newest = self._tasks[-1]
        if means := [f"{name} {_percent(newest[key])}" for key, name in MEANS.items() if newest.get(key) is not None]:
            self.say("  ".join(means))


def is_before(record: dict[str, Any], state: TrainState) -> bool:
    """Whether a line was written before the moment that a state describes. At step 0 no line was."""
    if state.step == state.task == 0 or record.get("step", 0) > state.step:
        return False
    return record.get("kind") != "task" or record.get("task", 0) < state.task


def read_journal(folder: Path, after: int) -> Iterator[dict[str, Any]]:
    """Yield the journal's records that follow step `after` without a gap, up to the first that is missing or damaged."""
    for record in read_lines(folder / JOURNAL, JOURNAL_FORM):
        if record["step"] <= after:
            continue
        if record["step"] != after + 1 or "crc" not in record:
            return
        yield record
        after += 1


def journalled_steps(folder: Path, state: TrainState) -> list[dict[str, Any]]:
    """Return the journal's records of this task after the state's step, up to the first one without a line in metrics.jsonl.

    A power cut may leave more of one file than of the other.
    """
    measured = {r["step"]: r.get("seconds") or 0.0 for r in read_lines(folder / METRICS, METRICS_FORM) if r["kind"] == "step"}
    records = itertools.takewhile(lambda record: record["step"] in measured, read_journal(folder, state.step))
    return [{**r, "seconds": measured[r["step"]]} for r in records if r["task"] == state.task]  # between two tasks there is an evaluation


def _percent(fraction: float | None) -> str:
    return "" if fraction is None else f"{100 * fraction:.2f}"
