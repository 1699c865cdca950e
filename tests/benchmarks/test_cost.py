"""What is executed, counted operator by operator, against the cost model: at most 5 % more, in every setting of the paper."""

from functools import cache

import pytest
import torch

from benchmarks.cost import naive_cost, shapes_of, step_cost
from benchmarks.count import flops, without_numbers
from benchmarks.naive import NaiveStep
from benchmarks.setup import Workload
from dist_vlcl.dist.world import World
from dist_vlcl.model.clip import TwoTowers
from dist_vlcl.orders import PLAN_LAYERS, OrderPlan, assign
from dist_vlcl.paper import published
from dist_vlcl.zo.noise import Key

SMALL = {"model": "small", "images": 8, "classes": 8}  # executed for real; the product of experts and widths is that of the real CLIP's
LIMIT = 1.05


@cache
def big_towers() -> TwoTowers:
    """ViT-B/16 in shapes only."""
    return Workload().towers("meta")


@cache
def executed(workload: Workload, device: str = "cpu") -> tuple[int, int]:
    """Return the FLOPs of a step that were executed, and those of the model."""
    step = workload.step(workload.towers(device), World.alone(device))
    batch = workload.batch(step.towers.image_size)
    count = flops(lambda: step([batch], Key(1, 0), 1e-3))
    shapes = shapes_of(step.towers, step.tokens.shape[1])
    return count, step_cost(shapes, step.orders, workload.zeroth, workload.images, workload.classes, step.delta_branches).total


def test_products_whose_sums_stay_wide_are_counted_as_others():
    """What delta-forward runs on a GPU (on a CPU there is no such operator)."""
    a, b = (torch.empty(shape, dtype=torch.bfloat16, device="meta") for shape in ((3, 4), (4, 5)))
    assert flops(lambda: torch.ops.aten.mm(a, b, torch.float32)) == flops(lambda: a @ b) == 2 * 3 * 4 * 5
    a, b = a[None], b[None]
    assert flops(lambda: torch.ops.aten.bmm(a, b, torch.float32)) == flops(lambda: a @ b)


def of_the_paper() -> list[tuple[str, str, str]]:
    """Every setting that the paper trains, as (orders, zo, adapter)."""
    settings = set()
    for run in published()["runs"]:
        layers = run["zo_layers"].rstrip("6")
        orders = "first" if run["zo_branch"] == "none" else f"{run['zo_branch']}_{layers}"
        settings.add((orders, "conservative" if orders == "first" else run["zo_variant"], run["adapter"]))
    return sorted(settings)


@pytest.mark.parametrize(("orders", "zo", "adapter"), of_the_paper())
def test_a_step_executes_no_more_than_the_cost_model_says(orders, zo, adapter):
    count, model = executed(Workload(**SMALL, orders=orders, zo=zo, adapter=adapter))
    assert 0.99 * model <= count <= LIMIT * model


@pytest.mark.parametrize("orders", ["first", "dual_hop_odd", "dual_suffix"])
def test_so_with_lora_at_the_mlp(orders):
    count, model = executed(Workload(**SMALL, orders=orders, adapter="lora_mlp"))
    assert 0.99 * model <= count <= LIMIT * model


def test_so_with_two_sides():
    count, model = executed(Workload(**SMALL, orders="dual_hop_even", sides=2))
    assert 0.99 * model <= count <= LIMIT * model


@pytest.mark.parametrize("adapter", ["moe", "lora", "lora_mlp"])
@pytest.mark.parametrize(("orders", "zo"), [("dual_all", "conservative"), ("vision_hop_even", "mozo"), ("dual_suffix", "naive")])
def test_so_by_delta_forward(orders, zo, adapter):
    count, model = executed(Workload(**SMALL, orders=orders, zo=zo, adapter=adapter, evaluation="delta"))
    assert 0.99 * model <= count <= LIMIT * model


def test_so_in_bf16():
    count, model = executed(Workload(**SMALL, orders="dual_hop_odd", precision="bf16"))
    assert 0.99 * model <= count <= LIMIT * model


def test_so_at_the_paper_s_size():
    """ViT-B/16, 128 images, 20 classes, without numbers."""
    with without_numbers():
        count, model = executed(Workload(orders="dual_suffix"), "meta")
    assert 0.99 * model <= count <= LIMIT * model
    assert 10e12 < count < 15e12


@pytest.mark.parametrize("zo", ["naive", "conservative"])
@pytest.mark.parametrize("orders", ["first", "dual_all", "language_prefix"])
def test_the_naive_step_executes_what_its_model_says(orders, zo):
    workload = Workload(**SMALL, orders=orders, zo=zo)
    towers = workload.towers("cpu", context="full")
    step = NaiveStep(towers, workload.orders_of(towers), workload.zeroth, workload.class_names)
    count = flops(lambda: step(workload.batch(towers.image_size), Key(1, 0), 1e-3))
    model = naive_cost(shapes_of(towers, 11), workload.orders_of(towers), workload.zeroth, 8, 8).total
    assert count == pytest.approx(model, rel=0.05)


