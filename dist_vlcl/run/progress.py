"""How a run looks while it runs: a live bar on a terminal, a line now and then elsewhere."""

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

T = TypeVar("T")
LINE_EVERY_S = 10.0


class ProgressDisplay:
    """Shows how far an iteration is, with the newest record's loss and rate."""

    def __init__(self, console: Console, clock: Callable[[], float] = time.monotonic) -> None:
        self._console = console
        self._clock = clock
        self._fields = ""

    def note(self, record: dict[str, Any]) -> None:
        """Take what is shown from a step's record."""
        self._fields = describe_step(record)

    def over(self, items: Iterable[T], total: int, completed: int, description: str) -> Iterator[T]:
        """Iterate over the items that are left of `total`, `completed` of which were done before."""
        self._fields = ""
        show = self._live if self._console.is_terminal else self._lines
        return show(items, total, completed, description)

    def _live(self, items: Iterable[T], total: int, completed: int, description: str) -> Iterator[T]:
        columns = (BarColumn(bar_width=24), MofNCompleteColumn(), TextColumn("{task.fields[fields]}"))
        times = (TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn())
        with Progress(TextColumn("{task.description}"), *columns, *times, console=self._console) as progress:
            bar = progress.add_task(description, total=total, completed=completed, fields="")
            for item in items:
                yield item
                progress.update(bar, advance=1, fields=self._fields)

    def _lines(self, items: Iterable[T], total: int, completed: int, description: str) -> Iterator[T]:
        begin = shown = self._clock()
        for done, item in enumerate(items, 1):
            yield item
            now = self._clock()
            if now - shown >= LINE_EVERY_S or completed + done == total:
                shown = now
                left = (now - begin) / done * (total - completed - done)
                self._print_line(description, completed + done, total, left)

    def _print_line(self, description: str, done: int, total: int, left_s: float) -> None:
        share = f"{100 * done / max(total, 1):3.0f} %"
        with suppress(OSError):  # a log on a full disk is no reason to stop
            self._console.print(f"{description}  {done}/{total}  {share}  {self._fields}  {duration(left_s)} left", highlight=False)


def describe_step(record: dict[str, Any]) -> str:
    """The loss, the size of each projected gradient and the rate, as far as a record has them."""
    parts = [f"loss {record['loss']:.4f}"] if record.get("loss") is not None else []
    for branch, estimate in (record.get("zo") or {}).items():
        gradient = estimate.get("projected_gradient")
        if isinstance(gradient, (int, float)):
            parts.append(f"{branch} {gradient:.2e}")
    if record.get("images_per_second") is not None:
        parts.append(f"{record['images_per_second']:.0f} images/s")
    return "  ".join(parts)


def duration(seconds: float) -> str:
    """Seconds as h:mm:ss."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"
