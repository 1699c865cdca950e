"""The learning rate within a task (concepts.md 1.6)."""

import math


def warmup_cosine(step: int, steps: int, peak: float, warmup: int) -> float:
    """Return the learning rate of step `step` (from 0) of `steps`: linear for `warmup` steps, then a cosine towards 0.

    A task of at most `warmup` steps ends within the warm-up. The baseline divides by zero if the two are equal (Q5 in docs/concepts.md).
    """
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))
