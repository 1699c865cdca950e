"""Which of several candidate updates is taken, by its loss (METHOD 2.4)."""

ACCEPTANCES = ("always", "best_of_three")


def best_of_three(base: float, minus: float, plus: float, step: float) -> float:
    """Return the coefficient of the direction: 0, -step or +step, whichever has the lowest loss.

    Ties go to staying, then to the ordinary step. (ZO-LLM's ties go to the mirrored step; see docs/LOG.md.)
    """
    losses = {0.0: base, -step: minus, step: plus}
    return min(losses, key=losses.__getitem__)
