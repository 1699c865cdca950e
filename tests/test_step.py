"""A hybrid step against its naive twin: open_clip's own code, 77 tokens, the whole model for every loss, autograd and torch's AdamW."""

import dataclasses
import itertools
import math
from types import SimpleNamespace

import pytest
import torch

from dist_vlcl.config import compose_config
from dist_vlcl.dist.first_order import FirstOrder, FirstOrderConfig
from dist_vlcl.dist.world import World
from dist_vlcl.experiment import PlannedStep
from dist_vlcl.losses import BatchLosses, min_samples
from dist_vlcl.model.moe import MoEConfig
from dist_vlcl.model.tower import Tower
from dist_vlcl.orders import PLAN_LAYERS, Order, OrderPlan, assign
from dist_vlcl.step import HybridStep
from dist_vlcl.train import build_step
from dist_vlcl.zo.flat import restricted
from dist_vlcl.zo.noise import Key, StepNoise
from dist_vlcl.zo.update import ZerothOrderConfig
from tests.helpers.naive_step import naive_step, normals
from tests.helpers.tiny_clip import LORA, MLP_LORA, MOE, NAMES, WholeCLIP, adapter_values, batch_of, tiny_clip

CLASSES, IMAGES, LR = NAMES[:3], 4, 0.01
SAME = {"language": 1e-3, "vision": 1e-3}
STRATEGIES = {
    "naive": ZerothOrderConfig("naive", transform="identity", epsilon=SAME),
    "sign": ZerothOrderConfig("sign", epsilon=SAME),
    "conservative": ZerothOrderConfig("conservative", transform="identity", acceptance="best_of_three", epsilon=SAME),
    "mozo": ZerothOrderConfig(),
}
QUIET = MoEConfig(bottleneck=4, dropout=0.0, router_noise=False)
_twins: dict[str, WholeCLIP] = {}


def hybrid(plan, config=STRATEGIES["naive"], adapter=MOE, first_order=None, double=True, max_skips=10, seed=0):
    towers, world = tiny_clip(adapter=adapter, seed=seed), World.alone()
    first_order = first_order or FirstOrderConfig()
    step = HybridStep(towers, assign(towers.units, plan), config, lambda model: FirstOrder(world, first_order, model), world, max_skips)
    if double:
        in_float64(step)
    step.begin(CLASSES)
    return step


def in_float64(step):
    """Move a step to float64, where a finite difference has digits to compare: eps 1e-3 leaves three in fp32, eight here."""
    step.towers.double()
    for flat in step.flats.values():
        flat.values_n = flat.values_n.double()
        flat.rebind_views()


def whole_clip(adapter=MOE, double=True):
    if repr((adapter, double)) not in _twins:
        _twins[repr((adapter, double))] = WholeCLIP(adapter, double=double)
    return _twins[repr((adapter, double))]


def images(count=IMAGES, seed=0):
    return batch_of(count, len(CLASSES), seed)


class Twin:
    """A hybrid step as one would first write it, on named tensors."""

    def __init__(self, step, adapter=MOE):
        self.whole, self.zeroth = whole_clip(adapter), step.zeroth.config
        self.values = adapter_values(step.towers)
        orders = {str(id): order for id, order in step.orders.items()}
        self.names = {order: [name for name in self.values if orders[name.split("/")[0]] is order] for order in Order}
        self.leaves = {name: self.values[name].requires_grad_() for name in self.names[Order.FIRST]}
        self.adamw = torch.optim.AdamW(self.leaves.values(), lr=0.0, weight_decay=0.0) if self.leaves else None

    def loss(self, batch, key, values=None):
        noise = StepNoise(key, {"vision": batch.positions, "language": torch.arange(len(CLASSES))})
        return self.whole.loss(self.values | (values or {}), batch, CLASSES, noise)

    def zeroth_order(self, batch, key, lr, branches=("language", "vision"), config=None):
        """Return the values of the zeroth-order units of some branches after a naive step."""
        with torch.no_grad():
            chosen = {name: self.values[name] for name in self.names[Order.ZEROTH] if name.split(".")[0] in branches}
            return naive_step(lambda values: float(self.loss(batch, key, values)), chosen, config or self.zeroth, key, lr)

    def first_order(self, batch, key, lr):
        loss = self.loss(batch, key)
        if self.adamw:
            self.adamw.zero_grad()
            loss.backward()
            for group in self.adamw.param_groups:
                group["lr"] = lr
        return float(loss.detach())

    def __call__(self, batch, key, lr):
        moved = self.zeroth_order(batch, key, lr)
        loss = self.first_order(batch, key, lr)
        if self.adamw:
            self.adamw.step()
        self.values |= moved
        return loss

    def check(self, step, atol=1e-7):
        for name, tensor in step.towers.units.state_dict().items():
            torch.testing.assert_close(tensor, self.values[name].detach(), rtol=0, atol=atol, msg=lambda m, name=name: f"{name}: {m}")


