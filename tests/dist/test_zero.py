"""Claims about DeepSpeed: every ZeRO stage learns what plain data parallelism learns, and leaves zeroth-order units alone.

Two processes a stage run every plan, so that a stage starts its ranks once.
"""

import importlib.util
import json
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

from dist_vlcl.continual.evaluator import count_correct
from dist_vlcl.dist.agree import digest
from dist_vlcl.dist.first_order import FirstOrder, FirstOrderConfig
from dist_vlcl.dist.world import ClusterConfig, World
from dist_vlcl.dist.zero import engine_name, first_order
from dist_vlcl.losses import BatchLosses
from dist_vlcl.model import tower
from dist_vlcl.model.clip import TwoTowers
from dist_vlcl.model.moe import MoEConfig
from dist_vlcl.orders import OrderPlan, assign
from dist_vlcl.step import HybridStep
from dist_vlcl.zo.noise import Key
from tests.dist.test_hybrid_step import NAMES, STRATEGIES, part_of
from tests.helpers.ranks import run_ranks
from tests.helpers.tiny_clip import batch_of, tiny_clip

LAUNCH = Path(__file__).parents[2] / "launch"
STAGES = ["zero0", "zero1", "zero2", "zero3", "zero3_offload"]
PLANS = {
    "dual_all": OrderPlan("dual", "all"),
    "vision_all": OrderPlan("vision", "all"),
    "dual_hop_odd": OrderPlan("dual", "hop_odd"),
    "first": OrderPlan("none"),
}
TOLERANCE = 1e-4  # a hundredth of one AdamW step: fp32 sums are grouped in another way, and AdamW answers to the sign of tiny gradients

pytestmark = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is an extra: pip install '.[deepspeed]'")


def test_compression_is_refused_under_deepspeed():
    with pytest.raises(ValueError, match="DeepSpeed sends whole gradients"):
        first_order(World(engine="zero2"), FirstOrderConfig(compression="bf16"), None)


def environment_of(engine: str) -> dict[str, str]:
    """What `accelerate launch` with launch/accelerate_<engine>.yaml tells its processes."""
    if engine == "ddp":
        return {}
    config = str(LAUNCH / "deepspeed" / f"{engine}.json")
    return {
        "ACCELERATE_USE_DEEPSPEED": "true",
        "ACCELERATE_DEEPSPEED_CONFIG_FILE": config,
        "ACCELERATE_CONFIG_DS_FIELDS": "deepspeed_config_file",
    }


def make_step(world: World, plan: OrderPlan, max_grad_norm: float | None = None) -> HybridStep:
    towers = tiny_clip()
    config = FirstOrderConfig(lr=1e-2, max_grad_norm=max_grad_norm, betas=[0.8, 0.95], weight_decay=0.1)
    return HybridStep(towers, assign(towers.units, plan), STRATEGIES["mozo"], lambda model: first_order(world, config, model), world)


def take(step: HybridStep, k: int, samples: int = 10, micro_batches: int = 1):
    """Step k on its own batch."""
    parts = part_of(step.world, k, samples, micro_batches)
    parts[0].count = samples
    return step(parts, Key(1000 + k, k), lr=1e-2 / (1 + k % 3))


def states(step: HybridStep) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in step.state_dict().items()}


