"""Task-agnostic evaluation, exact over any number of ranks."""

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
    """Return counts `[P, C, 2]` of (correct, total) per true class when only the first `prefixes[p]` classes are to choose from.

    batches: this rank's part of the test samples, each once over all ranks. The prompts are encoded once. noise: a key where the
    baseline's router noise at evaluation is to be reproduced. Counts are integers, summed over ranks. All ranks call this.
    """
    device = world.device
    tokens = towers.prompts(class_names).to(device)
    rows = {"language": torch.arange(len(tokens), device=device)}
    text_CF = towers.features("language", tokens, noise and StepNoise(noise, rows))
    counts = torch.zeros(len(prefixes), len(class_names), 2, dtype=torch.int64)
    for batch in batches:
        if len(batch.labels) == 0:
            # A forward of a model in pieces is an exchange, which every rank must enter: a blank that does not count.
            blank = torch.zeros(1, 3, towers.image_size, towers.image_size, dtype=torch.uint8, device=device)
            with world.collectives("forward pass of an evaluation"):
                towers.features("vision", blank)
            continue
        step_noise = noise and StepNoise(Key(noise.seed, batch.index + 1), {"vision": batch.positions.to(device)})
        with world.collectives("forward pass of an evaluation"):
            image_BF = towers.features("vision", batch.images.to(device), step_noise)
        logits_BC = image_BF @ text_CF.T
        for p, num_classes in enumerate(prefixes):
            right = (logits_BC[:, :num_classes].argmax(1).cpu() == batch.labels).long()
            counts[p, :, 0].index_add_(0, batch.labels, right)
            counts[p, :, 1].index_add_(0, batch.labels, torch.ones_like(right))
    return world.sum(counts.flatten(), "counts of right answers").view(counts.shape)
