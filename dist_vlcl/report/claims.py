"""What the paper claims, as questions that differences of two methods over seeds answer by one rule."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dist_vlcl.report.cells import ZERO_SHOT, Method
from dist_vlcl.report.tables import UNKNOWN

if TYPE_CHECKING:
    import pandas as pd

REACH = 1.0  # points: who is less than that behind has reached
OPEN = "not told apart"
RULE = (
    "*yes*: the whole 95 % interval of the mean paired difference is on the question's side of its bound; *no*: it is wholly on the other "
    f"side; *{OPEN}*: it contains the bound. {UNKNOWN}: there is no interval, with one seed or equal differences. The intervals are not "
    "corrected for their number: of twenty, one misses."
)


@dataclass(frozen=True)
class Claim:
    """A question about differences in points; `takes` says which two methods' difference answers it.

    is_below: it asks for less than the bound, not for more. Without a bound it asks whether there is a difference at all, which no interval
    can deny.
    """

    name: str
    question: str
    condition: str  # of the difference, as it is printed
    takes: Callable[[Method, Method], bool]
    bound: float | None = 0.0
    is_below: bool = False

    def verdict(self, low: float, high: float) -> str:
        """Answer by RULE, given the interval of a mean difference."""
        if math.isnan(low):
            return UNKNOWN
        if self.bound is None:
            return "yes (above)" if low > 0 else "yes (below)" if high < 0 else OPEN
        if low <= self.bound <= high:
            return OPEN
        return "yes" if (high < self.bound) == self.is_below else "no"


def _is_first(method: Method) -> bool:
    return method.variant == "none"


def _is_whole(method: Method, branch: str) -> bool:
    return (method.branch, method.layers) == (branch, "all")


CLAIMS = (
    Claim(
        "dual_behind_first_order",
        "Does dual zeroth order fall behind first order?",
        "< 0",
        lambda method, other: _is_whole(method, "dual") and _is_first(other),
        is_below=True,
    ),
    Claim(
        "language_above_vision",
        "Does zeroth order in language beat zeroth order in vision?",
        "> 0",
        lambda method, other: _is_whole(method, "language") and _is_whole(other, "vision"),
    ),
    Claim(
        "hop_reaches_first_order",
        "Do hop plans reach first order?",
        f"> −{REACH:g} point",
        lambda method, other: method.layers in ("hop_odd", "hop_even") and _is_first(other),
        bound=-REACH,
    ),
    Claim(
        "mozo_above_its_plan",
        "Does MoZO gain over the same plan without it?",
        "> 0",
        lambda method, other: method.variant == "mozo" and other.is_zeroth,
    ),
    Claim(
        "differs_from_control",
        "Is any of it different from the same units frozen?",
        "not 0",
        lambda method, other: method.is_zeroth and (other.variant == "frozen" or other == ZERO_SHOT),
        bound=None,
    ),
)
BY_NAME = {claim.name: claim for claim in CLAIMS}


def claim_of(method: Method, other: Method) -> Claim | None:
    """Return the claim on which the difference of two methods bears, if any."""
    return next((claim for claim in CLAIMS if claim.takes(method, other)), None)


def tally(comparisons: "pd.DataFrame") -> str:
    """Return how often each verdict was reached, such as `Last: yes 2, not told apart 1; Avg: yes 3`; controls are not counted."""
    counted = comparisons[comparisons.variant != "frozen"]
    texts = []
    for name, metric in (("Last", "last"), ("Avg", "avg")):
        counts = counted[counted.metric == metric].verdict.value_counts()
        told = ", ".join(f"{'no interval' if verdict == UNKNOWN else verdict} {number}" for verdict, number in sorted(counts.items()))
        texts.append(f"{name}: {told or 'not run'}")
    return "; ".join(texts) + "."