def learn(world: World, plan: OrderPlan, elsewhere: dict[str, torch.Tensor] | None = None) -> dict:
    """Two tasks: with micro-batches, clipping, two skipped steps, and a resume from what was saved; see the test.

    elsewhere: what another engine had saved in the same place, to resume from as well.
    """
    step, reports, classes = make_step(world, plan, max_grad_norm=0.2), [], []
    if plan in (PLANS["first"], PLANS["vision_all"]):
        step.min_samples = 1  # ranks share the text
    step.towers.register_forward_pre_hook(lambda _, inputs: classes.append(len(inputs[0]["language"])))
    step.begin(NAMES)
    reports += [take(step, 0), take(step, 1, micro_batches=2), take(step, 2)]
    step.begin(NAMES)  # another task, with fresh moments
    reports += [take(step, 3), poisoned(step, 4), without_a_gradient(step, 8), take(step, 5)]
    saved = states(step)
    reports += [take(step, 6), take(step, 7)]
    straight = states(step)
    step.begin(NAMES)
    step.load_state_dict(saved)
    take(step, 6), take(step, 7)
    resumed = states(step)
    if elsewhere:
        step.begin(NAMES)
        step.load_state_dict(elsewhere)
        take(step, 6), take(step, 7)
    moved = states(step)
    zeroth = {
        name: t
        for name, t in straight.items()
        if any(name.startswith(f"adapters/{u}/") for u in step.orders if step.orders[u].value == "zeroth")
    }
    digests = {"straight": digest(straight), "resumed": digest(resumed), "zeroth": digest(zeroth)}
    reported = [(r.loss, r.gradient_norm, r.skipped) for r in reports]
    return {"saved": saved, "straight": straight, "moved": moved, "reports": reported, "digests": digests, "classes": set(classes)}


def poisoned(step: HybridStep, k: int):
    """A step in which the last rank's loss is not finite, with its gradients, which are, all-reduced already."""
    report_of, breaks = BatchLosses._report, step.world.rank == step.world.size - 1
    BatchLosses._report = lambda losses, sums, faulty: report_of(losses, sums, faulty | breaks)  # type: ignore[method-assign]
    report = take(step, k)
    BatchLosses._report = report_of  # type: ignore[method-assign]
    return report


def without_a_gradient(step: HybridStep, k: int):
    """A step in which the last rank's own gradient is not finite, though its loss is; where there is none, a plain one."""
    breaks = step.first.parameters and step.world.rank == step.world.size - 1
    hook = step.first.parameters[0].register_hook(lambda g: g.index_fill(0, torch.tensor([0]), torch.inf)) if breaks else None
    report = take(step, k)
    if hook:
        hook.remove()
    return report


EXPERTS = MoEConfig(bottleneck=4, experts=4, top_k=1, dropout=0.0, router_noise=False)


def towers_of_experts() -> TwoTowers:
    return tiny_clip(adapter=EXPERTS)


def learn_by_few_experts(world: World) -> dict[str, torch.Tensor]:
    """First order with one expert of four a sample: which of them act differs from rank to rank."""
    towers = towers_of_experts()
    step = HybridStep(
        towers, assign(towers.units, PLANS["first"]), STRATEGIES["mozo"], lambda m: first_order(world, FirstOrderConfig(lr=1e-2), m), world
    )
    step.begin(NAMES)
    for k in range(3):
        take(step, k)
    return states(step)


def acting(rank: int) -> set[tuple[str, int]]:
    """Return the experts that a rank's share of the first batch has chosen: those with a gradient."""
    towers, alone = towers_of_experts(), World.alone()
    step = HybridStep(
        towers, assign(towers.units, PLANS["first"]), STRATEGIES["mozo"], lambda m: FirstOrder(alone, FirstOrderConfig(lr=1e-2), m), alone
    )
    step.begin(NAMES)
    found: set[tuple[str, int]] = set()
    step.first.update = lambda *_: found.update(  # type: ignore[method-assign]
        (str(id), e)
        for id, unit in towers.units.items()
        if id.branch == "vision"
        for e in range(4)
        if unit.tensors()["down_weight"].grad[e].any() or unit.tensors()["up_weight"].grad[e].any()
    )
    step(part_of(World(rank=rank, size=2), 0, 10), Key(1000, 0), lr=1e-2)
    return found


