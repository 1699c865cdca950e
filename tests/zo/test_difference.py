"""Projected gradients against the true derivative along the direction, in float64."""

import itertools
import math

import pytest
import torch

from dist_vlcl.zo.difference import DISTRIBUTIONS, Directions, FiniteDifference
from dist_vlcl.zo.flat import Group, groups_of
from dist_vlcl.zo.noise import Key
from tests.helpers.naive_step import normals
from tests.zo.flats import SIZES, Problem, bowl, matrix, quadratic, smooth, two_branches

KEY = Key(3, 1)


def slopes(problem, groups, epsilon, sides=1, probes=1, clip=None, distribution="gaussian", key=KEY):
    """Return (projected gradients of each group, directions)."""
    difference = FiniteDifference(epsilon, sides, probes, clip)
    draws = Directions(problem.flats, distribution)
    directions = {(branch, q): draws.draw(branch, key, q) for branch in problem.flats for q in range(probes)}
    base, *losses = problem([{}, *difference.candidates(groups, directions)])
    return difference.projected_gradients(groups, base, losses), directions


def error_along(loss, branch, epsilon, sides):
    flats = two_branches()
    problem = Problem(flats, loss)
    (found,), z = slopes(problem, [g for g in groups_of(flats, "branch") if g.name == branch], dict.fromkeys(flats, epsilon), sides)
    return found[branch][0] - float(problem.gradient()[branch] @ z[branch, 0].double())


@pytest.mark.parametrize("branch", SIZES)
def test_two_sided_is_exact_on_a_quadratic_and_one_sided_is_off_by_half_eps_times_the_curvature(branch):
    z = torch.zeros(13, dtype=torch.float64)
    z[slice(0, 5) if branch == "language" else slice(5, 13)] = Directions(two_branches(), "gaussian").draw(branch, KEY, 0).double()
    for epsilon in (1.0, 0.1, 1e-3):
        assert error_along(quadratic, branch, epsilon, 2) == pytest.approx(0, abs=1e-6)
        assert error_along(quadratic, branch, epsilon, 1) == pytest.approx(epsilon / 2 * float(z @ matrix() @ z), abs=1e-6)


@pytest.mark.parametrize("branch", SIZES)
@pytest.mark.parametrize(("sides", "order"), [(1, 1), (2, 2)])
def test_the_error_falls_as_eps_one_sided_and_as_eps_squared_two_sided(branch, sides, order):
    errors = [abs(error_along(smooth, branch, epsilon, sides)) for epsilon in (4e-2, 2e-2, 1e-2)]
    for larger, smaller in itertools.pairwise(errors):
        assert math.log2(larger / smaller) == pytest.approx(order, abs=0.1)


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_the_mean_estimate_is_the_gradient(distribution):
    """Over N directions the mean of s z has squared error at most (d + 1) |g|^2 / N: below 2 sigma of it."""
    flats = two_branches()
    problem = Problem(flats, quadratic)
    probes, steps = 250, 6
    total = {branch: torch.zeros_like(flat.values_n) for branch, flat in flats.items()}
    for step in range(steps):
        found, z = slopes(
            problem, groups_of(flats, "branch"), dict.fromkeys(flats, 1e-4), 2, probes, distribution=distribution, key=Key(9, step)
        )
        for own in found:
            for branch, s in own.items():
                total[branch] += torch.stack([z[branch, q] for q in range(probes)]).double().T @ torch.tensor(s, dtype=torch.float64)
    for branch, g in problem.gradient().items():
        mean = total[branch] / (probes * steps)
        assert float((mean - g).norm()) < 2 * math.sqrt((len(g) + 1) / (probes * steps)) * float(g.norm())
        assert float(mean @ g) > 0.9 * float(mean.norm() * g.norm())


def test_directions_are_normal_or_plus_or_minus_one():
    flats = two_branches()
    for branch, names in SIZES.items():
        gaussian, rademacher = (Directions(flats, distribution).draw(branch, KEY, 2) for distribution in DISTRIBUTIONS)
        assert torch.equal(gaussian, torch.cat([normals(name, n, KEY, 2) for name, n in names]))
        assert set(rademacher.tolist()) == {-1.0, 1.0}


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_a_direction_is_redrawn_bit_for_bit_and_each_probe_has_its_own(distribution):
    flats = two_branches()
    draw = Directions(flats, distribution).draw
    assert torch.equal(draw("vision", KEY, 0), Directions(flats, distribution).draw("vision", KEY, 0))
    assert not torch.equal(draw("vision", KEY, 0), draw("vision", KEY, 1))


