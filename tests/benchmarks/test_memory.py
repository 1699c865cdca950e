"""Bytes that back-propagation saves and bytes that are alive at the peak, counted at ViT-B/16's size without numbers."""

import pytest
import torch

from benchmarks.common import PeakBytes, Workload, saved_bytes, without_numbers
from benchmarks.memory import peak_bytes, saved_per_sample
from dist_vlcl.dist.world import World
from dist_vlcl.zo.noise import Key


def test_an_image_saves_at_most_70_mb_and_with_checkpoints_a_fifth():
    options = ((), ("model.precision=bf16",), ("model.checkpoint=true",))
    fp32, bf16, checkpoints = (saved_per_sample("vision", Workload(option)) for option in options)
    naive = saved_per_sample("vision", Workload(), naive=True)
    assert 50e6 < fp32 <= 70e6
    assert 25e6 < bf16 <= 36e6
    assert 120e6 < naive < 170e6
    assert checkpoints < 0.2 * fp32


def test_a_prompt_saves_a_tenth_of_what_the_naive_step_saves():
    assert saved_per_sample("language", Workload()) * 10 < saved_per_sample("language", Workload(), naive=True)


@pytest.mark.parametrize(
    ("options", "limit"),
    [
        (("orders=dual_all", "zo=mozo"), 1.2e9),
        (("orders=vision_all", "zo=mozo"), 1.6e9),
        (("orders=first", "model.precision=bf16"), 4e9),
        (("orders=first", "model.precision=bf16", "model.checkpoint=true"), 1.2e9),
    ],
)
def test_the_peak_of_a_step_is_below_its_goal(options, limit):
    """At 64 images and 125 classes, weights included."""
    assert peak_bytes(Workload(options, images=64, classes=125)) < limit


def test_checkpoints_change_no_bit():
    states = []
    for checkpoint in ("false", "true"):
        workload = Workload(("model=small", f"model.checkpoint={checkpoint}"), images=8, classes=3)
        step = workload.step(workload.towers("cpu"), World.alone())
        for number in range(2):
            step([workload.batch(step.towers)], Key(1, number), 1e-3)
        states.append(step.state_dict())
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())


def test_saved_bytes_counts_a_storage_once_and_leaves_out_weights():
    weight, x = torch.randn(4, 4, requires_grad=True), torch.randn(4, 4, requires_grad=True)
    assert saved_bytes(lambda: (x @ weight) * (x @ weight)) == 4 * 64
    assert saved_bytes(lambda: x @ weight, besides=[weight]) == 64


def test_peak_bytes_is_what_is_alive_at_the_same_time():
    with PeakBytes() as memory:
        a = torch.zeros(1000)
        b = a + 1
        del a
        c = b + 1
        del b, c
    assert (memory.peak, memory.alive) == (8000, 0)
    with without_numbers(), PeakBytes() as memory:
        torch.zeros(1000, device="meta")
    assert memory.peak == 4000