def trained(world: World, elsewhere: Path | None = None) -> dict:
    saved = torch.load(elsewhere) if elsewhere else {}
    with mock.patch.object(torch.distributed, "new_group", wraps=torch.distributed.new_group) as made:
        results: dict = {name: learn(world, plan, saved.get(name)) for name, plan in PLANS.items()}
    results["timeouts"] = {call.kwargs.get("timeout") for call in made.call_args_list}
    step = make_step(world, PLANS["first"])
    step.begin(NAMES)
    mine = [batch_of(5, len(NAMES), seed=7)] if world.rank == 0 else [batch_of(0, len(NAMES), seed=7)]  # one rank has no sample
    results["evaluation"] = count_correct(step.towers, mine, NAMES, [2, len(NAMES)], world).tolist()
    results["experts"] = learn_by_few_experts(world)
    results["engine"] = world.engine
    return results


@pytest.fixture(scope="module")
def ddp() -> list[dict]:
    return run_ranks(trained, 2, timeout_s=300)


@pytest.mark.parametrize("engine", STAGES)
def test_a_zero_stage_learns_what_data_parallelism_learns(tmp_path, engine, ddp):
    """And goes on from what data parallelism has saved, to the same end; what it saves itself has the same names and values."""
    torch.save({name: ddp[0][name]["saved"] for name in PLANS}, tmp_path / "saved.pt")
    ranks = run_ranks(trained, 2, tmp_path / "saved.pt", timeout_s=300, environment=environment_of(engine))
    assert [r["engine"] for r in ranks] == [engine] * 2
    assert ranks[0]["timeouts"] == {timedelta(seconds=60)}  # cluster.timeout_s, with which run_ranks starts, and not torch's 30 minutes
    assert ranks[0]["evaluation"] == ranks[1]["evaluation"] == ddp[0]["evaluation"]
    for name in PLANS:
        ours, theirs = ranks[0][name], ddp[0][name]
        skipped = [skipped for *_, skipped in theirs["reports"][4:6]]
        assert skipped == [
            "the loss is not finite, or too large, on rank [1]",
            None if name == "dual_all" else "the gradient is not finite",
        ]
        assert ours["digests"] == ranks[1][name]["digests"]  # ranks agree bit for bit, on zeroth-order units and on all others
        assert ours["digests"]["straight"] == ours["digests"]["resumed"]
        assert [r[name]["classes"] for r in ranks] == ([{3}] * 2 if name.startswith("dual") else [{2}, {1}])  # whose text each computes
        assert [skipped for *_, skipped in ours["reports"]] == [skipped for *_, skipped in theirs["reports"]]
        for (loss, norm, _), (other, other_norm, _) in zip(ours["reports"], theirs["reports"], strict=True):
            assert loss == pytest.approx(other, rel=1e-5, nan_ok=True)
            assert norm is None or norm == pytest.approx(other_norm, rel=1e-4)
        for place, same in [("saved", "saved"), ("straight", "straight"), ("moved", "straight")]:
            assert ours[place].keys() == theirs[same].keys()
            for tensor, expected in theirs[same].items():
                words, within = f"{place}, {name} {tensor}", TOLERANCE
                if not tensor.startswith("adapters/"):  # moments are small
                    within *= max(expected.abs().max().item(), 1e-30) * 100
                torch.testing.assert_close(ours[place][tensor], expected, rtol=0, atol=within, msg=lambda m, w=words: f"{w}: {m}")
    for tensor, expected in ddp[0]["experts"].items():
        torch.testing.assert_close(ranks[0]["experts"][tensor], expected, rtol=0, atol=TOLERANCE)
    assert ranks[0]["dual_all"]["digests"]["straight"] == ddp[0]["dual_all"]["digests"]["straight"]


