"""Every row of the strategy table on problems with known answers; the decision and its replay."""

# n numbers of a branch

import dataclasses
import itertools
import json
import math
from types import SimpleNamespace

import pytest
import torch

from dist_vlcl.config import compose_config
from dist_vlcl.model.units import FlatTensors
from dist_vlcl.options import validate
from dist_vlcl.zo.difference import FiniteDifference
from dist_vlcl.zo.flat import groups_of
from dist_vlcl.zo.noise import Key
from dist_vlcl.zo.update import ZerothOrder, ZerothOrderConfig
from tests.helpers.naive_step import naive_step, normals
from tests.zo.flats import SIZES, Problem, bowl, quadratic, smooth, two_branches

EPSILON = {"language": 1e-3, "vision": 1e-3}
STRATEGIES = {
    "naive": ZerothOrderConfig("naive", transform="identity", epsilon=EPSILON),
    "sign": ZerothOrderConfig("sign", transform="sign", epsilon=EPSILON),
    "conservative": ZerothOrderConfig("conservative", transform="identity", acceptance="best_of_three", epsilon=EPSILON),
    "mozo": ZerothOrderConfig(),
}
OPTIONS = {
    "default": {},
    "two_sided": {"sides": 2},
    "probes": {"probes": 4},
    "rademacher": {"directions": "rademacher"},
    "per_unit": {"granularity": "unit"},
    "joint": {"granularity": "joint"},
}
KEY = Key(11, 4)


def step(problem, config, key=KEY, lr=1e-2, zeroth=None):
    """Take one step on a problem's own flats; return (base loss, moves)."""
    zeroth = zeroth or ZerothOrder(problem.flats, config)
    base, moves = zeroth.decide(problem, key, lr)
    zeroth.apply(moves)
    return base, moves


def values(problem):
    return {branch: flat.values_n.clone() for branch, flat in problem.flats.items()}


def row(strategy, **options):
    return dataclasses.replace(STRATEGIES[strategy], **options)


@pytest.mark.parametrize(
    ("strategy", "option"),
    [*(("naive", option) for option in OPTIONS), *((strategy, "default") for strategy in STRATEGIES if strategy != "naive")],
)
def test_every_strategy_goes_downhill(strategy, option):
    """From distance |x| about 3.6 on |x|^2 / 2, in 13 dimensions; sign-like steps have length lr sqrt(d) whatever the slope."""
    config = row(strategy, **OPTIONS[option])
    problem = Problem(two_branches(), bowl)
    start = float(bowl(problem.at({})))
    zeroth = ZerothOrder(problem.flats, config)
    bounded = config.transform != "identity"
    for k in range(300):
        step(problem, config, Key(1, k), 0.02 if bounded else 0.05, zeroth)
    assert float(bowl(problem.at({}))) < start / 10


