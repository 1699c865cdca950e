"""Projected gradients from loss differences along random directions (concepts.md 2.1 and 2.6; the paper's equation 2).

A *candidate* maps a branch to an offset `[n]` from the current values. The empty candidate is the base.
`evaluate(candidates)` returns the mean loss of each candidate over the global batch. It takes the candidates one after another, so that
hundreds of them need not be in memory together. This module does not know how many ranks there are.
"""

# n parameters of a branch

import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dist_vlcl.zo.flat import Flat, Group, restricted
from dist_vlcl.zo.noise import Key, NoiseField, direction_stream

Candidate = Mapping[str, Tensor]
Slopes = Mapping[str, tuple[float, ...]]  # the projected gradients of one group: per branch, one number per probe
Evaluate = Callable[[Iterable[Candidate]], list[float]]

DISTRIBUTIONS = ("gaussian", "rademacher")
TENSORS = ("all", "up")


def up_projections(flat: Flat) -> Tensor:
    """Return 1 for the elements of tensors that have `up` as a word of their name (`up_weight`, `k_up`), 0 elsewhere, on the CPU `[n]`.

    Raises ValueError if there is none.
    """
    mask_n = torch.cat([torch.full((n,), float("up" in name.rpartition("/")[-1].split("_"))) for name, n in flat.names()])
    if not mask_n.any():
        raise ValueError("zo.tensors=up: this adapter has no tensor with the word up in its name; use zo.tensors=all")
    return mask_n


class StepDirections:
    """The directions of one step, by (branch, probe). They are drawn when they are read; the last `cache_size` are kept."""

    def __init__(self, draw: Callable[[str, int], Tensor], cache_size: int):
        self._draw = functools.lru_cache(cache_size)(draw)

    def __getitem__(self, place: tuple[str, int]) -> Tensor:
        return self._draw(*place)


class Directions:
    """Random directions over flat values. They are drawn again from the key when needed, and never sent.

    probes: how many a step has. All of a step are kept if they fit in 128 MiB, because the estimate and every unit read the same ones.
    """

    def __init__(self, flats: Mapping[str, Flat], distribution: str, tensors: str = "all", probes: int = 1):
        self.distribution = distribution
        largest = max((flat.values_n.numel() for flat in flats.values()), default=1)
        self.cache_size = max(16, probes) if probes * largest <= 2**25 else 16
        self.fields = {b: NoiseField(flat.names(), flat.values_n.device) for b, flat in flats.items()}
        self.cpu_masks = {b: up_projections(flat) for b, flat in flats.items()} if tensors == "up" else {}
        self.masks = {b: mask_n.to(flats[b].values_n.device) for b, mask_n in self.cpu_masks.items()}

    def num_changed(self, group: Group) -> int:
        """Return how many parameters of a group the directions change."""
        return sum(int(self.cpu_masks[b][part].sum()) if self.cpu_masks else part.stop - part.start for b, part in group.slices.items())

    def draw(self, branch: str, key: Key, probe: int) -> Tensor:
        """Return direction number `probe` of a branch `[n]`, fp32: standard normals, or signs +-1 ("rademacher"); zero where masked."""
        field = self.fields[branch]
        stream = direction_stream(probe)
        direction_n = field.signs(key, stream) if self.distribution == "rademacher" else field.normals(key, stream)
        return direction_n * self.masks[branch] if self.masks else direction_n

    def of_step(self, key: Key) -> StepDirections:
        """Return the directions of a step."""
        return StepDirections(lambda branch, probe: self.draw(branch, key, probe), self.cache_size)


@dataclass(frozen=True)
class FiniteDifference:
    """One-sided (L(theta + eps z) - L(theta)) / eps, or two-sided (L(theta + eps z) - L(theta - eps z)) / (2 eps), per direction z."""

    epsilon: Mapping[str, float]
    sides: int = 1
    probes: int | Mapping[str, int] = 1
    clip: float | None = None

    def probes_of(self, group: Group) -> int:
        """Return the number of directions of a group. A joint group has both branches, with equal numbers."""
        return self.probes if isinstance(self.probes, int) else self.probes[next(iter(group.slices))]

    def candidates(self, groups: Sequence[Group], directions: StepDirections) -> Iterator[Candidate]:
        """Yield the perturbed candidates: for each group, for each probe, for each side."""
        for group in groups:
            for probe in range(self.probes_of(group)):
                for sign in (1,) if self.sides == 1 else (1, -1):
                    yield {b: restricted(directions[b, probe] * (sign * self.epsilon[b]), part) for b, part in group.slices.items()}

    def projected_gradients(self, groups: Sequence[Group], base: float, losses: Sequence[float]) -> list[Slopes]:
        """Return the slopes of each group. `losses` are those of `candidates`, in the same order; `base` is the unperturbed loss."""
        remaining, limit = iter(losses), math.inf if self.clip is None else self.clip
        result: list[Slopes] = []
        for group in groups:
            sides = ([next(remaining) for _ in range(self.sides)] for _ in range(self.probes_of(group)))
            differences = [(plus - (minus[0] if minus else base)) / self.sides for plus, *minus in sides]
            result.append({b: tuple(max(-limit, min(limit, d / self.epsilon[b])) for d in differences) for b in group.slices})
        return result