def test_branches_do_not_share_a_probe():
    """With one bit for both, vision would be right only 65 % of the time at eps_v = eps_l / 2 (concepts.md 2.6)."""
    flats = two_branches()
    problem = Problem(flats, quadratic)
    slopes(problem, groups_of(flats, "branch"), dict.fromkeys(flats, 1e-3))
    assert [set(candidate) for candidate in problem.asked] == [set(), {"language"}, {"vision"}]


def test_granularity_says_what_moves_together():
    flats = two_branches()
    assert groups_of(flats, "branch") == [Group("language", {"language": slice(0, 5)}), Group("vision", {"vision": slice(0, 8)})]
    assert groups_of(flats, "joint") == [Group("language+vision", {"language": slice(0, 5), "vision": slice(0, 8)})]
    assert groups_of(flats, "unit") == [
        Group("language.1", {"language": slice(0, 3)}),
        Group("language.3", {"language": slice(3, 5)}),
        Group("vision.1", {"vision": slice(0, 5)}),
        Group("vision.2", {"vision": slice(5, 8)}),
    ]
    for granularity in ("branch", "unit", "joint"):
        assert groups_of({}, granularity) == []


def test_a_unit_touches_only_its_slice_and_has_its_own_slope():
    flats = two_branches()
    problem = Problem(flats, quadratic)
    groups = groups_of(flats, "unit")
    found, z = slopes(problem, groups, dict.fromkeys(flats, 1e-5), 2)
    g = problem.gradient()
    assert len({slope for own in found for (slope,) in own.values()}) == len(groups)
    for own, group, plus, minus in zip(found, groups, problem.asked[1::2], problem.asked[2::2], strict=True):
        ((branch, part),) = group.slices.items()
        inside = torch.zeros(flats[branch].values_n.numel(), dtype=torch.bool)
        inside[part] = True
        for offset in (plus[branch], minus[branch]):
            assert bool((offset[inside] != 0).all()) and bool((offset[~inside] == 0).all())
        assert own[branch][0] == pytest.approx(float(g[branch][part] @ z[branch, 0][part].double()), abs=1e-6)


@pytest.mark.parametrize("sides", [1, 2])
def test_joint_divides_one_loss_difference_by_each_branch_s_eps(sides):
    flats = two_branches()
    problem = Problem(flats, smooth)
    epsilon = {"language": 1e-3, "vision": 2.5e-4}
    (found,), z = slopes(problem, groups_of(flats, "joint"), epsilon, sides)
    moved = {branch: z[branch, 0] * epsilon[branch] for branch in flats}
    plus = float(smooth(problem.at(moved)))
    minus = float(smooth(problem.at({branch: -offset for branch, offset in moved.items()})))
    difference = plus - float(smooth(problem.at({}))) if sides == 1 else (plus - minus) / 2
    for branch, eps in epsilon.items():
        assert found[branch][0] == pytest.approx(difference / eps, rel=1e-9)
    assert len(problem.asked) == 1 + sides


def test_a_slope_is_clipped_on_both_sides():
    flats = two_branches()
    for sign in (1, -1):
        problem = Problem(flats, lambda x, sign=sign: sign * 1e4 * x.sum())
        free, _ = slopes(problem, groups_of(flats, "branch"), dict.fromkeys(flats, 1e-3))
        clipped, _ = slopes(problem, groups_of(flats, "branch"), dict.fromkeys(flats, 1e-3), clip=10)
        for a, b in zip(free, clipped, strict=True):
            for branch, (s,) in a.items():
                assert abs(s) > 10
                assert b[branch] == (math.copysign(10, s),)


def test_each_branch_is_moved_by_its_own_eps():
    flats = two_branches()
    problem = Problem(flats, bowl)
    epsilon = {"language": 1e-3, "vision": 5e-4}
    _, z = slopes(problem, groups_of(flats, "branch"), epsilon, sides=2, probes=2)
    expected = [(b, q, sign) for b in flats for q in range(2) for sign in (1, -1)]
    for candidate, (branch, q, sign) in zip(problem.asked[1:], expected, strict=True):
        assert torch.equal(candidate[branch], z[branch, q] * (sign * epsilon[branch]))
