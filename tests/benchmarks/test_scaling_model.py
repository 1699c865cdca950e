"""Claims about the scaling model: it repeats what was measured, and its parts add up."""

from functools import cache

import pytest

from benchmarks.common import Workload
from benchmarks.cost_model import step_cost
from tools.links import PLANS
from tools.scaling_model import NETWORKS, Plan, Rank, all_reduce_s, best_groups, efficiency, losses_s, step_s

GRADIENTS = 16_109_568  # bytes of ViT-B/16's adapters
DUAL, FIRST = (lambda **more: Plan.of("ViT-B/16", "dual zeroth order", **more)), (lambda: Plan.of("ViT-B/16", "first order"))


@cache
def plan_of(name: str) -> Plan:
    return Plan.of_workload(Workload(tuple(f"model=vit_b16 model.pretrained=random {PLANS[name]}".split()), classes=20))


@pytest.mark.parametrize(
    ("network", "ranks", "size", "measured"),
    [
        ("WAN 100 Mbit/s", 2, 40, 0.082),
        ("WAN 100 Mbit/s", 2, GRADIENTS, 1.74),
        ("WAN 100 Mbit/s", 2, GRADIENTS // 2, 0.917),
        ("WAN 100 Mbit/s", 4, 40, 0.217),
        ("WAN 100 Mbit/s", 4, GRADIENTS, 2.95),
        ("WAN 100 Mbit/s", 4, GRADIENTS // 2, 1.64),
        ("WAN 10 Mbit/s", 2, 40, 0.404),
        ("WAN 10 Mbit/s", 2, GRADIENTS, 15.8),
        ("WAN 10 Mbit/s", 2, GRADIENTS // 2, 8.05),
    ],
)
def test_the_model_is_within_a_fifth_of_gloo_between_shaped_hosts(network, ranks, size, measured):
    """Measured with --measure between namespaces on 2026-11-28."""
    assert all_reduce_s(NETWORKS[network], ranks, size, "gloo") == pytest.approx(measured, rel=0.2)


@pytest.mark.parametrize(
    ("plan", "network", "ranks", "measured"),
    [
        ("dual MoZO", "Ethernet 1 Gbit/s", 2, 0.247),
        ("dual MoZO", "WAN 100 Mbit/s", 2, 0.284),
        ("dual MoZO", "WAN 10 Mbit/s", 4, 0.444),
        ("dual MoZO", "WAN 10 Mbit/s", 8, 0.452),
        ("dual conservative", "WAN 100 Mbit/s", 2, 0.538),
        ("dual conservative", "WAN 10 Mbit/s", 2, 0.861),
        ("dual conservative", "WAN 10 Mbit/s", 8, 0.863),
        ("hop_odd MoZO", "Ethernet 1 Gbit/s", 2, 0.374),
        ("hop_odd MoZO", "WAN 10 Mbit/s", 2, 8.21),
        ("hop_odd MoZO", "WAN 100 Mbit/s", 4, 1.47),
        ("hop_odd MoZO bf16", "WAN 10 Mbit/s", 2, 4.47),
        ("hop_odd MoZO powersgd", "WAN 100 Mbit/s", 2, 0.545),
        ("hop_odd MoZO powersgd", "WAN 10 Mbit/s", 2, 1.85),
        ("first", "Ethernet 1 Gbit/s", 2, 0.418),
        ("first", "WAN 100 Mbit/s", 2, 2.03),
        ("first", "WAN 10 Mbit/s", 2, 15.6),
        ("first", "WAN 10 Mbit/s", 4, 22.1),
        ("first bf16", "WAN 10 Mbit/s", 2, 8.08),
        ("first powersgd", "WAN 10 Mbit/s", 2, 2.30),
    ],
)
def test_the_model_is_within_a_fifth_of_whole_steps_over_slow_links(plan, network, ranks, measured):
    """Measured by tools/links.py on 2026-11-29."""
    assert step_s(plan_of(plan), ranks, 128 * ranks, NETWORKS[network], backend="gloo") == pytest.approx(measured, rel=0.2)


@pytest.mark.parametrize(
    ("network", "ranks", "measured"), [("WAN 100 Mbit/s", 2, 0.0425), ("WAN 100 Mbit/s", 4, 0.0425), ("WAN 10 Mbit/s", 20, 0.229)]
)
def test_losses_take_one_round_trip_for_any_number_of_ranks(network, ranks, measured):
    assert losses_s(NETWORKS[network], ranks, 48, "gloo") == pytest.approx(measured, rel=0.2)


def test_one_rank_takes_the_cost_model_s_flops_and_sends_nothing():
    plan, rank = DUAL(), Rank(1e12, 0.5)
    flops = step_cost(plan.shapes, plan.orders, plan.zo, 128, plan.classes)
    assert step_s(plan, 1, 128, NETWORKS["WAN 10 Mbit/s"], rank) == pytest.approx(0.5 + flops / 1e12)


def test_gradients_are_hidden_behind_the_candidates_only_in_a_hybrid():
    network, images = NETWORKS["Ethernet 10 Gbit/s"], 128
    assert efficiency(Plan.of("ViT-B/16", "hybrid hop_odd"), 64, images, network, strong=False) > 0.99
    assert efficiency(FIRST(), 64, images, network, strong=False) < 0.95


def test_ranks_with_few_images_share_the_text_of_first_order_language():
    """4 images and 20 classes: alone the text is a ninth of a step, on 16 ranks a hundredth, and two exchanges of 40 kB come on top."""
    rank, network = Rank(1e12, 0.0), NETWORKS["NVLink"]
    shared, whole = step_s(FIRST(), 16, 64, network, rank), step_s(FIRST(), 1, 4, network, rank)
    assert 1.09 < whole / shared < 1.13
    assert FIRST().text_bytes == 20 * 512 * 4 and not DUAL().can_share_text


def test_the_defaults_are_a_first_order_step_on_an_h100():
    assert step_s(FIRST(), 1, 128, NETWORKS["NVLink"]) == pytest.approx(0.251, rel=0.02)  # docs/performance.md


def test_direction_groups_pay_only_where_a_rank_has_few_samples():
    plan = DUAL(probes=16)
    assert best_groups(plan, 4, 4096, NETWORKS["InfiniBand 400 Gbit/s"]) == 1
    groups = best_groups(plan, 256, 128, NETWORKS["InfiniBand 400 Gbit/s"])
    assert groups > 1 and 256 % groups == 0
