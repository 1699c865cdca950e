"""Which differences answer which question, and by which rule."""

import pandas as pd
import pytest

from dist_vlcl.report.cells import ZERO_SHOT, Method, first_order
from dist_vlcl.report.claims import BY_NAME, claim_of, tally

FO = first_order("moe")


def moe(branch: str, layers: str, variant: str = "conservative") -> Method:
    return Method("moe", branch, layers, variant)


@pytest.mark.parametrize(
    ("method", "other", "name"),
    [
        (moe("dual", "all", "naive"), FO, "dual_behind_first_order"),
        (moe("language", "all"), moe("vision", "all"), "language_above_vision"),
        (moe("vision", "hop_even"), FO, "hop_reaches_first_order"),
        (moe("dual", "hop_odd", "frozen"), FO, "hop_reaches_first_order"),
        (moe("dual", "hop_odd", "mozo"), moe("dual", "hop_odd"), "mozo_above_its_plan"),
        (moe("dual", "hop_odd", "mozo"), moe("dual", "hop_odd", "frozen"), "differs_from_control"),
        (moe("dual", "all"), ZERO_SHOT, "differs_from_control"),
        (moe("language", "all"), FO, None),
        (moe("dual", "prefix"), FO, None),
    ],
    ids=str,
)
def test_a_difference_bears_on_at_most_one_claim(method, other, name):
    claim = claim_of(method, other)
    assert (claim.name if claim else None) == name


@pytest.mark.parametrize(
    ("name", "low", "high", "verdict"),
    [
        ("dual_behind_first_order", -3.0, -1.0, "yes"),
        ("dual_behind_first_order", 1.0, 3.0, "no"),
        ("dual_behind_first_order", -3.0, 1.0, "not told apart"),
        ("language_above_vision", 0.1, 0.2, "yes"),
        ("language_above_vision", -0.2, -0.1, "no"),
        ("hop_reaches_first_order", -0.9, -0.1, "yes"),  # behind, by less than a point
        ("hop_reaches_first_order", -1.1, 0.5, "not told apart"),
        ("hop_reaches_first_order", -3.0, -1.1, "no"),
        ("differs_from_control", 0.1, 0.2, "yes (above)"),
        ("differs_from_control", -0.2, -0.1, "yes (below)"),
        ("differs_from_control", -0.1, 0.1, "not told apart"),
        ("mozo_above_its_plan", float("nan"), float("nan"), "–"),
    ],
    ids=str,
)
def test_a_verdict_needs_the_whole_interval_on_one_side(name, low, high, verdict):
    assert BY_NAME[name].verdict(low, high) == verdict


def test_a_tally_leaves_the_controls_out():
    lines = [("last", "yes", "conservative"), ("last", "–", "mozo"), ("avg", "yes", "conservative"), ("avg", "no", "frozen")]
    frame = pd.DataFrame(lines, columns=["metric", "verdict", "variant"])
    assert tally(frame) == "Last: yes 1, no interval 1; Avg: yes 1."