def follow(step, twin, steps=2, lr=LR):
    """Take steps on both; the losses agree at each."""
    for k in range(steps):
        report = step([images(seed=k)], Key(9, k), lr)
        assert report.loss == pytest.approx(twin(images(seed=k), Key(9, k), lr), abs=1e-8)
        assert report.skipped is None and report.count == IMAGES


@pytest.mark.parametrize(
    ("branch", "layers", "strategy"),
    [
        *((branch, layers, "conservative") for branch in ("vision", "language", "dual") for layers in PLAN_LAYERS),
        *(("dual", "hop_odd", strategy) for strategy in STRATEGIES if strategy != "conservative"),
    ],
)
def test_a_hybrid_step_is_that_of_the_whole_model_computed_anew_for_every_loss(branch, layers, strategy):
    step = hybrid(OrderPlan(branch, layers), STRATEGIES[strategy])
    twin = Twin(step)
    follow(step, twin)
    twin.check(step)


@pytest.mark.parametrize("options", [{"sides": 2}, {"probes": 3}, {"granularity": "unit"}], ids=str)
def test_options_too_are_those_of_the_whole_model(options):
    step = hybrid(OrderPlan("dual", "hop_odd"), dataclasses.replace(STRATEGIES["conservative"], **options))
    twin = Twin(step)
    follow(step, twin, steps=1)
    twin.check(step)


@pytest.mark.parametrize("adapter", [MOE, MLP_LORA, LORA], ids=["moe", "lora at the mlp", "lora"])
def test_a_unit_s_candidate_restarts_at_its_own_block_with_the_bits_of_a_restart_at_the_branch_s_first(adapter, monkeypatch):
    config = dataclasses.replace(STRATEGIES["conservative"], granularity="unit")
    plan, found = OrderPlan("vision", [2, 3]), []
    starts, run = [], Tower.run
    monkeypatch.setattr(
        Tower, "run", lambda *arguments, start=1, **options: (starts.append(start), run(*arguments, start=start, **options))[1]
    )
    for restarts in ("unit", "branch"):
        step = hybrid(plan, config, adapter, double=False)
        restarting = SimpleNamespace(flats=step.flats, config=dataclasses.replace(config, granularity=restarts))
        monkeypatch.setattr("dist_vlcl.step.BatchLosses", lambda towers, _, *rest, of=restarting: BatchLosses(towers, of, *rest))
        report = step([images()], Key(9, 0), LR)
        found.append(([move.record() for move in report.moves], step.state_dict()))
    # The base of both towers, the probes of vision.2 and vision.3, then the best of three.
    assert starts == [1, 1, 2, 3, 2, 3, 1, 1, 2, 2, 2, 2]
    assert found[0][0] == found[1][0]
    assert all(torch.equal(tensor, found[1][1][name]) for name, tensor in found[0][1].items())


@pytest.mark.parametrize("part", [slice(5, 50), slice(0, 0)], ids=str)
def test_an_offset_whose_part_is_no_unit_is_evaluated_as_a_whole(part):
    step = hybrid(OrderPlan("vision", [2, 3]), dataclasses.replace(STRATEGIES["conservative"], granularity="unit"))
    losses = BatchLosses(step.towers, step.zeroth, step.tokens, step.world, (), stop=False)
    losses.add(step.towers, images(), Key(9, 0), shares_text=False)
    offset = restricted(torch.full_like(step.flats["vision"].values_n, 0.1), part)
    base, with_part, without = losses([{}, {"vision": offset}, {"vision": offset.clone()}]).losses  # a clone has no `part`
    assert with_part == without and (with_part == base) == (part.stop == 0)


