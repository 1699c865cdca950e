"""Loss functions with known answers over flat parameters, and a flat of two branches to move in."""

# n numbers of a branch

import functools
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from dist_vlcl.zo.difference import Candidate

SIZES = {"language": [("language.1/a", 3), ("language.3/a", 2)], "vision": [("vision.1/a", 4), ("vision.1/b", 1), ("vision.2/a", 3)]}


class TinyFlat:
    """Float64 values of a branch with units of one or two tensors each."""

    def __init__(self, branch: str, values_n: Tensor):
        self.branch, self.values_n = branch, values_n

    def names(self) -> list[tuple[str, int]]:
        return SIZES[self.branch]

    @property
    def slices(self) -> Mapping:
        result: dict[str, slice] = {}
        stop = 0
        for name, n in self.names():
            unit = name.split("/")[0]
            result[unit] = slice(result[unit].start if unit in result else stop, stop + n)
            stop += n
        return result


def two_branches(seed: int = 0) -> dict[str, TinyFlat]:
    generator = torch.Generator().manual_seed(seed)
    sizes = {branch: sum(n for _, n in names) for branch, names in SIZES.items()}
    return {branch: TinyFlat(branch, torch.randn(n, generator=generator, dtype=torch.float64)) for branch, n in sizes.items()}


class Problem:
    """A loss of the two branches' values; counts the losses asked for, and can be told to fail at one of them."""

    def __init__(self, flats: Mapping[str, TinyFlat], loss: Callable[[Tensor], Tensor]):
        self.flats, self.loss = flats, loss
        self.asked: list[Candidate] = []
        self.seen: list[float] = []
        self.fail_at: dict[int, float] = {}

    def at(self, offsets: Candidate) -> Tensor:
        """Return both branches' values, moved `[n]`."""
        return torch.cat([flat.values_n + offsets.get(branch, 0) for branch, flat in self.flats.items()])

    def __call__(self, candidates: Sequence[Candidate]) -> list[float]:
        losses = []
        for candidate in candidates:
            losses.append(self.fail_at.get(len(self.asked), float(self.loss(self.at(candidate)))))
            self.asked.append(candidate)
        self.seen += losses
        return losses

    def gradient(self) -> dict[str, Tensor]:
        """Return the true gradient per branch, by autograd."""
        values = self.at({}).requires_grad_()
        (g,) = torch.autograd.grad(self.loss(values), values)
        return dict(zip(self.flats, g.split([f.values_n.numel() for f in self.flats.values()]), strict=True))


@functools.lru_cache
def matrix(n: int = 13) -> Tensor:
    """Return a symmetric matrix with eigenvalues 0.5 to 2, coupling all numbers."""
    q, _ = torch.linalg.qr(torch.randn(n, n, generator=torch.Generator().manual_seed(5), dtype=torch.float64))
    return q @ torch.diag(torch.linspace(0.5, 2, n, dtype=torch.float64)) @ q.T


def quadratic(x_n: Tensor) -> Tensor:
    """x A x / 2 + sum x: the one-sided error is eps z A z / 2, the two-sided one 0."""
    return x_n @ matrix() @ x_n / 2 + x_n.sum()


def smooth(x_n: Tensor) -> Tensor:
    """Every derivative is there."""
    return torch.exp(x_n.sin().mean()) + torch.log(1 + (matrix() @ x_n).cosh()).sum()


def bowl(x_n: Tensor) -> Tensor:
    """Least at x = 0, where it is 0."""
    return x_n @ x_n / 2
