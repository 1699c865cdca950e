"""CLIP's activation x sigmoid(1.702 x) = silu(1.702 x) / 1.702. It keeps only its input for the backward pass."""

from typing import Any

import torch
from torch import Tensor, nn

from dist_vlcl.model.perturbed import difference, perturbable


class _QuickGELU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return (1.702 * x).sigmoid_().mul_(x)  # one temporary, because x is four times as wide as the rest of a block

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return torch.ops.aten.silu_backward(gradients[0], 1.702 * ctx.saved_tensors[0])


class QuickGELU(nn.Module):
    """x * sigmoid(1.702 x), the activation of OpenAI's CLIP. Written with torch's functions it would keep the sigmoid as well."""

    @perturbable(difference)
    def forward(self, x: Tensor) -> Tensor:
        return _QuickGELU.apply(x)
