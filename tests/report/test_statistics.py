"""Which differences answer which claim, and by which rule."""

import numpy as np
import pandas as pd
import pytest

from dist_vlcl.report.records import CELL
from dist_vlcl.report.statistics import CLAIMS, compare, paired_test, with_recovered

MEASURED = ["variance_vision", "variance_language", "roughness"]

NO_PAPER = pd.DataFrame(columns=[*CELL, "id", "table", "last", "avg"])
NOTE = "zo.epsilon.language=0.0001; zo.lr_scale=3.0"


def results(*methods: tuple[str, str, str, str], seeds: int = 3, increment: int = 20) -> pd.DataFrame:
    """Return results of methods (branch, layers, variant, method_settings); each is one point above the one before it."""
    rows = [
        {
            **{"dataset": "cifar100", "increment": increment, "shared_settings": "model.name=small_clip", "model_settings": ""},
            **{"adapter": "" if variant == "zero_shot" else "moe", "branch": branch, "layers": layers, "variant": variant},
            **{"method_settings": settings, "other_settings": settings, "run": f"{number}-{seed}", "seed": seed},
            **{"last": 50 + number + 0.3 * seed**2, "avg": 60 + 0.5 * (number * seed % 7)},
        }
        for number, (branch, layers, variant, settings) in enumerate(methods)
        for seed in range(seeds)
    ]
    return pd.DataFrame(rows)


FO, ZERO_SHOT = ("none", "none", "none", ""), ("none", "none", "zero_shot", "")


@pytest.mark.parametrize(
    ("method", "other", "claim"),
    [
        (("dual", "all", "naive", ""), FO, "dual_behind_first_order"),
        (("language", "all", "conservative", ""), ("vision", "all", "conservative", ""), "language_above_vision"),
        (("vision", "hop_even", "conservative", ""), FO, "hop_reaches_first_order"),
        (("dual", "hop_odd", "frozen", ""), FO, "hop_reaches_first_order"),
        (("dual", "hop_odd", "mozo", ""), ("dual", "hop_odd", "conservative", ""), "mozo_above_its_plan"),
        (("dual", "hop_odd", "mozo", ""), ("dual", "hop_odd", "frozen", ""), "differs_from_control"),
        (("dual", "all", "conservative", ""), ZERO_SHOT, "differs_from_control"),
        (("language", "all", "conservative", ""), FO, ""),
        (("dual", "prefix", "conservative", ""), FO, ""),
    ],
    ids=str,
)
def test_a_difference_bears_on_at_most_one_claim(method, other, claim):
    found = compare(results(other, method), NO_PAPER)
    found = found[(found[["branch", "layers", "variant"]] == method[:3]).all(axis=1)]
    assert list(found.claim) == [claim] * 2 and list(found.metric) == ["last", "avg"]
    assert found["mean"].iloc[0] == pytest.approx(1.0) and found.seeds.iloc[0] == 3


@pytest.mark.parametrize(
    ("name", "low", "high", "verdict"),
    [
        ("dual_behind_first_order", -3.0, -1.0, "yes"),
        ("dual_behind_first_order", 1.0, 3.0, "no"),
        ("dual_behind_first_order", -3.0, 1.0, "not decided"),
        ("language_above_vision", 0.1, 0.2, "yes"),
        ("language_above_vision", -0.2, -0.1, "no"),
        ("hop_reaches_first_order", -0.9, -0.1, "yes"),  # behind by less than a point
        ("hop_reaches_first_order", -1.1, 0.5, "not decided"),
        ("hop_reaches_first_order", -3.0, -1.1, "no"),
        ("differs_from_control", 0.1, 0.6, "yes (higher)"),
        ("differs_from_control", -0.9, -0.6, "yes (lower)"),
        ("differs_from_control", 0.1, 0.2, "no (within ±0.5)"),
        ("differs_from_control", -0.1, 0.1, "no (within ±0.5)"),
        ("differs_from_control", -0.6, 0.1, "not decided"),
        ("mozo_above_its_plan", float("nan"), float("nan"), "–"),
    ],
    ids=str,
)
def test_a_verdict_needs_the_whole_interval_on_one_side(name, low, high, verdict):
    assert CLAIMS[name].verdict(low, high) == verdict


def test_a_paired_test_is_that_of_the_textbook():
    """t(2) = 2 / (1 / sqrt 3) = 3.464; its 97.5 % quantile is 4.303."""
    found = paired_test([1.0, 2.0, 3.0])
    assert (found["seeds"], found["mean"]) == (3, 2.0)
    assert [found["low"], found["high"], found["p"]] == pytest.approx([2 - 4.3027 / 3**0.5, 2 + 4.3027 / 3**0.5, 0.0742], abs=1e-3)
    assert np.isnan(paired_test([1.0])["p"]) and np.isnan(paired_test([1.0, 1.0])["p"])