def test_a_candidate_that_changes_nothing_has_the_base_s_loss():
    step = hybrid(
        OrderPlan("vision", "all"), dataclasses.replace(STRATEGIES["conservative"], granularity="unit", clip=1e-300), double=False
    )
    moves = step([images()], Key(9, 0), LR).moves  # the steps are rounded to zero
    assert {loss for move in moves for loss in move.losses} == {moves[0].losses[0]}


@pytest.mark.parametrize("adapter", [MLP_LORA, QUIET, MoEConfig(experts=3, top_k=2, bottleneck=4)], ids=["lora", "quiet", "top 2 of 3"])
def test_other_adapters_too_are_those_of_the_whole_model(adapter):
    step = hybrid(OrderPlan("dual", "suffix"), STRATEGIES["conservative"], adapter)
    twin = Twin(step, adapter)
    follow(step, twin)
    twin.check(step)


@pytest.mark.parametrize("layers", PLAN_LAYERS)
def test_in_fp32_losses_and_slopes_are_those_of_float64_nearly(layers):
    """Slopes agree to a percent: the rounding of fp32 at eps 1e-3 (concepts.md 2.3). In float64 they equal those of the whole model."""
    slopes, losses, zeroth = [], [], dataclasses.replace(STRATEGIES["conservative"], probes=4)
    for double in (False, True):
        report = hybrid(OrderPlan("dual", layers), zeroth, double=double)([images()], Key(9, 0), LR)
        slopes.append([s for move in report.moves for probes in move.projected_gradient.values() for s in probes])
        losses.append([report.loss, *(loss for move in report.moves for loss in move.losses)])
    assert slopes[0] == pytest.approx(slopes[1], abs=0.01 * max(map(abs, slopes[1])))
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


@pytest.mark.parametrize("plan", [OrderPlan("vision", "hop_odd"), OrderPlan("dual", "suffix", rest="frozen")], ids=str)
def test_every_learning_unit_moves_and_nothing_else_does(plan):
    step = hybrid(plan, STRATEGIES["mozo"], QUIET, double=False)
    before = {name: t.clone() for name, t in step.towers.state_dict().items()}
    for k in range(3):
        step([images(seed=k)], Key(9, k), LR)
    moved = {name for name, t in step.towers.state_dict().items() if not torch.equal(t, before[name])}
    learning = {id for id, order in step.orders.items() if order is not Order.FROZEN}
    expected = {f"{id.branch}.blocks.{id.layer - 1}.adapter" for id in learning}
    assert {name.rsplit(".", 1)[0] for name in moved} == expected


def test_the_frozen_control_trains_the_other_units_as_first_order_alone_does():
    """Units that are not trained stay bit for bit. The others take the same steps (concepts.md, "What is a control?")."""
    step = hybrid(OrderPlan("dual", "hop_odd", order="frozen"))
    twin = Twin(step)
    before = adapter_values(step.towers)
    follow(step, twin, steps=3)
    twin.check(step)
    for name in twin.names[Order.FROZEN]:
        assert torch.equal(step.towers.units.state_dict()[name], before[name])
    assert twin.names[Order.FROZEN] and twin.names[Order.FIRST] and not twin.names[Order.ZEROTH] and not step.flats


def test_a_run_without_first_order_units_needs_no_optimiser_and_no_graph():
    step = hybrid(OrderPlan("dual", "all"), STRATEGIES["conservative"])
    assert (step.first.parameters, step.first.optimizer, step.learns) == ([], None, True)
    follow(step, Twin(step), steps=1)
    assert step.first.wrapped is step.towers and not any(p.grad is not None for p in step.towers.parameters())


def test_a_zero_shot_run_learns_nothing():
    step = hybrid(OrderPlan("none", "all", rest="frozen"))
    before = adapter_values(step.towers)
    report = step([images()], Key(9, 0), LR)
    assert not step.learns and report.moves == []
    assert all(torch.equal(t, before[name]) for name, t in step.towers.units.state_dict().items())