def test_naive_and_fast_start_from_the_same_loss():
    workload = Workload(**SMALL, zo="naive")
    towers = workload.towers("cpu", context="full")
    naive = NaiveStep(towers, workload.orders_of(towers), workload.zeroth, workload.class_names)
    fast = workload.step(workload.towers("cpu"), World.alone())
    batch = workload.batch(towers.image_size)
    assert naive(batch, Key(1, 0), 1e-3) == pytest.approx(fast([batch], Key(1, 0), 1e-3).loss, abs=2e-5)


def test_the_published_sizes():
    """open_clip's profile of ViT-B/16: an image 35.13 GF, a prompt of 77 tokens 5.96 GF (both as two FLOPs a multiply-add), no adapters."""
    shapes = shapes_of(big_towers(), 77)
    bare = {b: s.naive(s.tokens).forward - sum(k.adapter for k in s.naive(s.tokens).blocks) for b, s in shapes.items()}
    assert bare["vision"] / 1e9 == pytest.approx(35.13, rel=0.002)
    assert bare["language"] / 1e9 == pytest.approx(5.96, rel=0.002)


def test_language_zeroth_order_is_almost_free():
    """A conservative step of it costs at most 1.05 x first order on vision alone."""
    towers = big_towers()
    shapes, vision_only = shapes_of(towers, 11), assign(towers.units, OrderPlan("language", "all", order="frozen"))
    step, alone = (
        step_cost(shapes, orders, Workload().zeroth, 128, 20).total
        for orders in (Workload(orders="language_all").orders_of(towers), vision_only)
    )
    assert alone < step < 1.05 * alone


@pytest.mark.parametrize(
    ("few", "many"),
    [({"classes": 10}, {"classes": 200}), ({"options": (("experts", 2),)}, {"options": (("experts", 22),)})],
    ids=["classes", "experts"],
)
def test_cost_grows_by_at_most_15_percent_from_10_to_200_classes_and_from_2_to_22_experts(few, many):
    with without_numbers():
        small, large = (executed(Workload(orders="language_all", **options), "meta")[0] for options in (few, many))
    assert small < large <= 1.15 * small


GOALS = {  # of a conservative step, how many times fewer FLOPs than the naive step at 128 images and 20 classes
    **{f"{branch}_suffix": 1.95 for branch in ("dual", "vision")},
    **{f"{branch}_{layers}": 1.4 for branch in ("dual", "vision") for layers in ("hop_odd", "hop_even", "prefix")},
    **{f"language_{layers}": 3.3 for layers in ("all", "hop_odd", "hop_even", "prefix", "suffix")},
    "vision_all": 1.5,
    "dual_all": 1.25,
}


def test_the_goals_of_every_setting_are_met_by_what_is_executed():
    """With the at most 5 % that the step executes beyond its model, which the tests above hold."""
    towers = big_towers()
    shapes = shapes_of(towers, 11)

    def ratio(orders: str, zo: str) -> float:
        workload = Workload(orders=orders, zo=zo)
        naive, model = (cost(shapes, workload.orders_of(towers), workload.zeroth, 128, 20).total for cost in (naive_cost, step_cost))
        return naive / (LIMIT * model)

    assert {orders: ratio(orders, "conservative") for orders in GOALS if ratio(orders, "conservative") < GOALS[orders]} == {}
    assert all(ratio(f"language_{layers}", "naive") >= 1.9 for layers in PLAN_LAYERS)
    assert all(ratio(f"dual_{layers}", "mozo") >= 1.4 for layers in ("hop_odd", "hop_even", "prefix", "suffix"))


def test_the_goals_of_evaluation_and_text_are_met():
    """1.25 times fewer FLOPs at 100 classes, 1.5 at 200 (2,048 images, the usual batches of 64); prompts alone six times fewer."""
    towers, batches = big_towers(), 32
    names = Workload(classes=200).class_names
    whole = towers.tokenizer([towers.config.prompt.format(name) for name in names])
    with without_numbers():
        images = flops(lambda: towers.features("vision", torch.zeros(64, 3, 224, 224, dtype=torch.uint8, device="meta")))
        usual, ours = (flops(lambda t=t: towers.features("language", t.to("meta"))) for t in (whole, towers.prompts(names)))
    assert usual >= 6 * ours
    for classes, limit in ((100, 1.25), (200, 1.5)):
        share = classes / 200
        assert batches * (images + share * usual) >= limit * (batches * images + share * ours)
