"""Per step and unit: norm, mean and variance of its gradient and of its update, and the norm of its parameters (METHOD 2.11)."""

# U units of a branch, n numbers of a unit, F figures

from collections.abc import Sequence

import torch
from torch import Tensor

from dist_vlcl.model.units import BRANCHES, UnitId, Units

STATISTICS = ("gradient_norm", "gradient_mean", "gradient_variance", "update_norm", "update_mean", "update_variance", "parameter_norm")


class UnitStatistics:
    """Watches one step after another: made before anything moves, told each step's gradients, asked for its figures when all has moved.

    A few large operations a branch, whose units are all of one size, into memory that is kept: with small adapters, what takes time is
    fresh memory and many small tensors. No figure leaves the device before it is asked for.
    """

    def __init__(self, units: Units):
        self.units = units
        self.ids = {branch: ids for branch in BRANCHES if (ids := [id for id in units if id.branch == branch])}
        self.tensors = {branch: [t for id in ids for t in units[id].tensors().values()] for branch, ids in self.ids.items()}
        self.gradients: dict[UnitId, Tensor] = {}
        self._before_Un, self._after_Un = self._rows(), self._rows()
        self._gather_all(self._before_Un)

    def observe(self, ids: Sequence[UnitId], gradients: Sequence[Tensor], scale: float = 1.0) -> None:
        """Take the gradients, times `scale`, of some units of one branch, one after another in pieces of any size; a later one counts."""
        gradient_Un = self._after_Un[ids[0].branch][: len(ids)]
        _gather(gradients, gradient_Un)
        self.gradients |= zip(ids, (_moments(gradient_Un) * gradient_Un.new_tensor([scale, scale, scale**2])).unbind(), strict=True)

    def compute(self) -> Tensor:
        """Return STATISTICS of every unit, in the units' order `[U, F]`, F of them, fp32; NaN for the gradient of a unit that has none.

        The parameters are then those before the next step.
        """
        self._gather_all(self._after_Un)
        moved = []
        for before_Un, after_Un in zip(self._before_Un.values(), self._after_Un.values(), strict=True):
            update_Un = torch.sub(after_Un, before_Un, out=before_Un)
            moved.append(torch.cat([_moments(update_Un), torch.linalg.vector_norm(after_Un, dim=1, keepdim=True)], 1))
        self._before_Un, self._after_Un = self._after_Un, self._before_Un
        unknown = torch.full((3,), torch.nan, device=moved[0].device)
        gradients, self.gradients = self.gradients, {}
        return torch.cat([torch.stack([gradients.get(id, unknown).float() for id in self.units]), torch.cat(moved).float()], 1)

    def _rows(self) -> dict[str, Tensor]:
        """Return memory for a row a unit, by branch."""
        return {branch: self.tensors[branch][0].new_empty(len(ids), self.units[ids[0]].numel) for branch, ids in self.ids.items()}

    def _gather_all(self, rows: dict[str, Tensor]) -> None:
        for branch, tensors in self.tensors.items():
            _gather(tensors, rows[branch])


def _moments(values_Un: Tensor) -> Tensor:
    """Return norm, mean and variance of each row `[U, 3]`."""
    norm_U, mean_U = torch.linalg.vector_norm(values_Un, dim=1), values_Un.mean(1)
    return torch.stack([norm_U, mean_U, (norm_U.square() / values_Un.shape[1] - mean_U.square()).clamp_min(0)], 1)


@torch.no_grad()
def _gather(tensors: Sequence[Tensor], out: Tensor) -> None:
    torch.cat([tensor.view(-1) for tensor in tensors], out=out.view(-1))