@pytest.mark.parametrize("cuts", [[0, 1, 7], [0, 2, 2, 7], [0, 1, 2, 3, 4, 5, 6, 7]], ids=str)
def test_micro_batches_however_unequal_give_the_loss_and_the_update_of_the_whole_batch(cuts):
    """An empty part, which a rank with few samples may hold, does not count."""
    whole = images(7)
    parts = [
        dataclasses.replace(
            whole, count=7 if k == 0 else 0, **{field: getattr(whole, field)[a:b] for field in ("images", "labels", "positions", "samples")}
        )
        for k, (a, b) in enumerate(itertools.pairwise(cuts))
    ]
    one, many = (hybrid(OrderPlan("dual", "hop_odd"), STRATEGIES["conservative"]) for _ in range(2))
    for k in range(2):
        expected, report = one([whole], Key(9, k), LR), many(parts, Key(9, k), LR)
        assert report.loss == pytest.approx(expected.loss, abs=1e-9)
        assert report.gradient_norm == pytest.approx(expected.gradient_norm, rel=1e-9)
        assert report.count == 7
    for name, tensor in many.towers.units.state_dict().items():
        torch.testing.assert_close(tensor, one.towers.units.state_dict()[name], rtol=0, atol=1e-8)


@pytest.mark.parametrize("cuts", [[0, 12], [0, 1, 12], [0, 5, 12], [0, 3, 7, 12], [0, 0, 12]], ids=str)
def test_in_fp32_too_the_losses_are_the_same_bits_however_the_batch_is_cut(cuts):
    """So that ranks, however many, decide alike."""
    whole, fields = images(12), ("images", "labels", "positions", "samples")
    parts = [
        dataclasses.replace(whole, count=12 if k == 0 else 0, **{field: getattr(whole, field)[a:b] for field in fields})
        for k, (a, b) in enumerate(itertools.pairwise(cuts))
    ]
    one, many = (
        hybrid(OrderPlan("dual", "all"), STRATEGIES["conservative"], double=False)([*batch], Key(9, 0), LR) for batch in ([whole], parts)
    )
    assert many.loss == one.loss
    assert [move.record() for move in many.moves] == [move.record() for move in one.moves]


def test_candidates_in_many_chunks_have_the_bits_of_candidates_in_one(monkeypatch):
    config = ZerothOrderConfig(transform="identity", acceptance="best_of_three", probes=5)
    whole = hybrid(OrderPlan("dual", "all"), config, double=False)([images(6)], Key(9, 0), LR)
    sizes, evaluate = [], BatchLosses._evaluate
    monkeypatch.setattr(BatchLosses, "_evaluate", lambda losses, chunk: sizes.append(len(chunk)) or evaluate(losses, chunk))
    monkeypatch.setattr("dist_vlcl.losses.MAX_STACKED_NUMBERS", 1)
    monkeypatch.setattr("dist_vlcl.losses.MIN_CHUNK", 3)
    parts = hybrid(OrderPlan("dual", "all"), config, double=False)([images(6)], Key(9, 0), LR)
    assert max(sizes) == 3 and len(sizes) > 4
    assert (parts.loss, [move.record() for move in parts.moves]) == (whole.loss, [move.record() for move in whole.moves])


@pytest.mark.parametrize(("exact_bits", "share", "computed"), [(None, 15, 3), (None, 16, 16), (True, 3, 16), (False, 64, 3)])
def test_a_rank_with_three_samples_computes_sixteen_only_for_the_sake_of_equal_bits(exact_bits, share, computed):
    """`share`: what the rank has of a full batch. Only the last batch of an epoch is padded if that is sixteen or more."""
    step, seen = hybrid(OrderPlan("dual", "all")), []
    step.min_samples = min_samples(exact_bits, share)
    step.towers.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0]["vision"])))
    report = step([images(3)], Key(9, 0), LR)
    assert set(seen) == {computed} and report.count == 3


@pytest.mark.parametrize("options", [["train.batch_size=15"], ["train.batch_size=31", "train.micro_batches=2"]])
def test_the_trainer_pads_by_its_share_of_a_full_batch_unless_exact_bits_says_otherwise(options):
    for more, expected in (([], 1), (["cluster.exact_bits=true"], 16), (["train.batch_size=32"], 16)):
        cfg = compose_config([option for option in options if option.split("=")[0] not in str(more)] + more)
        step = build_step(SimpleNamespace(cfg=cfg, world=World.alone(), towers=tiny_clip(), batch_size=cfg.train.batch_size))
        assert step.min_samples == expected


