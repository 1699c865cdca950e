"""Counts against a direct computation with open_clip's own code."""

import dataclasses
import itertools

import torch

from dist_vlcl.continual.evaluator import count_correct
from dist_vlcl.dist.world import World
from dist_vlcl.model.moe import MoEConfig
from dist_vlcl.zo.noise import Key, StepNoise
from tests.helpers.tiny_clip import NAMES, WholeCLIP, adapter_values, batch_of, tiny_clip

N, CUTS = 60, [0, 25, 25, 60]  # one batch is empty


def batches():
    """Return the parts of 60 images, the middle one empty, as a rank might read them."""
    whole = batch_of(N)
    return [
        dataclasses.replace(
            whole, index=k, **{field: getattr(whole, field)[a:b] for field in ("images", "labels", "positions", "samples")}, count=b - a
        )
        for k, (a, b) in enumerate(itertools.pairwise(CUTS))
    ]


def directly(towers, prefix, noise_of_batch=None):
    """Return [(correct, total)] per class, image by image, choosing among the first `prefix` classes only."""
    whole = WholeCLIP(towers.vision.blocks[0].adapter.config, double=True)
    whole.training = False
    values = adapter_values(towers)
    text_CF = whole.features("language", NAMES, values, noise_of_batch and noise_of_batch(None))
    counts = [[0, 0] for _ in NAMES]
    for batch in batches():
        image_BF = whole.features("vision", batch.images, values, noise_of_batch and noise_of_batch(batch)) if len(batch.labels) else []
        for image_F, label in zip(image_BF, batch.labels.tolist(), strict=True):
            similarity = [float(image_F @ text_F) for text_F in text_CF[:prefix]]
            counts[label][0] += similarity.index(max(similarity)) == label
            counts[label][1] += 1
    return counts


def test_counts_are_those_of_a_direct_computation_for_every_prefix():
    towers = tiny_clip(double=True)
    counts = count_correct(towers, batches(), NAMES, [1, 2, 5], World.alone())
    assert counts.dtype == torch.int64
    assert counts.tolist() == [directly(towers, prefix) for prefix in (1, 2, 5)]
    assert 0 < counts[2, :, 0].sum() < N


def test_fewer_classes_to_choose_from_are_never_harder_and_later_ones_are_never_right():
    counts = count_correct(tiny_clip(), batches(), NAMES, [1, 2, 5], World.alone())
    assert (counts[0, 0, 0], counts[:2, 2:, 0].sum()) == (counts[0, 0, 1], 0)
    assert (counts[1, :2, 0] >= counts[2, :2, 0]).all()
    assert torch.equal(counts[0, :, 1], counts[2, :, 1]) and counts[0, :, 1].sum() == N


def test_batching_does_not_matter():
    towers = tiny_clip()
    one, many = (count_correct(towers, parts, NAMES, [5], World.alone()) for parts in ([batch_of(N)], batches()))
    assert torch.equal(one, many)


def test_router_noise_at_evaluation_is_a_function_of_the_key():
    towers = tiny_clip(adapter=MoEConfig(bottleneck=4, noise_at_eval=True), double=True)
    key = Key(3, 0)

    def noise_of(batch):
        if batch is None:
            return StepNoise(key, {"language": torch.arange(len(NAMES))})
        return StepNoise(Key(3, batch.index + 1), {"vision": batch.positions})

    noisy = count_correct(towers, batches(), NAMES, [5], World.alone(), key)
    assert noisy[0].tolist() == directly(towers, 5, noise_of)
    assert torch.equal(noisy, count_correct(towers, batches(), NAMES, [5], World.alone(), key))
