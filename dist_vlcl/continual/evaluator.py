"""Task-agnostic evaluation, exact for any number of ranks."""

# B samples of this rank, C classes, F features, P prefixes

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from dist_vlcl.dist.world import World
from dist_vlcl.model.clip import TwoTowers
from dist_vlcl.zo.noise import Key, StepNoise


@torch.no_grad()
def count_correct(
    towers: TwoTowers, batches: Iterable[Any], class_names: Sequence[str], prefixes: Sequence[int], world: World, noise: Key | None = None
) -> Tensor:
    """Return (correct, total) per true class, int64 `[P, C, 2]`, if only the first `prefixes[p]` classes can be predicted.

    The `batches` are this rank's part of the test samples, on the device. Over all ranks each sample occurs once. The prompts are encoded
    once. With a key as `noise`, router noise is drawn as the baseline does (concepts.md 1.4), but only once for the text. The counts are
    integers and are summed over ranks. All ranks call this.
    """
    tokens = towers.prompts(class_names).to(world.device)
    text_CF = towers.features("language", tokens, noise and StepNoise(noise, {"language": torch.arange(len(tokens), device=world.device)}))
    counts = torch.zeros(len(prefixes), len(class_names), 2, dtype=torch.int64, device=world.device)
    for batch in batches:
        images, image_noise = batch.images, noise and StepNoise(Key(noise.seed, batch.index + 1), {"vision": batch.positions})
        if len(batch.labels) == 0:
            # Under ZeRO-3 a forward pass contains collectives, so a rank without samples joins with a blank image that does not count.
            images, image_noise = torch.zeros(1, 3, towers.image_size, towers.image_size, dtype=torch.uint8, device=world.device), None
        with world.collectives("forward pass of an evaluation"):
            image_BF = towers.features("vision", images, image_noise)[: len(batch.labels)]
        logits_BC = image_BF @ text_CF.T
        for p, num_classes in enumerate(prefixes):
            right = (logits_BC[:, :num_classes].argmax(1) == batch.labels).long()
            counts[p, :, 0].index_add_(0, batch.labels, right)
            counts[p, :, 1].index_add_(0, batch.labels, torch.ones_like(right))
    return world.sum_exact(counts.flatten(), "counts of correct answers").view(counts.shape).cpu()
