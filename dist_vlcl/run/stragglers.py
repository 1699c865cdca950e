"""Which rank makes the others wait."""

from collections.abc import Sequence
from statistics import median

FACTOR, MARGIN_S = 1.5, 0.05  # a slow rank needs this many times the median of the others, and at least so many seconds more


def slowest_rank(busy_s: Sequence[float], names: Sequence[str], groups: int = 1) -> str | None:
    """Return a message about the slowest rank, or None if no rank is slow.

    `busy_s`: for each rank, mean seconds of a step outside collectives, so without waiting for others. `groups`: the number of equal rows
    of ranks that evaluate different candidates. A rank is compared within its row.
    """
    row = len(busy_s) // groups
    for rank in sorted(range(len(busy_s)), key=lambda rank: -busy_s[rank]):
        start = rank // row * row
        others = [busy_s[other] for other in range(start, start + row) if other != rank]
        if others and busy_s[rank] > max(FACTOR * median(others), median(others) + MARGIN_S):
            return f"{names[rank]} is slow: it computes for {busy_s[rank]:.2f} s per step, the other ranks for {median(others):.2f} s"
    return None
