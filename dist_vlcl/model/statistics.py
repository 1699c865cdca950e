"""Per step and unit: the size of its gradient, of its update and of its parameters (METHOD 2.11)."""

# U units, n numbers of a unit

from collections.abc import Sequence

import torch
from torch import Tensor

from dist_vlcl.model.units import BRANCHES, UnitId, Units

FIGURES = ("gradient_norm", "gradient_mean", "gradient_variance", "update_norm", "parameter_norm")


class UnitStatistics:
    """Watches one step: made before anything moves, told the gradients, asked when all has moved.

    A few large operations a branch, whose units are all of one size; no figure leaves the device before it is asked for.
    """

    def __init__(self, units: Units):
        self.units = units
        self.ids = [ids for branch in BRANCHES if (ids := [id for id in units if id.branch == branch])]
        self.before = [self._values(ids) for ids in self.ids]
        self.gradients: dict[UnitId, Tensor] = {}

    def observe(self, ids: Sequence[UnitId], gradient: Tensor) -> None:
        """Take the gradients of some units of one branch, one after another in a flat tensor; a later one replaces an earlier one."""
        gradient_Un = gradient.view(len(ids), -1)
        norm_U, mean_U = torch.linalg.vector_norm(gradient_Un, dim=1), gradient_Un.mean(1)
        variance_U = (norm_U.square() / gradient_Un.shape[1] - mean_U.square()).clamp_min(0)
        self.gradients |= zip(ids, torch.stack([norm_U, mean_U, variance_U], 1).unbind(), strict=True)

    def figures(self) -> Tensor:
        """Return FIGURES of every unit, in the units' order `[U, 5]`, fp32; NaN for the gradient of a unit that has none."""
        moved = []
        for ids, before_Un in zip(self.ids, self.before, strict=True):
            after_Un = self._values(ids)
            moved.append(torch.stack([torch.linalg.vector_norm(x, dim=1) for x in (after_Un - before_Un, after_Un)], 1))
        unknown = torch.full((3,), torch.nan, device=moved[0].device)
        gradients_U3 = torch.stack([self.gradients.get(id, unknown).float() for id in self.units])
        return torch.cat([gradients_U3, torch.cat(moved).float()], 1)

    def _values(self, ids: Sequence[UnitId]) -> Tensor:
        """Return the parameters of some units as rows `[U, n]`, a copy."""
        tensors = [t.detach().flatten() for id in ids for t in self.units[id].tensors().values()]
        return torch.cat(tensors).view(len(ids), -1)