def test_without_padding_a_small_share_gives_the_same_loss_up_to_rounding():
    whole = images(12)
    padded, bare = (hybrid(OrderPlan("dual", "hop_odd")) for _ in range(2))
    bare.min_samples = 1
    parts = PlannedStep(whole, Key(9, 0), LR).micro_batches(5)
    expected, found = padded(parts, Key(9, 0), LR), bare(parts, Key(9, 0), LR)
    assert found.loss == pytest.approx(expected.loss, abs=1e-9) and found.gradient_norm == pytest.approx(expected.gradient_norm, rel=1e-9)


def test_the_loss_is_cross_entropy_over_the_classes_of_the_task():
    step = hybrid(OrderPlan("dual", "hop_odd"), adapter=QUIET)
    batch = images()
    image_BF, text_CF = step.towers.features("vision", batch.images), step.towers.features("language", step.towers.prompts(CLASSES))
    similarity = (step.towers.logit_scale * image_BF @ text_CF.T).tolist()
    by_hand = [
        torch.tensor(row).exp().sum().log().item() - row[label] for row, label in zip(similarity, batch.labels.tolist(), strict=True)
    ]
    report = step([batch], Key(9, 0), LR)
    assert report.loss == pytest.approx(sum(by_hand) / len(by_hand), abs=1e-6)


def test_joint_moves_both_branches_by_one_loss_difference():
    config = dataclasses.replace(STRATEGIES["mozo"], transform="identity", granularity="joint")
    step = hybrid(OrderPlan("dual", "hop_odd"), config)
    twin, batch, key = Twin(step), images(), Key(9, 0)
    (move,) = step([batch], key, LR).moves
    with torch.no_grad():
        moved = {}
        for name in twin.names[Order.ZEROTH]:
            z = normals(name, twin.values[name].numel(), key, 0).view_as(twin.values[name])
            moved[name] = twin.values[name] + z * config.epsilon[name.split(".")[0]]
        difference = float(twin.loss(batch, key, moved)) - float(twin.loss(batch, key))
    for branch, epsilon in config.epsilon.items():
        assert move.projected_gradient[branch][0] == pytest.approx(difference / epsilon, abs=1e-5)


def test_a_probe_of_one_tower_does_not_compute_the_other(monkeypatch):
    """What does not change is not computed again: one base forward of vision, and the probe and candidates of language."""
    step = hybrid(OrderPlan("language", "suffix"), STRATEGIES["conservative"])
    runs = []
    for branch in ("vision", "language"):
        tower = step.towers.tower(branch)
        run = tower.run
        monkeypatch.setattr(tower, "run", lambda *a, run=run, branch=branch, **k: runs.append((branch, k.get("start", 1))) or run(*a, **k))
    step([images()], Key(9, 0), LR)
    assert sorted(runs) == [("language", 1), ("language", 3), ("language", 3), ("vision", 1)]


@pytest.mark.parametrize("strategy", ["mozo", "conservative"])
@pytest.mark.parametrize("where", ["vision.1/up_bias", "language.2/router"])
def test_a_loss_that_is_not_finite_skips_the_step_and_too_many_in_a_row_stop_the_run(where, strategy):
    step = hybrid(OrderPlan("dual", "hop_odd"), STRATEGIES[strategy], max_skips=3)
    state = step.towers.units.state_dict()
    good, before = state[where].clone(), None
    for k, poisoned in enumerate((True, True, False, True, True)):
        state[where].copy_(torch.full_like(good, torch.nan) if poisoned else good)
        before = adapter_values(step.towers)
        report = step([images()], Key(9, k), LR)
        assert bool(report.skipped) == poisoned and bool(report.moves) != poisoned
        if poisoned:
            assert "not finite" in report.skipped
            for name, tensor in step.towers.units.state_dict().items():
                torch.testing.assert_close(tensor, before[name], rtol=0, atol=0, equal_nan=True)
        good = state[where].clone() if not poisoned else good
    with pytest.raises(FloatingPointError, match="3 steps in a row were skipped"):
        step([images()], Key(9, 5), LR)


