"""From a gradient estimate to the direction of the update (METHOD 2.6, 2.8)."""

# n numbers of a branch

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

TRANSFORMS = ("identity", "sign", "sign_scalar")


def gradient(slopes: Sequence[float], directions: Sequence[Tensor], transform: str) -> Tensor:
    """Return the transformed estimate `[n]`: mean_q s_q z_q, its element-wise sign (eq. 3, 4), or ZO-LLM's mean_q sign(s_q) z_q."""
    if transform == "sign_scalar":
        slopes = [(s > 0) - (s < 0) for s in slopes]
    mean_n = sum((z * (s / len(slopes)) for s, z in zip(slopes, directions, strict=True)), torch.zeros_like(directions[0]))
    return mean_n.sign() if transform == "sign" else mean_n


class Adam:
    """Adam's direction of a stream of estimates, one moment pair per branch: the option zo.optimizer=adam (METHOD 2.8)."""

    def __init__(self, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8):
        self.betas, self.eps = betas, eps
        self.moments: dict[str, tuple[Tensor, Tensor]] = {}
        self.steps = 0

    def __call__(self, gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the direction per branch and advance the moments."""
        self.steps += 1
        return {branch: self._direction(branch, g) for branch, g in gradients.items()}

    def _direction(self, branch: str, g: Tensor) -> Tensor:
        first, second = self.moments.setdefault(branch, (torch.zeros_like(g), torch.zeros_like(g)))
        first.lerp_(g, 1 - self.betas[0])
        second.mul_(self.betas[1]).addcmul_(g, g, value=1 - self.betas[1])
        corrected = [m / (1 - beta**self.steps) for m, beta in zip((first, second), self.betas, strict=True)]
        return corrected[0] / (corrected[1].sqrt() + self.eps)

    def state_dict(self) -> dict[str, Tensor]:
        state = {f"{branch}/{k}": m for branch, pair in self.moments.items() for k, m in enumerate(pair)}
        return {**state, "steps": torch.tensor(self.steps)}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self.steps = int(state["steps"])
        branches = {name.split("/")[0] for name in state if name != "steps"}
        self.moments = {b: (state[f"{b}/0"].clone(), state[f"{b}/1"].clone()) for b in sorted(branches)}