def test_a_difference_is_over_the_seeds_that_both_have():
    frame = results(FO, ("dual", "all", "naive", ""))
    both = compare(frame[(frame.variant == "none") | (frame.seed > 0)], NO_PAPER)
    assert set(both.seeds) == {2}


def test_methods_are_compared_where_their_settings_are_equal_and_first_order_does_not_read_those_of_zo():
    plan, mozo = ("dual", "hop_odd", "conservative"), ("dual", "hop_odd", "mozo")
    found = compare(results(FO, (*plan, ""), (*plan, NOTE), (*mozo, NOTE), (*mozo, "zo.lr_scale=3.0")), NO_PAPER)
    assert not found.duplicated([*CELL, "method_settings", "against", "metric"]).any()
    last = found[(found.variant == "mozo") & (found.metric == "last")]
    gain = last[last.claim == "mozo_above_its_plan"]
    assert dict(zip(gain.method_settings, gain["mean"], strict=True)) == pytest.approx({NOTE: 1.0})
    to_first = last[last.against == "first order"]
    assert dict(zip(to_first.method_settings, to_first["mean"], strict=True)) == pytest.approx({NOTE: 3.0, "zo.lr_scale=3.0": 4.0})


def test_a_warm_start_is_not_compared_with_a_model_that_has_learned_nothing():
    """The gain of the run that adapter.init names would be credited to zeroth order."""
    warm = "adapter.init=adapters.safetensors (123456)"
    frame = results(ZERO_SHOT, ("none", "none", "none", warm), ("dual", "all", "naive", warm))
    assert not compare(frame, NO_PAPER).claim.eq("differs_from_control").any()
    assert with_recovered(frame).recovered_last.isna().all()
    cold = results(ZERO_SHOT, FO, ("dual", "all", "naive", ""))
    assert compare(cold, NO_PAPER).claim.eq("differs_from_control").any() and with_recovered(cold).recovered_last.notna().any()


def test_groups_are_never_compared_with_each_other():
    one, other = results(FO), results(("dual", "all", "naive", "")).assign(shared_settings="train.epochs=2")
    assert compare(pd.concat([one, other]), NO_PAPER).empty


@pytest.mark.parametrize(
    ("method", "other", "claim", "measure"),
    [
        (("dual", "hop_odd", "mozo"), ("dual", "hop_odd", "sign"), "mozo_above_sign", "last"),
        (("dual", "hop_odd", "mozo"), ("dual", "hop_odd", "signwalk"), "above_random_walk", "last"),
        (("vision", "all", "conservative"), ("vision", "all", "walk"), "above_random_walk", "last"),
        (("vision", "all", "sign"), ("vision", "all", "naive"), "above_naive", "last"),
        (("dual", "hop_odd", "conservative"), ("dual", "prefix", "conservative"), "hop_above_block", "last"),
        (("dual", "hop_odd", "mozo"), ("dual", "hop_odd", "conservative"), "mozo_varies_less", "variance_vision"),
        (("dual", "all", "naive"), ("language", "all", "naive"), "dual_oscillates", "roughness"),
        (("language", "hop_odd", "naive"), ("language", "suffix", "naive"), "hop_varies_less", "variance_language"),
    ],
    ids=str,
)
def test_each_question_compares_the_two_methods_that_it_names(method, other, claim, measure):
    settings = "zo.granularity=unit" if claim == "hop_varies_less" else ""
    frame = results((*other, settings), (*method, settings)).assign(variance_vision=1.0, variance_language=2.0, roughness=3.0)
    frame.loc[frame.variant.eq(method[2]) & frame.branch.eq(method[0]) & frame.layers.eq(method[1]), MEASURED] += 1.0
    found = compare(frame, NO_PAPER)
    found = found[(found.claim == claim) & (found.metric == measure)]
    assert len(found) == 1 and tuple(found[["branch", "layers", "variant"]].iloc[0]) == method
    assert found["mean"].iloc[0] == pytest.approx(1.0)


def test_vision_is_compared_with_language_within_a_run():
    frame = results(("dual", "hop_odd", "naive", "")).assign(variance_vision=[1.0, 2.0, 3.0], variance_language=[0.5, 1.4, 2.6])
    [found] = compare(frame, NO_PAPER).query("claim == 'vision_varies_more'").to_dict("records")
    assert (found["mean"], found["verdict"]) == (pytest.approx(0.5), "yes")
    unequal = frame.assign(method_settings="zo.probes={language: 64, vision: 16}")  # more probes alone lower the variance in language
    for of_unequal in (unequal, frame.assign(variant="many_probes")):
        assert not compare(of_unequal, NO_PAPER).claim.eq("vision_varies_more").any()