@pytest.mark.parametrize("sides", [1, 2])
def test_naive_moves_by_minus_lr_times_the_slope_times_the_direction(sides):
    problem = Problem(two_branches(), quadratic)
    before, g = values(problem), problem.gradient()
    step(problem, row("naive", sides=sides, clip=None, epsilon={"language": 1e-6, "vision": 1e-6}), lr=0.1)
    for branch, names in SIZES.items():
        z = torch.cat([normals(name, n, KEY, 0) for name, n in names]).double()
        torch.testing.assert_close(problem.flats[branch].values_n - before[branch], -0.1 * (g[branch] @ z) * z, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("strategy", ["sign", "mozo"])
def test_sign_moves_every_coordinate_by_lr(strategy):
    problem = Problem(two_branches(), quadratic)
    before, g = values(problem), problem.gradient()
    step(problem, STRATEGIES[strategy], lr=2**-6)
    for branch, names in SIZES.items():
        z = torch.cat([normals(name, n, KEY, 0) for name, n in names]).double()
        expected = -(2**-6) * (g[branch] @ z).sign() * z.sign()  # one bit of information: the sign of the slope
        assert torch.equal(problem.flats[branch].values_n - before[branch], expected)


def test_mozo_s_eps_do_not_change_the_size_of_a_step_but_the_probe():
    """concepts.md 2.6: with sign and one probe, eps acts only through the bit."""
    sizes, probed = [], []
    for epsilon in ({"language": 1e-3, "vision": 5e-4}, {"language": 1e-3, "vision": 1e-4}):
        problem = Problem(two_branches(), quadratic)
        before = values(problem)
        step(problem, row("mozo", epsilon=epsilon))
        sizes.append({branch: (problem.flats[branch].values_n - before[branch]).abs() for branch in before})
        probed.append(problem.asked[2]["vision"])
    assert all(torch.allclose(sizes[0][branch], sizes[1][branch]) for branch in sizes[0])
    assert torch.allclose(probed[0], probed[1] * 5)


def test_probes_average():
    problem = Problem(two_branches(), quadratic)
    before = values(problem)
    _, moves = step(problem, row("naive", probes=3), lr=0.1)
    for move, (branch, names) in zip(moves, SIZES.items(), strict=True):
        slopes = move.projected_gradient[branch]
        z = [torch.cat([normals(name, n, KEY, q) for name, n in names]) for q in range(3)]
        assert len(set(slopes)) == 3
        expected = -0.1 * sum(s * z_n.double() for s, z_n in zip(slopes, z, strict=True)) / 3
        torch.testing.assert_close(problem.flats[branch].values_n - before[branch], expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(("base", "minus", "plus"), itertools.product([1.0, 2.0], repeat=3))
def test_conservative_takes_the_best_and_on_a_tie_stays_then_steps_then_mirrors(base, minus, plus):
    problem = Problem(two_branches(), bowl)
    problem.fail_at = {0: base, 3: minus, 4: plus, 5: minus, 6: plus}  # base, two probes, then minus and plus of each branch
    before = values(problem)
    _, moves = step(problem, STRATEGIES["conservative"], lr=0.1)
    expected = 0.0 if base <= min(minus, plus) else -0.1 if minus <= plus else 0.1
    for move, (branch, offset) in zip(moves, ((b, m.directions[b]) for m in moves for b in m.directions), strict=True):
        assert move.coefficient == expected
        assert move.losses == (base, minus, plus)
        torch.testing.assert_close(problem.flats[branch].values_n, before[branch] + expected * offset)


@pytest.mark.parametrize("seed", range(8))
def test_conservative_never_goes_uphill_branch_by_branch(seed):
    problem = Problem(two_branches(seed), smooth)
    base, moves = step(problem, STRATEGIES["conservative"], Key(seed, 0), lr=0.5)
    for move in moves:
        chosen = dict(zip((0.0, -0.5, 0.5), move.losses, strict=True))[move.coefficient]
        assert chosen == min(move.losses) <= base == move.losses[0]


@pytest.mark.parametrize("granularity", ["branch", "unit", "joint"])
@pytest.mark.parametrize("seed", range(4))
def test_the_candidate_whose_loss_was_accepted_is_bit_for_bit_what_apply_gives(granularity, seed):
    problem = Problem(two_branches(seed), smooth)
    config = row("conservative", granularity=granularity, probes=2)
    groups = groups_of(problem.flats, granularity)
    _, moves = ZerothOrder(problem.flats, config).decide(problem, Key(seed, 0), 0.1)
    tried = problem.asked[1 + 2 * len(groups) :]
    for k, move in enumerate(moves):
        flats = two_branches(seed)
        ZerothOrder(flats, config).apply([move])
        candidate = {-0.1: tried[2 * k], 0.1: tried[2 * k + 1], 0.0: {}}[move.coefficient]
        assert torch.equal(torch.cat([flat.values_n for flat in flats.values()]), problem.at(candidate))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_decide_changes_no_value(strategy):
    problem = Problem(two_branches(), smooth)
    before = values(problem)
    ZerothOrder(problem.flats, row(strategy)).decide(problem, KEY, 0.1)
    for branch, flat in problem.flats.items():
        assert torch.equal(flat.values_n, before[branch])


@pytest.mark.parametrize(("strategy", "at"), [*(("naive", k) for k in range(3)), *(("conservative", k) for k in range(7))])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_not_finite_moves_nothing(strategy, bad, at):
    problem = Problem(two_branches(), smooth)
    problem.fail_at = {at: bad}
    before = values(problem)
    assert ZerothOrder(problem.flats, STRATEGIES[strategy]).decide(problem, KEY, 0.1)[1] is None
    for branch, flat in problem.flats.items():
        assert torch.equal(flat.values_n, before[branch])


@pytest.mark.parametrize("slopes", [[], [{"language": (1.0,)}], [{"language": (1.0,)}, {"vision": ()}]], ids=str)
def test_an_estimator_without_a_slope_for_each_branch_is_refused(slopes):
    problem = Problem(two_branches(), smooth)
    zeroth = ZerothOrder(problem.flats, STRATEGIES["naive"])
    zeroth.estimator = SimpleNamespace(candidates=zeroth.estimator.candidates, projected_gradients=lambda *_: slopes)
    with pytest.raises(ValueError, match=r"zo.estimator=.*each group needs slopes for each of its branches"):
        zeroth.decide(problem, KEY, 0.1)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_evaluations_per_step_are_those_of_method_2_3(strategy):
    """One base, a probe or two per branch, and two candidates per branch where one chooses."""
    for sides, probes in itertools.product((1, 2), (1, 3)):
        problem = Problem(two_branches(), smooth)
        config = row(strategy, sides=sides, probes=probes)
        step(problem, config)
        assert len(problem.asked) == 1 + 2 * (sides * probes + (2 if config.acceptance == "best_of_three" else 0))


def test_lr_scale_multiplies_the_rate():
    moved = []
    for lr, scale in ((0.2, 1.0), (0.1, 2.0)):
        problem = Problem(two_branches(), smooth)
        step(problem, row("conservative", lr_scale=scale), lr=lr)
        moved.append(problem.at({}))
    assert torch.equal(*moved)


def test_without_zeroth_order_units_only_the_base_is_evaluated():
    asked = []
    for strategy in STRATEGIES.values():
        assert ZerothOrder({}, strategy).decide(lambda candidates: asked.append(list(candidates)) or [2.5], KEY, 0.1) == (2.5, [])
    assert asked == [[{}]] * len(STRATEGIES)


def replay(flats, journal, config, key):
    """Rebuild the values from the journal's records and the key alone, with none of the code under test but the noise."""
    groups = {group.name: group.slices for group in groups_of(flats, config.granularity)}
    for entry in journal:
        for branch, slopes in entry["projected_gradient"].items():
            mean = torch.zeros(flats[branch].values_n.numel())
            for q, slope in enumerate(slopes):
                mean = mean + torch.cat([normals(name, n, key, q) for name, n in SIZES[branch]]) * (slope / len(slopes))
            outside = torch.ones(len(mean), dtype=torch.bool)
            outside[groups[entry["group"]][branch]] = False
            mean[outside] = 0
            flats[branch].values_n += (mean.sign() if config.transform == "sign" else mean) * entry["coefficient"]


@pytest.mark.parametrize("granularity", ["branch", "unit", "joint"])
@pytest.mark.parametrize("probes", [1, 3])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_journal_replays_bit_for_bit(strategy, granularity, probes):
    config = row(strategy, granularity=granularity, probes=probes)
    problem, again = Problem(two_branches(), smooth), two_branches()
    for k in range(6):
        _, moves = step(problem, config, Key(2, k), 0.1)
        journal = json.loads(json.dumps([move.record() for move in moves]))
        replay(again, journal, config, Key(2, k))
    for branch, flat in problem.flats.items():
        assert torch.equal(flat.values_n, again[branch].values_n)


def take(zeroth, problem, key, lr=0.1):
    """Take a step; return the records of its moves as they come back from a line of the journal."""
    _, moves = zeroth.decide(problem, key, lr)
    zeroth.apply(moves)
    return json.loads(json.dumps([move.record() for move in moves]))


@pytest.mark.parametrize("granularity", ["branch", "unit"])
@pytest.mark.parametrize("strategy", ["mozo", "conservative"])
def test_records_rebuild_units_however_these_lie_in_memory(strategy, granularity):
    config = row(strategy, granularity=granularity, probes=2)
    problem = Problem(two_branches(), smooth)
    zeroth = ZerothOrder(problem.flats, config)
    for k in range(2):
        take(zeroth, problem, Key(2, k))
    stored = {}
    for branch, flat in problem.flats.items():
        parts = flat.values_n.clone().split([n for _, n in SIZES[branch]])
        named = dict(zip([name for name, _ in SIZES[branch]], parts, strict=True))
        stored[branch] = FlatTensors({name: named[name] for name in sorted(named, key=lambda name: (name.split("/")[0], -ord(name[-1])))})
    replayed = ZerothOrder(stored, config)
    for k in range(2, 5):
        replayed.replay(take(zeroth, problem, Key(2, k)), Key(2, k))
    for branch, flat in problem.flats.items():
        rebuilt = stored[branch].tensors()
        for (name, _), part in zip(SIZES[branch], flat.values_n.split([n for _, n in SIZES[branch]]), strict=True):
            assert torch.equal(rebuilt[name], part), name


def test_records_of_another_configuration_are_refused():
    problem = Problem(two_branches(), smooth)
    records = take(ZerothOrder(problem.flats, row("mozo")), problem, KEY)
    zeroth = ZerothOrder(two_branches(), row("mozo", granularity="unit"))
    with pytest.raises(ValueError, match=r"moves language, vision where the configuration has language\.1"):
        zeroth.replay(records, KEY)
    with pytest.raises(ValueError, match="moves language, vision, language where the configuration has language, vision"):
        ZerothOrder(two_branches(), row("mozo")).replay([*records, records[0]], KEY)
    before = {branch: flat.values_n.clone() for branch, flat in problem.flats.items()}
    ZerothOrder(problem.flats, row("mozo")).replay([], KEY)  # a skipped step
    assert all(torch.equal(flat.values_n, before[branch]) for branch, flat in problem.flats.items())


@pytest.mark.parametrize("options", [{}, {"sides": 2}, {"probes": 3}, {"granularity": "unit"}, {"clip": 0.2}, {"lr_scale": 3.0}], ids=str)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_step_is_that_of_the_naive_twin(strategy, options):
    config = row(strategy, **options)
    problem = Problem(two_branches(), smooth)
    tensors = {}
    for branch, names in SIZES.items():
        parts = problem.flats[branch].values_n.split([n for _, n in names])
        tensors |= {name: part.clone() for (name, _), part in zip(names, parts, strict=True)}

    def loss(named):
        return float(smooth(torch.cat([named[name] for names in SIZES.values() for name, _ in names])))

    for k in range(3):
        tensors = naive_step(loss, tensors, config, Key(6, k), 0.05)
        step(problem, config, Key(6, k), 0.05)
    expected = torch.cat([tensors[name] for names in SIZES.values() for name, _ in names])
    torch.testing.assert_close(problem.at({}), expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"transform": "square"}, "zo.transform='square': choose from identity, sign"),
        ({"acceptance": "sometimes"}, "zo.acceptance='sometimes': choose from always, best_of_three"),
        ({"sides": 3}, "zo.sides=3: choose from 1, 2"),
        ({"directions": "cauchy"}, "zo.directions='cauchy': choose from gaussian, rademacher"),
        ({"granularity": "layer"}, "zo.granularity='layer': choose from branch, unit, joint"),
        ({"epsilon": {"language": 1e-3}}, "give zo.epsilon.language and zo.epsilon.vision, and no other"),
        ({"epsilon": {"language": -1e-3, "vision": 1e-3}}, "zo.epsilon.language=-0.001: give a number of at least 1e-07"),
        ({"epsilon": {"language": math.nan, "vision": 1e-3}}, "zo.epsilon.language=nan: give a number of at least 1e-07"),
        ({"clip": 0.0}, "zo.clip=0.0: give a number of more than 0, or null"),
        ({"probes": 0}, "zo.probes=0: give a number of at least 1"),
        ({"probes": {"language": 2}}, "zo.probes={'language': 2}: give a number of at least 1, or one for each branch"),
        ({"probes": {"language": 2, "vision": 1}, "granularity": "joint"}, "zo.granularity=joint perturbs both branches together"),
        ({"lr_scale": math.inf}, "zo.lr_scale=inf: give a number above 0, or auto"),
        ({"lr_scale": "auto"}, "zo.lr_scale=auto: give a number above 0, or auto, which needs zo.transform=identity"),
        ({"estimator_options": {"far": 2}}, "zo.estimator_options={'far': 2}: finite_difference has none"),
        ({"estimator": "nowhere:Estimator"}, "zo.estimator='nowhere:Estimator': give finite_difference, or module:Class"),
    ],
    ids=str,
)
def test_a_bad_option_is_refused_in_its_own_words(options, words):
    with pytest.raises(ValueError) as caught:
        validate(row("mozo", **options), "zo")
    assert words in str(caught.value)


@dataclasses.dataclass(frozen=True)
class Far(FiniteDifference):
    far: float = 2.0


def test_options_of_an_own_estimator_reach_its_class_and_unknown_ones_are_refused():
    own = f"zo.estimator={__name__}:Far"
    for words, far in [([], 2.0), (["zo.estimator_options.far=3"], 3), (["zo.estimator_options={far: 4}"], 4)]:
        assert compose_config([own, *words]).zo.make_estimator() == Far({"language": 1e-3, "vision": 5e-4}, 1, 1, 10.0, far)
    with pytest.raises(ValueError, match=r"zo.estimator='.*:Far': give .* unexpected keyword argument 'near'"):
        compose_config([own, "zo.estimator_options.near=3"])