def test_a_probe_whose_loss_is_not_finite_skips_and_counts_the_step_too():
    config = dataclasses.replace(STRATEGIES["conservative"], epsilon=dict.fromkeys(SAME, 1e300))
    step = hybrid(OrderPlan("vision", "hop_odd"), config, max_skips=2)
    before = adapter_values(step.towers)
    report = step([images()], Key(9, 0), LR)
    assert report.skipped and report.moves == [] and math.isfinite(report.loss)
    assert all(torch.equal(t, before[name]) for name, t in step.towers.units.state_dict().items())
    with pytest.raises(FloatingPointError):
        step([images()], Key(9, 1), LR)


def test_a_loss_too_large_to_be_added_exactly_skips_the_step():
    step = hybrid(OrderPlan("dual", "hop_odd"))
    step.towers.language.stem_and_head.clip.logit_scale.fill_(math.log(1e9))
    report = step([images()], Key(9, 0), LR)
    assert report.skipped == "the loss is not finite, or too large, on rank [0]" and not report.moves


@pytest.mark.parametrize("lr_scale", [1.0, 1e300], ids=["at the base", "at a candidate"])
def test_a_skipped_step_leaves_the_moments_of_adamw_as_they_were(lr_scale):
    """A loss that is not finite, of a poisoned model or of a candidate far away."""
    step = hybrid(OrderPlan("vision", "all"), dataclasses.replace(STRATEGIES["conservative"]))  # its own copy, which is changed below
    step([images()], Key(9, 0), LR)
    before = {name: t.clone() for name, t in step.state_dict().items() if name.startswith("adamw/")}
    step.zeroth.config.lr_scale = lr_scale
    if lr_scale == 1.0:
        step.towers.units.state_dict()["language.1/up_bias"].fill_(torch.nan)
    assert step([images()], Key(9, 1), LR).skipped
    after = step.state_dict()
    assert before and all(torch.equal(t, after[name]) for name, t in before.items())


def test_a_resumed_step_goes_on_bit_for_bit():
    config = STRATEGIES["conservative"]
    unbroken, first, second = (hybrid(OrderPlan("dual", "hop_odd"), config, double=False, seed=seed) for seed in (0, 0, 0))
    for k in range(4):
        unbroken([images(seed=k)], Key(9, k), LR)
    for k in range(2):
        first([images(seed=k)], Key(9, k), LR)
    second.load_state_dict({name: t.clone() for name, t in first.state_dict().items()})
    for k in range(2, 4):
        second([images(seed=k)], Key(9, k), LR)
    for name, tensor in unbroken.state_dict().items():
        assert torch.equal(tensor, second.state_dict()[name]), name


def test_a_task_begins_with_fresh_moments():
    step = hybrid(OrderPlan("dual", "hop_odd"), STRATEGIES["naive"])
    step([images()], Key(9, 0), LR)
    assert len(step.state_dict()) > len(step.state_dict(optimizers=False))
    step.begin(CLASSES)
    assert not any(t.any() for name, t in step.state_dict().items() if name.startswith("adamw/"))


def test_the_gradient_s_norm_is_reported_and_clipped():
    free = hybrid(OrderPlan("dual", "hop_odd"))
    twin = Twin(free)
    twin.first_order(images(), Key(9, 0), LR)
    norm = torch.cat([leaf.grad.flatten() for leaf in twin.leaves.values()]).norm()
    assert free([images()], Key(9, 0), LR).gradient_norm == pytest.approx(float(norm), rel=1e-9)
    clipped = hybrid(OrderPlan("dual", "hop_odd"), first_order=FirstOrderConfig(max_grad_norm=float(norm) / 8))
    clipped([images()], Key(9, 0), LR)
    for name in twin.leaves:
        ratio = clipped.state_dict()[f"adamw/{name}/exp_avg"] * 8 - free.state_dict()[f"adamw/{name}/exp_avg"]
        assert float(ratio.abs().max()) < 1e-4 * float(norm)


@pytest.mark.parametrize("stop", [False, True])
def test_a_wish_to_stop_comes_back_with_the_step(stop):
    assert hybrid(OrderPlan("dual", "hop_odd"))([images()], Key(9, 0), LR, stop=stop).stop is stop


