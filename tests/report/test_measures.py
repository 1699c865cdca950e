"""What zeroth-order steps contributed: exact where the gradient is known, and R where partner runs exist."""

import math

import numpy as np
import pandas as pd
import pytest

from dist_vlcl.report.measures import measures_of
from dist_vlcl.report.records import run_frame
from dist_vlcl.report.statistics import complete_of, results_of
from tests.helpers.runs import write_run

NAIVE = {"transform": "identity", "directions": "gaussian", "lr_scale": 2.0}
NO_STEPS = pd.DataFrame(columns=["step", "task", "loss"])


def a_linear_loss(steps: int, probes: int, numel: int, zo: dict) -> tuple[list, pd.DataFrame, float, float]:
    """Return journal and unit records of steps on the loss g . x, the true descent, and the mean of estimate . g / (|estimate| |g|)."""
    rng = np.random.default_rng(0)
    g = rng.normal(size=numel)
    journal, units, descents, cosines = [], [], [], []
    for step in range(1, steps + 1):
        z = rng.normal(size=(probes, numel))
        slopes = z @ g
        estimate = slopes @ z / probes
        moved = np.sign(estimate) if zo["transform"] == "sign" else estimate
        coefficient = -0.1 * zo["lr_scale"]
        descents.append(-coefficient * moved @ g)
        cosines.append(estimate @ g / np.linalg.norm(estimate) / np.linalg.norm(g))
        move = {"group": "language", "projected_gradient": {"language": list(slopes)}, "coefficient": coefficient}
        journal.append({"step": step, "lr": 0.1, "moves": [move]})
        about = {"step": step, "branch": "language", "order": "zeroth", "gradient_variance": estimate.var()}
        units.append({**about, "gradient_norm": np.linalg.norm(estimate)})
    return journal, pd.DataFrame(units), sum(descents), float(np.mean(cosines))


@pytest.mark.parametrize("probes", [1, 16])
def test_descent_and_cosine_are_those_of_a_loss_whose_gradient_is_known(probes):
    journal, units, descent, cosine = a_linear_loss(200, probes, 400, NAIVE)
    found = measures_of(NO_STEPS, journal, units, NAIVE)
    assert found["descent"] == pytest.approx(descent, rel=0.1)
    assert found["cosine"] == pytest.approx(math.sqrt(probes / 400), rel=0.1)
    assert cosine == pytest.approx(found["cosine"], rel=0.3)  # one slope is smaller than |g| by sqrt(2 / pi) on average


def test_a_sign_step_descends_by_the_slope_s_size():
    zo = {**NAIVE, "transform": "sign"}
    journal, units, descent, _ = a_linear_loss(400, 1, 400, zo)
    assert measures_of(NO_STEPS, journal, units, zo)["descent"] == pytest.approx(descent, rel=0.1)


def test_random_signs_have_neither_descent_nor_cosine():
    journal, units, *_ = a_linear_loss(5, 1, 40, NAIVE)
    assert not {"descent", "cosine"} & set(measures_of(NO_STEPS, journal, units, {**NAIVE, "random_signs": True}))


@pytest.mark.parametrize("scale", [2.0, "auto"])
def test_decisions_are_read_from_the_sign_of_the_coefficient(scale):
    slopes = {"vision": [5.0, -5.0]}
    coefficients = [-0.2, -0.1, 0, 0.1, -0.1, 0.2, 0, 0]
    moves = [[{"group": "vision", "projected_gradient": slopes, "coefficient": c, "losses": [1, 1, 1]}] for c in coefficients]
    journal = [{"step": k, "lr": 0.1, "moves": move} for k, move in enumerate(moves)] + [{"step": 9, "lr": 0.1, "moves": []}]
    found = measures_of(NO_STEPS, journal, pd.DataFrame(), {**NAIVE, "lr_scale": scale})
    assert [found[name] for name in ("ordinary", "stayed", "mirrored")] == [37.5, 37.5, 25]
    for move in moves:
        del move[0]["losses"]
    assert math.isnan(measures_of(NO_STEPS, journal, pd.DataFrame(), {**NAIVE, "lr_scale": scale})["stayed"])  # no rule decided


def test_roughness_does_not_count_the_step_between_two_tasks():
    steps = pd.DataFrame({"step": range(6), "task": [0, 0, 0, 1, 1, 1], "loss": [3.0, 2.0, 1.0, 9.0, 8.0, 7.0]})
    assert measures_of(steps, [], pd.DataFrame(), NAIVE) == {"roughness": 0.0}


def test_r_is_the_share_of_first_order_s_gain_on_the_same_units(tmp_path):
    plan = ["data=cifar100", "tasks.increment=20", "model=vit_b16", "orders=language_all"]
    folders = []
    for seed, (zeroth, first) in enumerate([(0.65, 0.80), (0.62, 0.90)]):
        alone = [*plan, f"seed={seed}", "orders.rest=frozen"]
        folders.append(write_run(tmp_path, *alone, "zo=naive", "zo.probes=16", last=zeroth, avg=zeroth, zero_shot=0.60))
        folders.append(write_run(tmp_path, *alone, "orders.order=first", last=first, avg=first))
    folders.append(write_run(tmp_path, *plan, "zo=naive", "run.name=with-first-order", last=0.7, avg=0.7))  # other units learn, too
    dual = [*plan[:-1], "orders=dual_all", "zo=naive"]
    folders.append(write_run(tmp_path, *dual, last=0.61, avg=0.61))
    folders.append(write_run(tmp_path, *plan[:-1], "orders=first", last=0.7, avg=0.7))
    results = results_of(complete_of(run_frame(folders)[0]))
    known = results[results.recovered_last.notna()].set_index(["branch", "seed"]).recovered_last
    assert dict(known) == pytest.approx({("language", 0): 0.25, ("language", 1): 0.02 / 0.30, ("dual", 0): 0.1}, abs=1e-3)


def test_a_run_folder_s_journal_is_read_into_its_row(tmp_path):
    folder = write_run(tmp_path, "zo=conservative", last=0.5, avg=0.5, records=True)
    [row] = run_frame([folder])[0].to_dict("records")
    assert (row["ordinary"], row["stayed"], row["mirrored"]) == pytest.approx((75, 12.5, 12.5), abs=1)
    assert row["descent"] > 0 and row["cosine"] == pytest.approx((6 * (201344 + 134272)) ** -0.5 * 1, rel=0.6) and row["roughness"] > 0
