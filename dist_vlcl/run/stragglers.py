"""Which rank holds the others up: seconds at work per step, as every rank reports them with its losses."""

from collections import deque
from collections.abc import Callable, Sequence
from statistics import mean, median

WINDOW, MOST = 10, 8  # named after standing out in 8 of the last 10 steps
FACTOR, LEAST_S = 1.5, 0.05  # standing out: this many times the others' median, and so much more
SILENCE = 200  # steps until the same rank is named again


class Stragglers:
    """Watches the seconds of a few steps back. Time spent waiting for others is not in them."""

    def __init__(self, named: Callable[[int], str], groups: int = 1):
        """groups: how many equal rows of ranks have work of their own; a rank is compared within its row."""
        self.named, self.groups = named, groups
        self._recent: deque[list[float]] = deque(maxlen=WINDOW)
        self._told_at: dict[int, int] = {}
        self._steps = 0

    def note(self, busy_s: Sequence[float]) -> str | None:
        """Take one step's seconds by rank; return words for the log when a rank has been slower than the others for a while."""
        self._steps += 1
        self._recent.append(list(busy_s))
        if len(busy_s) < 2 or len(self._recent) < WINDOW:
            return None
        for rank in range(len(busy_s)):
            is_quiet = self._steps - self._told_at.get(rank, -SILENCE) < SILENCE
            row = len(busy_s) // self.groups
            others_at = [other for other in range(rank // row * row, (rank // row + 1) * row) if other != rank]
            if not is_quiet and others_at and sum(_stands_out(step, rank, others_at) for step in self._recent) >= MOST:
                self._told_at[rank] = self._steps
                others = mean(_of(step, others_at) for step in self._recent)
                own = mean(step[rank] for step in self._recent)
                return (
                    f"{self.named(rank)} holds the others up: {own:.2f} s at work a step, the others {others:.2f} s (last {WINDOW} steps)"
                )
        return None


def _of(step: Sequence[float], ranks: Sequence[int]) -> float:
    return median(step[rank] for rank in ranks)


def _stands_out(step: Sequence[float], rank: int, others: Sequence[int]) -> bool:
    usual = _of(step, others)
    return step[rank] > FACTOR * usual and step[rank] > usual + LEAST_S