def test_journalled_moves_rebuild_the_zeroth_order_units_bit_for_bit():
    step = hybrid(OrderPlan("dual", "hop_odd"), STRATEGIES["conservative"], double=False)
    rebuilt = {name: t for name, t in adapter_values(step.towers).items()}
    zeroth = [name for name in rebuilt if step.orders[next(id for id in step.orders if name.startswith(f"{id}/"))] is Order.ZEROTH]
    for k in range(4):
        for entry in [move.record() for move in step([images(seed=k)], Key(9, k), LR).moves]:
            for branch, (slope,) in entry["projected_gradient"].items():
                for name in zeroth:
                    if name.startswith(f"{branch}."):
                        z = normals(name, rebuilt[name].numel(), Key(9, k), 0).view_as(rebuilt[name])
                        rebuilt[name] = rebuilt[name] + (z * slope) * entry["coefficient"]
    for name in zeroth:
        assert torch.equal(step.towers.units.state_dict()[name], rebuilt[name]), name


@pytest.mark.parametrize("strategy", ["mozo", "conservative"])
@pytest.mark.parametrize("granularity", ["branch", "unit"])
def test_an_observed_step_tells_every_unit_s_gradient_and_update(strategy, granularity):
    """First order: autograd's gradient. Zeroth order: slope times direction, before the sign is taken. And observing changes nothing."""
    plan = OrderPlan("vision", [1, 3], rest="first")
    config = dataclasses.replace(STRATEGIES[strategy], granularity=granularity)
    step, blind = hybrid(plan, config), hybrid(plan, config)
    before, twin, key = adapter_values(step.towers), Twin(blind), Key(9, 0)
    twin.first_order(images(), key, LR)
    expected = {name: leaf.grad for name, leaf in twin.leaves.items()}
    report = step([images()], key, LR, observe=True)
    assert blind([images()], key, LR).unit_statistics is None
    for move in report.moves:
        for branch, part in move.group.slices.items():
            for name in names_in(step.flats[branch], part):
                z = normals(name, before[name].numel(), key, 0)
                expected[name] = z.double() * move.projected_gradient[branch][0]
    after = step.towers.units.state_dict()
    for id, row in zip(step.towers.units, report.unit_statistics.double(), strict=True):
        names = [f"{id}/{name}" for name in step.towers.units[id].names]
        g = torch.cat([expected[name].flatten() for name in names])
        moved = torch.cat([(after[name] - before[name]).flatten() for name in names])
        parts = [x for values in (g, moved) for x in (values.norm(), values.mean(), values.var(correction=0))]
        plain = torch.stack([*(x.double() for x in parts), torch.cat([after[n].flatten() for n in names]).norm().double()])
        torch.testing.assert_close(row, plain, rtol=1e-4, atol=1e-9)
    for name, tensor in blind.towers.units.state_dict().items():
        assert torch.equal(tensor, after[name])


def test_statistics_are_of_their_own_step_whatever_came_before_it():
    """Memory is kept from one observed step to the next; its numbers are not."""
    step = hybrid(OrderPlan("vision", [1, 3], rest="first"), dataclasses.replace(STRATEGIES["conservative"]))  # its own copy
    saved = step.state_dict()
    for number, before_it in enumerate(["", "", "unobserved", "skipped", "restored", "a task"]):
        if before_it == "unobserved":
            step([images()], Key(8, number), LR)
        if before_it == "skipped":
            step.zeroth.config.lr_scale = 1e300
            assert step([images()], Key(8, number), LR, observe=True).skipped
            step.zeroth.config.lr_scale = 1.0
        if before_it == "restored":
            step.load_state_dict(saved)
        if before_it == "a task":
            step.begin(CLASSES)
        before = adapter_values(step.towers)
        report = step([images()], Key(9, number), LR, observe=True)
        after = step.towers.units.state_dict()
        for id, row in zip(step.towers.units, report.unit_statistics, strict=True):
            moved = torch.cat([(after[name] - before[name]).flatten() for name in (f"{id}/{n}" for n in step.towers.units[id].names)])
            torch.testing.assert_close(row[3], moved.norm().float(), rtol=1e-4, atol=1e-9)


def names_in(flat, part):
    """Yield the names of the tensors in a slice of flat values."""
    start = 0
    for name, count in flat.names():
        if part.start <= start < part.stop:
            yield name
        start += count
