"""Delta-forward is the difference of two whole evaluations; bf16 trains by it, and whatever drowns a slope in rounding is refused."""

import dataclasses

import pytest
import torch

from dist_vlcl.dist.first_order import FirstOrder, FirstOrderConfig
from dist_vlcl.dist.world import World
from dist_vlcl.experiment import build_towers
from dist_vlcl.model.moe import MoEConfig
from dist_vlcl.orders import OrderPlan, assign
from dist_vlcl.precision import MAX_SLOPE_NOISE
from dist_vlcl.step import HybridStep
from dist_vlcl.zo.noise import Key
from dist_vlcl.zo.update import MIN_EPSILON, ZerothOrderConfig
from tests.helpers.ranks import run_ranks
from tests.helpers.tiny_clip import LORA, MLP_LORA, MOE, NAMES, batch_of, tiny_clip
from tests.test_step import STRATEGIES, in_float64

CLASSES, LR, KEY = NAMES[:3], 0.01, Key(9, 0)
ADAPTERS = {"moe": MOE, "top 2 of 3": MoEConfig(experts=3, top_k=2, bottleneck=4), "lora": LORA, "lora at the mlp": MLP_LORA}


def step_of(plan, zeroth, adapter=MOE, precision="fp32", double=False, world=None, max_skips=10):
    towers, world = tiny_clip(adapter=adapter, precision=precision), world or World.alone()
    first = FirstOrderConfig(lr=LR)
    step = HybridStep(towers, assign(towers.units, plan), zeroth, lambda model: FirstOrder(world, first, model), world, max_skips)
    if double:
        in_float64(step)
    step.begin(CLASSES)
    return step


def numbers(plan, zeroth, evaluation, **options):
    """Return the slopes of a step, and the losses that its acceptance looked at."""
    step = step_of(plan, dataclasses.replace(zeroth, evaluation=evaluation, clip=None), **options)
    moves = step([batch_of(4, len(CLASSES))], KEY, LR).moves
    slopes = [s for move in moves for probes in move.projected_gradient.values() for s in probes]
    return torch.tensor(slopes, dtype=torch.float64), torch.tensor(
        [loss for move in moves for loss in move.losses or ()], dtype=torch.float64
    )


def check_equality(plan, zeroth, adapter=MOE):
    """In float64 to the eighth digit; in float32 to the rounding of the two evaluations, which delta-forward has less of."""
    slopes, losses = numbers(plan, zeroth, "whole", adapter=adapter, double=True)
    delta_branches, losses_by_delta = numbers(plan, zeroth, "delta", adapter=adapter, double=True)
    assert float(slopes.abs().max()) > 1e-3
    torch.testing.assert_close(delta_branches, slopes, rtol=0, atol=1e-6 * float(slopes.abs().max()))
    torch.testing.assert_close(losses_by_delta, losses, rtol=0, atol=2e-9)
    narrow, narrow_losses = numbers(plan, zeroth, "delta", adapter=adapter)
    torch.testing.assert_close(narrow, slopes, rtol=0, atol=max(0.01 * float(slopes.abs().max()), 2e-4))
    torch.testing.assert_close(narrow_losses, losses, rtol=0, atol=1e-5)


@pytest.mark.parametrize("layers", ["all", "hop_odd", "hop_even", "prefix", "suffix"])
def test_delta_forward_is_the_difference_of_two_evaluations_in_every_plan(layers):
    """The dual plans have slopes and losses of each branch alone."""
    check_equality(OrderPlan("dual", layers), STRATEGIES["conservative"])


@pytest.mark.parametrize(
    ("strategy", "options"),
    [
        *(("conservative", options) for options in ({"sides": 2, "probes": 2}, {"granularity": "unit"}, {"granularity": "joint"})),
        ("mozo", {"granularity": "joint"}),  # another eps in each branch
    ],
    ids=str,
)
def test_so_it_is_with_other_estimates(strategy, options):
    check_equality(OrderPlan("dual", "prefix"), dataclasses.replace(STRATEGIES[strategy], **options))


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_so_it_is_with_every_adapter(adapter):
    check_equality(OrderPlan("dual", "hop_even"), STRATEGIES["conservative"], ADAPTERS[adapter])


def test_so_it_is_where_a_perturbation_changes_which_experts_act():
    """A step of 1 instead of a thousandth: the difference jumps from expert to expert with the evaluations."""
    far = dataclasses.replace(STRATEGIES["naive"], epsilon={"language": 1.0, "vision": 1.0}, probes=8)
    check_equality(OrderPlan("dual", "all"), far, ADAPTERS["top 2 of 3"])


def noise_of(branch, evaluation, adapter=MOE, directions=16):
    """Return the rounding in bf16, relative to the slope in float64 with weights that are not rounded."""
    found, exact = (step_of(OrderPlan(branch, "all"), ZerothOrderConfig(evaluation=evaluation), adapter, p) for p in ("bf16", "fp32"))
    batch = batch_of(16, len(CLASSES))
    slopes = found.precision.slopes(found.towers, found.tokens, batch, KEY, directions, found.precision.delta_branches)[branch]
    true = exact.precision.slopes(exact.towers.double(), exact.tokens, batch, KEY, directions, ())[branch]
    return float((slopes - true).norm() / true.norm())