def observed(world: World) -> torch.Tensor:
    """Return the statistics of a step whose adapters are large enough that ZeRO-3 divides them."""
    towers = tiny_clip(adapter=MoEConfig(bottleneck=512, dropout=0.0, router_noise=False))
    plan, config = assign(towers.units, PLANS["first"]), FirstOrderConfig(lr=1e-2)
    step = HybridStep(towers, plan, STRATEGIES["mozo"], lambda model: first_order(world, config, model), world)
    step.begin(NAMES)
    parts = part_of(world, 0, 10)
    parts[0].count = 10
    return step(parts, Key(1000, 0), lr=1e-2, observe=True).unit_statistics


def test_the_unit_records_of_divided_parameters_are_those_of_whole_ones():
    whole, divided = run_ranks(observed, 2), run_ranks(observed, 2, environment=environment_of("zero3"))
    torch.testing.assert_close(divided[0], whole[0], rtol=1e-3, atol=1e-6)


def test_experts_that_differ_from_rank_to_rank_learn_what_they_learn_on_one():
    """With top_k < experts a rank leaves some out; a wrapper that takes them for unused makes wrong gradients without a word."""
    one, other = acting(0), acting(1)
    assert one - other and other - one
    alone, together = run_ranks(learn_by_few_experts, 1)[0], run_ranks(learn_by_few_experts, 2)
    for name, expected in alone.items():
        torch.testing.assert_close(together[0][name], expected, rtol=0, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
        assert torch.equal(together[0][name], together[1][name])


def bf16(world: World) -> None: ...


def test_a_configuration_in_half_precision_is_refused(tmp_path):
    config = json.loads((LAUNCH / "deepspeed/zero1.json").read_text())
    (tmp_path / "bf16.json").write_text(json.dumps({**config, "bf16": {"enabled": True}}))
    with pytest.raises(RuntimeError, match=r"enables bf16|mixed_precision"):
        run_ranks(bf16, 2, environment={**environment_of("zero1"), "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(tmp_path / "bf16.json")})


def test_a_configuration_with_autocast_is_refused():
    accelerator = SimpleNamespace(deepspeed_plugin=SimpleNamespace(deepspeed_config={"torch_autocast": {"enabled": True}}))
    with pytest.raises(RuntimeError, match=r"enables torch_autocast: zeroth order needs fp32"):
        engine_name(accelerator)


@pytest.mark.parametrize("steps", [4, 1, "auto"])
def test_a_configuration_whose_engine_would_divide_gradients_is_refused(steps):
    """DeepSpeed divides each loss by its own number of accumulated steps, which the trainer does not take."""
    plugin = SimpleNamespace(deepspeed_config={"gradient_accumulation_steps": steps, "zero_optimization": {"stage": 2}})
    accelerator = SimpleNamespace(deepspeed_plugin=plugin)
    if steps == 4:
        with pytest.raises(RuntimeError, match=r"gradient_accumulation_steps=4: give 1, and train\.micro_batches=4"):
            engine_name(accelerator)
    else:
        assert engine_name(accelerator) == "zero2"


def features_of_unequal_shares(world: World) -> tuple[int, int]:
    tower.MIN_SAMPLES, tower.ROWS_AT_A_TIME = 4, 1
    step = make_step(world, PLANS["first"])
    step.begin(NAMES)
    share = 20 - world.rank  # five slices, or four
    return share, len(step.towers.features("vision", batch_of(share).images))


def test_ranks_with_unequal_shares_of_a_model_in_pieces_do_not_wait_for_each_other_for_ever():
    """Each block's call is a collective under ZeRO-3: a rank that cut its samples into fewer slices would make fewer of them."""
    assert run_ranks(features_of_unequal_shares, 2, environment=environment_of("zero3")) == [(20, 20), (19, 19)]


def grouped(world: World) -> str:
    try:
        World.from_environment(ClusterConfig(direction_groups=2, device="cpu", threads=1))
    except RuntimeError as error:
        return str(error)
    return ""


def test_direction_groups_are_refused_where_all_ranks_must_evaluate_alike():
    assert all("not possible under ZeRO-3" in words for words in run_ranks(grouped, 2, environment=environment_of("zero3")))
