"""Many probes: directions of their own, memory that does not grow, a step that follows their number, and the control of random signs."""

import itertools
import math

import pytest
import torch

from dist_vlcl.model.units import FlatTensors
from dist_vlcl.zo.difference import Directions, FiniteDifference
from dist_vlcl.zo.flat import groups_of
from dist_vlcl.zo.noise import DROPOUT_STREAM, ROUTER_STREAM, Key, direction_stream
from dist_vlcl.zo.update import ZerothOrder
from tests.zo.flats import Problem, smooth, two_branches
from tests.zo.test_update import KEY, row, step, take, values

MANY = {"directions": "rademacher", "clip": None, "probes": {"language": 12, "vision": 3}}


def test_directions_beyond_254_have_streams_of_their_own_and_the_first_ones_keep_theirs():
    streams = [direction_stream(probe) for probe in range(2000)]
    assert streams[:254] == list(range(254)) and len(set(streams)) == 2000
    assert not {stream % 256 for stream in streams} & {ROUTER_STREAM, DROPOUT_STREAM}  # rows of router noise and dropout
    directions = Directions(two_branches(), "gaussian")
    drawn = torch.stack([directions.draw("vision", KEY, probe) for probe in (0, 253, 254, 255, 508)])
    assert len(torch.unique(drawn, dim=0)) == 5


def test_each_branch_has_its_own_number_of_probes():
    problem = Problem(two_branches(), smooth)
    _, moves = step(problem, row("naive", **MANY))
    assert {move.group.name: len(move.projected_gradient[move.group.name]) for move in moves} == MANY["probes"]
    assert len(problem.asked) == 1 + 12 + 3


def test_candidates_are_made_one_at_a_time():
    flats, drawn = two_branches(), []

    class Noting(dict):
        def __missing__(self, place):
            drawn.append(place)
            return torch.ones(flats[place[0]].values_n.numel())

    candidates = FiniteDifference({"language": 1.0, "vision": 1.0}, probes=500).candidates(groups_of(flats, "branch"), Noting())
    assert len(list(itertools.islice(candidates, 3))) == 3
    assert drawn == [("language", 0), ("language", 1), ("language", 2)]


def test_units_share_the_draws_of_a_step(monkeypatch):
    """Drawing a direction costs as much as evaluating it in the last block."""
    drawn, draw = [], Directions.draw
    monkeypatch.setattr(Directions, "draw", lambda own, branch, key, q: drawn.append((branch, q)) or draw(own, branch, key, q))
    step(Problem(two_branches(), smooth), row("naive", granularity="unit", **(MANY | {"probes": 40})))
    assert sorted(drawn) == sorted(itertools.product(("language", "vision"), range(40)))


@pytest.mark.parametrize(("numel", "useful"), [(600, 12), (36, 9)])  # 1.5 first-order steps: 37 and 9
def test_auto_adds_the_probes_up_to_the_length_of_one_and_a_half_first_order_steps(numel, useful):
    problem = Problem({"language": FlatTensors({"language.1/up_weight": torch.randn(numel)})}, lambda x: x.square().sum())
    before = values(problem)["language"]
    _, (move,) = step(problem, row("naive", lr_scale="auto", **MANY), lr=0.01)
    slopes = torch.tensor(move.projected_gradient["language"], dtype=torch.float64)
    directions = Directions(problem.flats, "rademacher")
    z = torch.stack([directions.draw("language", KEY, q) for q in range(12)]).double()
    expected = -0.01 * useful / 12 * (slopes / slopes.square().mean().sqrt()) @ z
    torch.testing.assert_close(problem.flats["language"].values_n - before, expected.float(), rtol=1e-4, atol=1e-6)