@pytest.mark.parametrize("adapter", ["moe", "lora", "lora at the mlp"])  # top 2 of 3 has choices near a tie: docs/performance.md
def test_in_bf16_a_slope_by_delta_forward_has_little_rounding_and_one_by_two_evaluations_much(adapter):
    assert noise_of("vision", "auto", ADAPTERS[adapter]) < MAX_SLOPE_NOISE
    assert noise_of("vision", "whole", ADAPTERS[adapter]) > 3 * MAX_SLOPE_NOISE


def test_in_bf16_language_slopes_have_little_rounding_too():
    assert noise_of("language", "auto") < MAX_SLOPE_NOISE


@pytest.mark.parametrize("plan", [OrderPlan("vision", "all"), OrderPlan("dual", "suffix")], ids=str)
def test_two_evaluations_in_bf16_are_refused_with_what_was_measured_and_what_to_do(plan):
    step = step_of(plan, ZerothOrderConfig(evaluation="whole"), precision="bf16")
    before = {name: t.clone() for name, t in step.towers.units.state_dict().items()}
    with pytest.raises(
        ValueError, match=r"model.precision=bf16 with zo.evaluation=whole: the rounding error is .* of a vision slope. At most 0.1 is .*"
    ):
        step([batch_of(16, len(CLASSES))], KEY, LR)
    assert all(torch.equal(t, before[name]) for name, t in step.towers.units.state_dict().items())


def test_a_resumed_run_goes_on_where_its_first_start_would_be_refused():
    """Slopes shrink while units learn. A run that nothing stopped is measured once, and a resume may not change what is advised."""
    step = step_of(OrderPlan("vision", "all"), ZerothOrderConfig(evaluation="whole"), precision="bf16")
    with pytest.warns(RuntimeWarning, match="the rounding error is .* The run goes on, because a resume may not change these options"):
        step([batch_of(16, len(CLASSES))], dataclasses.replace(KEY, step=5), LR)
    assert step.precision.is_checked


def test_a_new_run_whose_first_step_could_not_be_measured_is_refused_later():
    step = step_of(OrderPlan("vision", "all"), ZerothOrderConfig(evaluation="whole"), precision="bf16")
    step.begin(CLASSES[:1])  # the loss of a task of one class is always 0
    step([batch_of(16, 1)], KEY, LR)
    step.begin(CLASSES)
    with pytest.raises(ValueError, match="the rounding error is"):
        step([batch_of(16, len(CLASSES))], dataclasses.replace(KEY, step=5), LR)


def test_the_gate_measures_what_it_says_and_once():
    step = step_of(OrderPlan("dual", "all"), ZerothOrderConfig(), precision="bf16")
    noise = step.precision.slope_noise(step.tokens, batch_of(16, len(CLASSES)), KEY)
    assert noise.keys() == {"language", "vision"} and 0 < noise["vision"] < MAX_SLOPE_NOISE
    assert not step.precision.is_checked
    step([batch_of(16, len(CLASSES))], KEY, LR)
    assert step.precision.is_checked
    assert step_of(OrderPlan("dual", "all"), ZerothOrderConfig()).precision.is_checked  # fp32 with two evaluations: a percent at most


def test_a_gate_that_could_not_measure_looks_again(monkeypatch):
    step = step_of(OrderPlan("dual", "all"), ZerothOrderConfig(evaluation="whole"), precision="bf16")
    step.begin(CLASSES[:1])  # the loss of a task of one class is always 0
    with monkeypatch.context() as patched:
        patched.setattr(step.precision, "slopes", None)  # it does not even try
        step([batch_of(16, 1)], KEY, LR)
    step.begin(CLASSES)
    with monkeypatch.context() as patched:
        patched.setattr(step.precision, "slopes", lambda *_: {branch: torch.zeros(16) for branch in step.flats})
        step.precision.check_once(step.tokens, batch_of(16, len(CLASSES)), KEY)
    assert not step.precision.is_checked
    with pytest.raises(ValueError, match="the rounding error is"):
        step([batch_of(0, len(CLASSES)), batch_of(16, len(CLASSES))], KEY, LR)  # more micro-batches than samples


def test_with_estimates_of_single_units_the_gate_measures_slopes_of_single_units():
    plan, batch, epsilon = OrderPlan("vision", "all"), batch_of(16, len(CLASSES)), {"language": 1e-4, "vision": 1e-4}
    found = {}
    for granularity in ("branch", "unit"):
        step = step_of(plan, ZerothOrderConfig(epsilon=epsilon, granularity=granularity), double=True)
        found[granularity] = step.precision.slopes(step.towers, step.tokens, batch, KEY, 1, ())["vision"]
    assert len(found["unit"]) == len(step.zeroth.groups) > 1 == len(found["branch"])
    assert float(found["unit"].sum()) == pytest.approx(float(found["branch"]), rel=0.01)


