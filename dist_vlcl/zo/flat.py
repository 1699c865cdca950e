"""The zeroth-order parameters of a branch as one flat tensor, and the groups that are perturbed together."""

# n parameters of a branch

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor


class Flat(Protocol):
    """The zeroth-order parameters of one branch. `model.units` has those of a model and those of a checkpoint."""

    values_n: Tensor
    slices: dict[Any, slice]  # the place of each unit in `values_n`

    def names(self) -> list[tuple[str, int]]:
        """Return (name, number of elements) of each tensor in flat order. The noise of a tensor depends on its name."""


@dataclass(frozen=True)
class Group:
    """Parameters that are perturbed together: a slice of the flat values of one branch, or of each branch."""

    name: str
    slices: Mapping[str, slice]


def groups_of(flats: Mapping[str, Flat], granularity: str) -> list[Group]:
    """Return one group per branch, one per unit, or one for all ("joint").

    The default is per branch: with sign steps, one group for all would give both branches a single bit (concepts.md 2.6).
    """
    whole = {branch: slice(0, flat.values_n.numel()) for branch, flat in flats.items()}
    if granularity == "joint":
        return [Group("+".join(whole), whole)] if whole else []
    if granularity == "unit":
        return [Group(str(unit), {branch: part}) for branch, flat in flats.items() for unit, part in flat.slices.items()]
    return [Group(branch, {branch: part}) for branch, part in whole.items()]


def restricted(offset_n: Tensor, part: slice) -> Tensor:
    """Return the offset with zeros outside `part`. Do not change it in place: evaluation reads only its attribute `part`."""
    if part.stop - part.start == offset_n.numel():
        return offset_n
    result = torch.zeros_like(offset_n)
    result[part] = offset_n[part]
    result.part = part  # type: ignore[attr-defined]
    return result
