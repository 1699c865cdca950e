"""What back-propagation keeps, counted at ViT-B/16's size, and what a step has alive at its peak."""

import pytest
import torch

from benchmarks.count import PeakBytes, saved_bytes, without_numbers
from benchmarks.memory import peak_bytes, saved_per_sample
from benchmarks.setup import Workload
from dist_vlcl.dist.world import World
from dist_vlcl.zo.noise import Key


def test_an_image_keeps_at_most_70_mb_and_with_checkpoints_a_tenth():
    options = ({}, {"precision": "bf16"}, {"naive": True}, {"checkpoint": True})
    kept, in_bf16, naive, recomputed = (saved_per_sample("vision", **option) for option in options)
    assert 50e6 < kept <= 70e6
    assert 25e6 < in_bf16 <= 36e6
    assert 120e6 < naive < 170e6
    assert recomputed < 0.2 * kept


def test_a_prompt_keeps_a_tenth_of_what_77_tokens_do():
    assert saved_per_sample("language") * 10 < saved_per_sample("language", naive=True)


@pytest.mark.parametrize(
    ("orders", "precision", "checkpoint", "limit"),
    [
        ("dual_all", "fp32", False, 1.2e9),
        ("vision_all", "fp32", False, 1.6e9),
        ("first", "bf16", False, 4e9),
        ("first", "bf16", True, 1.2e9),
        ("language_all", "bf16", False, 4e9),
        ("language_all", "bf16", True, 1.2e9),
    ],
)
def test_a_step_s_peak(orders, precision, checkpoint, limit):
    """At 64 images and 125 classes, with the weights."""
    assert peak_bytes(Workload(orders=orders, precision=precision, checkpoint=checkpoint, images=64, classes=125)) < limit


def test_checkpoints_change_no_bit():
    results = []
    for checkpoint in (False, True):
        workload = Workload(model="small", images=8, classes=3, checkpoint=checkpoint)
        step = workload.step(workload.towers("cpu"), World.alone())
        for k in range(2):
            step([workload.batch(step.towers.image_size)], Key(1, k), 1e-3)
        results.append(step.state_dict())
    assert all(torch.equal(tensor, results[1][name]) for name, tensor in results[0].items())


def test_saved_bytes_counts_a_storage_once_and_weights_not():
    weight, x = torch.randn(4, 4, requires_grad=True), torch.randn(4, 4, requires_grad=True)
    assert saved_bytes(lambda: (x @ weight) * (x @ weight)) == 4 * 64
    assert saved_bytes(lambda: x @ weight, besides=[weight]) == 64


def test_peak_bytes_sees_what_is_alive_together():
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