@pytest.mark.parametrize(("branch", "precision"), [("vision", "fp32"), ("language", "fp32"), ("language", "bf16")])
def test_an_epsilon_too_small_for_two_evaluations_in_fp32_is_refused(branch, precision):
    zeroth = ZerothOrderConfig(epsilon={"language": 1e-6, "vision": 1e-6}, evaluation="whole")
    said = f"model.precision={precision} .* of a {branch} slope.*Use zo.evaluation=delta or .*a larger zo.epsilon"
    with pytest.raises(ValueError, match=said):
        step_of(OrderPlan(branch, "all"), zeroth, precision=precision)([batch_of(16, len(CLASSES))], KEY, LR)


@pytest.mark.parametrize("evaluation", ["whole", "delta"])
def test_the_least_epsilon_that_is_let_in_is_refused_by_what_is_measured(evaluation):
    """Not passed because nothing could be measured: losses are rounded, and a slope of 0 has no relative rounding."""
    zeroth = ZerothOrderConfig(epsilon=dict.fromkeys(("language", "vision"), MIN_EPSILON), evaluation=evaluation)
    step = step_of(OrderPlan("dual", "all"), zeroth)
    noise = step.precision.slope_noise(step.tokens, batch_of(16, len(CLASSES)), KEY)
    assert noise.keys() == {"language", "vision"} and min(noise.values()) > MAX_SLOPE_NOISE
    with pytest.raises(ValueError, match=r"a larger zo\.epsilon"):
        step([batch_of(16, len(CLASSES))], KEY, LR)


def test_what_cannot_be_measured_under_zero3_is_refused_before_a_step():
    apart = dataclasses.replace(World.alone(), engine="zero3")
    for options in (
        {"precision": "bf16", "zeroth": ZerothOrderConfig()},
        {"zeroth": ZerothOrderConfig(epsilon={"language": 1e-5, "vision": 1e-3})},
    ):
        with pytest.raises(ValueError, match="use zero2"):
            step_of(OrderPlan("dual", "hop_odd"), **options, world=apart)
        step_of(OrderPlan("dual", "all", rest="frozen"), **options, world=apart)  # no first-order units: nothing is taken apart


def test_a_small_epsilon_runs_in_fp32_where_its_rounding_is_little():
    small = {"language": 3e-5, "vision": 3e-5}
    step = step_of(OrderPlan("dual", "all"), ZerothOrderConfig(epsilon=small, evaluation="delta"))
    assert not step.precision.is_checked
    step([batch_of(16, len(CLASSES))], KEY, LR)
    assert step.precision.is_checked


def test_the_gate_s_reference_for_a_small_epsilon_is_the_slope_in_float64():
    """It says what the rounding is against a step whose parameters, too, are perturbed in float64."""
    plan, batch = OrderPlan("vision", "all"), batch_of(16, len(CLASSES))
    found, exact = (step_of(plan, ZerothOrderConfig(epsilon={"language": 1e-5, "vision": 1e-5}), double=d) for d in (False, True))
    slopes, true = (step.precision.slopes(step.towers, step.tokens, batch, KEY, 16, ())["vision"] for step in (found, exact))
    assert not found.precision.is_checked
    assert found.precision.slope_noise(found.tokens, batch, KEY)["vision"] == pytest.approx(
        float((slopes - true).norm() / true.norm()), rel=1e-3
    )


def test_in_bf16_adapters_gradients_and_moments_stay_in_fp32_and_the_step_is_that_of_fp32_nearly():
    steps = [step_of(OrderPlan("dual", "hop_odd"), STRATEGIES["naive"], precision=p) for p in ("bf16", "fp32")]
    reports = [step([batch_of(8, len(CLASSES))], KEY, LR) for step in steps]
    assert all(t.dtype == torch.float32 for t in steps[0].state_dict().values() if t.is_floating_point())
    assert {p.dtype for p in steps[0].towers.vision.block(1).block.parameters()} == {torch.bfloat16}
    assert reports[0].loss == pytest.approx(reports[1].loss, abs=0.02)
    assert reports[0].gradient_norm == pytest.approx(reports[1].gradient_norm, rel=0.1)


def two_steps(world):
    step = step_of(OrderPlan("dual", "hop_odd"), STRATEGIES["conservative"], precision="bf16", world=world)
    whole = batch_of(16, len(CLASSES))
    part = slice(8 * world.rank, 8 * world.rank + 8)
    mine = dataclasses.replace(whole, **{name: getattr(whole, name)[part] for name in ("images", "labels", "positions", "samples")})
    for k in range(2):
        step([mine], Key(9, k), LR)
    return {name: t.clone() for name, t in step.towers.units.state_dict().items()}


def test_in_bf16_two_ranks_agree_to_the_bit():
    one, other = run_ranks(two_steps, 2, timeout_s=300)
    assert all(torch.equal(t, other[name]) for name, t in one.items())


def test_deepspeed_is_refused_in_bf16():
    from types import SimpleNamespace

    with pytest.raises(ValueError, match=r"model.precision=bf16: DeepSpeed trains in fp32 only"):
        build_towers(SimpleNamespace(model=SimpleNamespace(precision="bf16")), World(engine="zero2"))
