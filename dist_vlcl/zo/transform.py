"""From a gradient estimate to the direction of the update (METHOD 2.6, 2.8)."""

# n numbers of a branch

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

TRANSFORMS = ("identity", "sign", "sign_scalar")


def gradient(slopes: Sequence[float], directions: Sequence[Tensor]) -> Tensor:
    """Return the estimate `[n]`: mean_q s_q z_q."""
    return functools.reduce(torch.add, (z * (s / len(slopes)) for s, z in zip(slopes, directions, strict=True)))


def transformed(gradient_n: Tensor, slopes: Sequence[float], directions: Sequence[Tensor], transform: str) -> Tensor:
    """Return an estimate itself, its element-wise sign (eq. 3, 4), or ZO-LLM's mean_q sign(s_q) z_q, made from its slopes again."""
    if transform == "sign_scalar":
        return gradient([(s > 0) - (s < 0) for s in slopes], directions)
    return gradient_n.sign() if transform == "sign" else gradient_n


@dataclass(frozen=True)
class Moments:
    """Adam's averages of a branch's estimates `[n]` and of their squares, after some steps."""

    first_n: Tensor
    second_n: Tensor
    steps: int


class Adam:
    """Adam's direction of a stream of estimates, with moments per branch: the option zo.optimizer=adam (METHOD 2.8).

    A call proposes; the moments advance with `commit`, so that a step that is skipped leaves no trace.
    """

    def __init__(self, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8):
        self.betas, self.eps = betas, eps
        self.moments: dict[str, Moments] = {}
        self._proposed: dict[str, Moments] = {}

    def __call__(self, gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the direction per branch."""
        self._proposed = {branch: self._advanced(branch, g) for branch, g in gradients.items()}
        return {branch: self._direction(m) for branch, m in self._proposed.items()}

    def commit(self) -> None:
        """Keep the moments of the latest call."""
        self.moments |= self._proposed
        self._proposed = {}

    def _advanced(self, branch: str, g: Tensor) -> Moments:
        old = self.moments.get(branch) or Moments(torch.zeros_like(g), torch.zeros_like(g), 0)
        old = Moments(old.first_n.to(g.device), old.second_n.to(g.device), old.steps)  # a checkpoint's are on the CPU
        return Moments(torch.lerp(old.first_n, g, 1 - self.betas[0]), torch.lerp(old.second_n, g * g, 1 - self.betas[1]), old.steps + 1)

    def _direction(self, m: Moments) -> Tensor:
        first, second = (t / (1 - beta**m.steps) for t, beta in zip((m.first_n, m.second_n), self.betas, strict=True))
        return first / (second.sqrt() + self.eps)
