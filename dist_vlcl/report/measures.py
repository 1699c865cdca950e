"""What the zeroth-order steps of a run contributed, from its journal and its unit records.

A probe z with slope s = g . z has E[s^2] = |g|^2, where g is the gradient. The estimate of q probes is the mean of s z. Its product with g
is the mean of s^2. So slopes give the gradient's norm, and with the estimate's norm the cosine between the two.
"""

import math
from collections.abc import Iterable, Mapping
from typing import Any

import pandas as pd

DECISIONS = ("ordinary", "stayed", "mirrored")
MEASURES = {  # column -> the words on a page
    "cosine": "cosine of estimate and gradient",
    "descent": "expected descent",  # by zeroth order over the whole run, in units of the loss
    **{name: f"{name} %" for name in DECISIONS},  # of the steps that an acceptance rule decided
    "variance_vision": "log10 variance, vision",  # over coordinates of a zeroth-order unit's estimate, mean over units and steps
    "variance_language": "log10 variance, language",
    "roughness": "roughness of the loss",  # standard deviation of its change from step to step, within tasks
}


def measures_of(steps: pd.DataFrame, journal: Iterable[Mapping[str, Any]], units: pd.DataFrame, zo: Mapping[str, Any]) -> dict[str, float]:
    """Return those of MEASURES that the records of a run allow.

    `steps`: step, task and loss. `journal`: the lines of journal.jsonl. `units`: the unit records. `zo`: the run's zeroth-order options.
    Raises TypeError, ValueError or LookupError for a journal that dist_vlcl has not written.
    """
    found = {}
    if len(steps):
        found["roughness"] = float(steps.loss.astype(float).groupby(steps.task).diff().std())
    of_zeroth = units[units.order == "zeroth"] if len(units) else pd.DataFrame(columns=["branch", "step"])
    for branch, of_branch in of_zeroth.groupby("branch"):
        variance = of_branch.gradient_variance.mean()
        found[f"variance_{branch}"] = math.log10(variance) if variance > 0 else math.nan
    moves = pd.DataFrame([_move(line, move, zo) for line in journal for move in line["moves"] or ()])
    if moves.empty:
        return found
    decided = moves[moves.is_decided]
    found |= {name: 100 * float((decided.decision == name).mean()) for name in DECISIONS}
    if zo.get("random_signs"):
        return found
    found["descent"] = float(moves.descent.sum(skipna=False))
    if len(of_zeroth):
        estimates = (of_zeroth.gradient_norm**2).groupby(of_zeroth.step).sum()
        ratios = moves.groupby("step").square.sum() / estimates[estimates > 0]  # NaN for a step without both
        found["cosine"] = float((ratios**0.5).mean())
    return found


def _move(line: Mapping[str, Any], move: Mapping[str, Any], zo: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a journal's move says about one group in one step."""
    by_branch = list(move["projected_gradient"].values())
    slopes, count = [slope for slopes in by_branch for slope in slopes], len(by_branch[0])
    square, coefficient = sum(slope * slope for slope in slopes) / len(slopes), move["coefficient"]
    if zo.get("transform", "identity") == "identity":
        product = square  # of the gradient and the direction that the coefficient multiplies
    elif count == 1:  # E[|z|] = sqrt(2 / pi) for normals, 1 for signs
        product = sum(map(abs, slopes)) / len(slopes) * (1.0 if zo.get("directions") == "rademacher" else math.sqrt(2 / math.pi))
    else:
        product = math.nan
    worth = {"step": line["step"], "square": square, "descent": -coefficient * product}
    return {**worth, "decision": DECISIONS[(coefficient >= 0) + (coefficient > 0)], "is_decided": "losses" in move}