def test_the_part_of_the_automatic_step_along_the_gradient_is_as_long_as_it_says():
    lr, along = 0.01, []
    for k in range(300):
        problem = Problem({"language": FlatTensors({"language.1/up_weight": torch.zeros(400)})}, torch.sum)  # a gradient of ones
        step(problem, row("naive", lr_scale="auto", **MANY), Key(3, k), lr=lr)
        along.append(float(-problem.flats["language"].values_n.sum()) / math.sqrt(400) / lr)
    assert sum(along) / len(along) == pytest.approx(12, rel=0.05)


def test_auto_does_not_depend_on_the_scale_of_the_loss():
    moved = []
    for factor in (1.0, 8.0):  # a power of two: exact
        problem = Problem(two_branches(), lambda x, factor=factor: factor * smooth(x))
        step(problem, row("naive", lr_scale="auto", **MANY))
        moved.append(problem.at({}))
    torch.testing.assert_close(*moved, rtol=0, atol=1e-12)


def test_auto_stays_where_every_slope_is_zero():
    problem = Problem(two_branches(), lambda x: x.sum() * 0)
    before = problem.at({})
    step(problem, row("naive", lr_scale="auto", **MANY))
    assert torch.equal(problem.at({}), before)


def test_auto_and_random_signs_replay_from_the_journal():
    problem, again = Problem(two_branches(), smooth), two_branches()
    config = row("naive", acceptance="best_of_three", lr_scale="auto", random_signs=True, **MANY)
    zeroth, replayed = ZerothOrder(problem.flats, config), ZerothOrder(again, config)
    for k in range(4):
        replayed.replay(take(zeroth, problem, Key(2, k)), Key(2, k))
    assert all(torch.equal(flat.values_n, again[branch].values_n) for branch, flat in problem.flats.items())


def test_random_signs_keep_every_size_and_follow_no_slope():
    signs = []
    for k in range(40):
        found = []
        for random_signs in (False, True):
            problem = Problem(two_branches(), smooth)
            _, moves = step(problem, row("naive", random_signs=random_signs, **MANY), Key(7, k))
            found.append(torch.tensor([slope for move in moves for slopes in move.projected_gradient.values() for slope in slopes]))
        assert torch.equal(found[0].abs(), found[1].abs())
        signs.append(found[0].sign() * found[1].sign())
    changed = float((torch.stack(signs) < 0).float().mean())
    assert changed == pytest.approx(0.5, abs=4 * 0.5 / math.sqrt(40 * 15))


def test_random_signs_always_take_the_step():
    problem = Problem(two_branches(), smooth)
    config = row("naive", acceptance="best_of_three", random_signs=True, **MANY)
    zeroth = ZerothOrder(problem.flats, config)
    coefficients = [[move["coefficient"] for move in take(zeroth, problem, Key(7, k), lr=0.5)] for k in range(6)]
    assert coefficients == [[-0.5, -0.5]] * 6 and len(problem.asked) == 6 * (1 + 12 + 3)


def test_up_moves_only_the_up_projections_and_its_step_counts_these_parameters():
    units = {f"language.{layer}/{name}": torch.zeros(n) for layer in (1, 2) for name, n in {"up_weight": 30, "down_weight": 50}.items()}
    changed = {}
    for tensors in ("all", "up"):
        problem = Problem({"language": FlatTensors(units)}, torch.sum)
        zeroth = ZerothOrder(problem.flats, row("naive", lr_scale="auto", tensors=tensors, granularity="unit", **MANY))
        changed[tensors] = [zeroth.directions.num_changed(group) for group in zeroth.groups]
        take(zeroth, problem, KEY)
    assert changed == {"all": [80, 80], "up": [30, 30]}
    assert all(bool(t.any()) == ("up" in name) for name, t in problem.flats["language"].tensors().items())


def test_up_needs_an_adapter_with_up_projections():
    with pytest.raises(ValueError, match=r"zo\.tensors=up: this adapter has no tensor with the word up in its name"):
        ZerothOrder({"language": FlatTensors({"language.1/upper": torch.zeros(3)})}, row("naive", tensors="up"))
