"""Projected gradients from loss differences along random directions (METHOD 2.3, 2.6; the paper's eq. 2).

A *candidate* is a set of offsets from the current values: a mapping from branch to a flat tensor `[n]`; the empty one is the base.
`evaluate(candidates)` returns the global mean loss of each, as floats; where the losses come from (one rank, many) is not known here.
"""

# n numbers of a branch

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from dist_vlcl.zo.noise import Key, NoiseField, Segment

Candidate = Mapping[str, Tensor]
Evaluate = Callable[[Sequence[Candidate]], list[float]]

DISTRIBUTIONS = ("gaussian", "rademacher", "unit")


class Flat(Protocol):
    """What a branch's zeroth-order parameters offer: their values, where each unit lies, and the names that their noise hangs on."""

    values_n: Tensor

    @property
    def slices(self) -> Mapping: ...

    def names(self) -> list[tuple[str, int]]: ...


@dataclass(frozen=True)
class Group:
    """What is perturbed together: a slice of each branch's flat values."""

    name: str
    slices: Mapping[str, slice]


def groups_of(flats: Mapping[str, Flat], granularity: str) -> list[Group]:
    """Return one group per branch (the default: one bit must not serve two branches, METHOD 2.6), per unit, or one for all."""
    whole = {branch: slice(0, flat.values_n.numel()) for branch, flat in flats.items()}
    if granularity == "joint":
        return [Group("+".join(whole), whole)] if whole else []
    if granularity == "unit":
        return [Group(str(unit), {branch: part}) for branch, flat in flats.items() for unit, part in flat.slices.items()]
    return [Group(branch, {branch: part}) for branch, part in whole.items()]


class Directions:
    """Random directions over flat values, redrawn from a key whenever asked: never stored, never sent."""

    def __init__(self, flats: Mapping[str, Flat], law: str):
        self.law = law
        self.fields = {b: NoiseField([Segment(n, 0, k) for n, k in flat.names()], flat.values_n.device) for b, flat in flats.items()}

    def draw(self, branch: str, key: Key, probe: int) -> Tensor:
        """Return direction number `probe` of a branch `[n]`: normals, signs, or normals scaled to length 1 per tensor (DeepZero)."""
        field = self.fields[branch]
        if self.law == "rademacher":
            return field.signs(key, probe)
        z = field.normals(key, probe)
        if self.law == "unit":
            z = torch.cat([part / part.norm() for part in z.split([s.stop - s.start for s in field.segments])])
        return z


@dataclass(frozen=True)
class Estimate:
    """The projected gradients of one group: per branch, one scalar per probe. With the key, it is the whole gradient estimate."""

    group: Group
    projected_gradient: Mapping[str, tuple[float, ...]]


@dataclass(frozen=True)
class FiniteDifference:
    """One-sided (L(theta + eps z) - L(theta)) / eps or two-sided (L(theta + eps z) - L(theta - eps z)) / (2 eps), per direction z."""

    epsilon: Mapping[str, float]
    sides: int = 1
    probes: int = 1
    clip: float | None = None

    def candidates(self, groups: Sequence[Group], directions: Mapping[tuple[str, int], Tensor]) -> list[Candidate]:
        """Return the perturbed candidates, group by group, probe by probe, side by side."""
        return [
            {branch: only(directions[branch, probe] * (sign * self.epsilon[branch]), part) for branch, part in group.slices.items()}
            for group in groups
            for probe in range(self.probes)
            for sign in ((1,) if self.sides == 1 else (1, -1))
        ]

    def estimates(self, groups: Sequence[Group], base: float, losses: Sequence[float]) -> list[Estimate]:
        """Return the estimate of each group from the losses of `candidates`, in the same order."""
        remaining = iter(losses)
        result = []
        for group in groups:
            differences = [
                next(remaining) - base if self.sides == 1 else (next(remaining) - next(remaining)) / 2 for _ in range(self.probes)
            ]
            slopes = {b: tuple(self._clipped(d / self.epsilon[b]) for d in differences) for b in group.slices}
            result.append(Estimate(group, slopes))
        return result

    def _clipped(self, slope: float) -> float:
        return slope if self.clip is None else max(-self.clip, min(self.clip, slope))


def only(offset_n: Tensor, part: slice) -> Tensor:
    """Return the offset with everything outside of `part` set to zero."""
    if part.stop - part.start == offset_n.numel():
        return offset_n
    result = torch.zeros_like(offset_n)
    result[part] = offset_n[part]
    return result
