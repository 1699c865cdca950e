"""Per step and unit: norm, mean and variance of its gradient and of its update, and the norm of its parameters (concepts.md 2.11)."""

# U units, n parameters of a unit, F statistics

from collections.abc import Sequence

import torch
from torch import Tensor

from dist_vlcl.model.units import UnitId, Units
from dist_vlcl.options import BRANCHES

STATISTICS = ("gradient_norm", "gradient_mean", "gradient_variance", "update_norm", "update_mean", "update_variance", "parameter_norm")


class UnitStatistics:
    """Statistics of a step per unit. Call `begin` before the update, `observe` with the gradients, and `compute` after the update.

    The units of a branch have the same size, so each branch needs a few large operations. The memory is kept from step to step: with
    small adapters, new memory and many small tensors would take most of the time. Nothing leaves the device before `compute`.
    """

    def __init__(self, units: Units):
        self.units = units
        self.ids = {branch: ids for branch in BRANCHES if (ids := [id for id in units if id.branch == branch])}
        self.gradients: dict[UnitId, Tensor] = {}
        self._before_Un, self._after_Un = self._rows(), self._rows()

    def begin(self) -> None:
        """Keep the parameters of before the update."""
        self.gradients = {}
        self._gather_all(self._before_Un)

    def observe(self, ids: Sequence[UnitId], gradients: Sequence[Tensor]) -> None:
        """Take the gradients of some units of one branch: one unit after another, in parts of any size."""
        gradient_Un = self._after_Un[ids[0].branch][: len(ids)]
        _gather(gradients, gradient_Un)
        self.gradients |= zip(ids, _moments(gradient_Un).unbind(), strict=True)

    def compute(self) -> Tensor:
        """Return STATISTICS of every unit, in the units' order `[U, F]`, fp32. The gradient's are NaN for a unit without gradient."""
        self._gather_all(self._after_Un)
        moved = []
        for before_Un, after_Un in zip(self._before_Un.values(), self._after_Un.values(), strict=True):
            update_Un = torch.sub(after_Un, before_Un, out=before_Un)
            moved.append(torch.cat([_moments(update_Un), torch.linalg.vector_norm(after_Un, dim=1, keepdim=True)], 1))
        unknown = torch.full((3,), torch.nan, device=moved[0].device)
        gradients_U3 = torch.stack([self.gradients.get(id, unknown).float() for id in self.units])
        return torch.cat([gradients_U3, torch.cat(moved).float()], 1)

    def _tensors(self, branch: str) -> list[Tensor]:
        return [t for id in self.ids[branch] for t in self.units[id].tensors().values()]

    def _rows(self) -> dict[str, Tensor]:
        """Return memory for one row per unit `[U, n]`, by branch."""
        return {branch: self._tensors(branch)[0].new_empty(len(ids), self.units[ids[0]].numel) for branch, ids in self.ids.items()}

    def _gather_all(self, rows: dict[str, Tensor]) -> None:
        for branch in self.ids:
            _gather(self._tensors(branch), rows[branch])


def _moments(values_Un: Tensor) -> Tensor:
    """Return norm, mean and variance of each row `[U, 3]`."""
    norm_U, mean_U = torch.linalg.vector_norm(values_Un, dim=1), values_Un.mean(1)
    return torch.stack([norm_U, mean_U, (norm_U.square() / values_Un.shape[1] - mean_U.square()).clamp_min(0)], 1)


@torch.no_grad()
def _gather(tensors: Sequence[Tensor], out: Tensor) -> None:
    torch.cat([tensor.view(-1) for tensor in tensors], out=out.view(-1))
