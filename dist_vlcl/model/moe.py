"""Mixture-of-experts adapters, as in MoE-Adapters4CL's class-incremental code (METHOD 1.1 to 1.4)."""

# K parameter sets, B samples, L tokens, D width, E experts, r bottleneck; an axis of size 1 stands for every K

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dist_vlcl.model.perturbed import difference, perturbable, product


@dataclass
class MoEConfig:
    """Experts per block, how many of them act on a sample, and the sizes of METHOD 1.1."""

    experts: int = 2
    top_k: int = 2
    bottleneck: int = 64
    scale: float = 0.1
    dropout: float = 0.1
    router_noise: bool = True
    noise_at_eval: bool = False  # the baseline's defect Q1, to reproduce it

    label = "moe"  # in the names of runs

    def make(self, width: int, generator: torch.Generator) -> "MoEAdapter":
        """Return a fresh adapter for a block of some width."""
        return MoEAdapter(width, self, generator)

    def check(self) -> None:
        if not 1 <= self.top_k <= self.experts:
            raise ValueError(f"adapter.top_k={self.top_k}: choose from 1 to adapter.experts={self.experts}")
        if self.bottleneck < 1:
            raise ValueError(f"adapter.bottleneck={self.bottleneck}: give a positive number")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"adapter.dropout={self.dropout}: choose from [0, 1)")


class MoEAdapter(nn.Module):
    """y = sum_e gate_e(u) * scale * (up_e dropout(relu(down_e u + b_e)) + c_e), with gates from the first token of u.

    The experts that act are one fused bottleneck of width k*r: two matrix products whatever k is. Which of more than k experts act is
    settled sample by sample: their weights are gathered by a product with the 0/1 matrix of choices, so that an expert that nobody chose
    still has its place in the graph (left out, it gives wrong gradients under ZeRO) and gradients add up in one order on any device.
    """

    site = "mlp"

    def __init__(self, width: int, config: MoEConfig, generator: torch.Generator):
        super().__init__()
        self.config = config
        experts, bottleneck = config.experts, config.bottleneck
        bound = 1 / math.sqrt(width)  # Kaiming uniform with a = sqrt(5)
        self.down_weight = nn.Parameter((torch.rand(experts, bottleneck, width, generator=generator) * 2 - 1) * bound)
        self.down_bias = nn.Parameter(torch.zeros(experts, bottleneck))
        self.up_weight = nn.Parameter(torch.zeros(experts, bottleneck, width))
        self.up_bias = nn.Parameter(torch.zeros(experts, width))
        self.router = nn.Parameter(torch.zeros(width, experts))
        self.noise = nn.Parameter(torch.zeros(width, experts))

    def forward(self, u: Tensor, stacked_params: dict[str, Tensor], noise: Tensor | None, dropout_mask: Tensor | None) -> Tensor:
        """Return the adapter's output `[K, B, L, D]` for u `[K, B, L, D]` and K parameter sets.

        noise: N(0, 1) draws `[B, E]` for the router, or None; dropout_mask: dropout mask `[B, L, k*r]` over the chosen experts, or None.
        """
        gates_KBk, chosen = self.gates(u[:, :, 0], stacked_params, noise)
        down, down_bias, up, up_bias = (_of(chosen, stacked_params[name]) for name in ("down_weight", "down_bias", "up_weight", "up_bias"))
        hidden = F.relu(linear(u, down.flatten(-3, -2), down_bias.flatten(-2)))
        scale = self.config.scale
        weight_KBk = gates_KBk * (scale / (1 - self.config.dropout) if dropout_mask is not None else scale)
        hidden = hidden.unflatten(-1, (self.config.top_k, -1)) * weight_KBk[:, :, None, :, None]
        hidden = hidden.flatten(-2)
        if dropout_mask is not None:
            hidden = hidden * dropout_mask
        gates_KBk = gates_KBk * scale
        bias_KBD = torch.matmul(gates_KBk, up_bias) if chosen is None else torch.matmul(gates_KBk[..., None, :], up_bias)[..., 0, :]
        return linear(hidden, up.flatten(-3, -2).transpose(-1, -2)) + bias_KBD[:, :, None]

    def gates(self, first_KBD: Tensor, stacked_params: dict[str, Tensor], noise: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return the weights of the chosen experts `[K, B, k]`, a softmax over the top-k noisy logits, and which they are.

        The choices are 0/1 `[K, B, k, E]`, experts in ascending order; None where all experts act.
        """
        logits = torch.matmul(first_KBD, stacked_params["router"])
        # Without noise the noise router still has its place in the graph, with gradient zero: DDP and ZeRO want every parameter used.
        # In float64: the CPU's exp has other last bits in the tail of a tensor, so that a sample's gate would depend on its company.
        spread = F.softplus(torch.matmul(first_KBD, stacked_params["noise"]).double()).to(logits.dtype) + 0.01
        logits = logits + spread * (noise if noise is not None else 0.0)
        if self.config.top_k == self.config.experts:
            return logits.softmax(-1), None
        chosen = choices(logits, self.config.top_k)
        return torch.matmul(chosen, logits[..., None])[..., 0].softmax(-1), chosen

    def draw(self, noise: Any, branch: str, layer: int, tokens: int, training: bool) -> tuple[Tensor | None, Tensor | None]:
        """Return this block's (router noise, dropout mask) of a step; `noise` is the step's `StepNoise`, or None."""
        config = self.config
        if noise is None:
            return None, None
        router = noise.router(branch, layer, config.experts) if config.router_noise and (training or config.noise_at_eval) else None
        width = config.top_k * config.bottleneck
        dropout_mask = noise.dropout_mask(branch, layer, tokens, width, config.dropout) if config.dropout > 0 and training else None
        return router, dropout_mask


@perturbable(difference)
def choices(logits: Tensor, k: int) -> Tensor:
    """Return the k largest of the logits `[..., E]`, in ascending order of place, as 0/1 `[..., k, E]`."""
    best = logits.topk(k, dim=-1).indices.sort(-1).values
    return (best[..., None] == torch.arange(logits.shape[-1], device=best.device)).to(logits.dtype)


def _of(chosen: Tensor | None, values: Tensor) -> Tensor:
    """Return the values `[K, B, k, ...]` of the chosen experts, for values `[K, E, ...]` of all; these themselves if all are chosen."""
    if chosen is None:
        return values
    picked = torch.matmul(chosen.flatten(1, 2), values.flatten(2))  # exact: one factor 1, the others 0
    return picked.unflatten(1, chosen.shape[1:3]).unflatten(-1, values.shape[2:])


@perturbable(product)
def linear(x_KBLD: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return x W^T + b `[K, B, L, O]`, with a weight per parameter set `[K, O, D]`, or per set and sample `[K, B, O, D]`.

    A K axis of size 1 in x or W serves every set.
    """
    if weight.ndim == 4:
        y = torch.matmul(x_KBLD, weight.transpose(-1, -2))
        return y if bias is None else y + bias[:, :, None]
    if weight.shape[0] == 1:
        return F.linear(x_KBLD, weight[0], None if bias is None else bias[0])
    y = torch.matmul(x_KBLD.flatten(1, 2), weight.transpose(1, 2))
    if bias is not None:
        y = y + bias[:, None]
    return y.unflatten(1, x_KBLD.shape[1:3])
