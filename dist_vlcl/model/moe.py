"""Mixture-of-experts adapters, as in MoE-Adapters4CL's class-incremental code (concepts.md 1.1 to 1.4)."""

# K parameter sets, B samples, L tokens, D width, O outputs, E experts, k chosen experts, r bottleneck; an axis of size 1 serves every K

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dist_vlcl.model.perturbed import difference, perturbable, product
from dist_vlcl.options import option

INIT = "Start from the adapters of an earlier run: its folder, an export, or a safetensors file of either; null starts from new ones."


@dataclass
class MoEConfig:
    """Number and size of the experts of a block (concepts.md 1.1)."""

    experts: int = option(2, "Number of experts of a block.", min=1, max=256)
    top_k: int = option(2, "Number of experts that act on a sample.", min=1)
    bottleneck: int = option(64, "Width of an expert's hidden layer.", min=1, max=8192)
    scale: float = option(0.1, "Factor of the adapter's output.", above=0)
    dropout: float = option(0.1, "Probability with which training drops a hidden activation.", min=0, below=1)
    router_noise: bool = option(True, "Add noise to the router's logits in training.")
    noise_at_eval: bool = option(False, "Reproduce the baseline's defect Q1: router noise at evaluation too (concepts.md 1.4).")
    init: str | None = option(None, INIT)

    label = "moe"  # in the names of runs

    def make(self, width: int, generator: torch.Generator) -> "MoEAdapter":
        """Return a new adapter for a block of width D."""
        return MoEAdapter(width, self, generator)

    def check(self) -> None:
        if self.top_k > self.experts:
            raise ValueError(f"adapter.top_k={self.top_k}: choose from 1 to adapter.experts={self.experts}")


class MoEAdapter(nn.Module):
    """y = sum_e gate_e(u) * scale * (up_e dropout(relu(down_e u + b_e)) + c_e), with gates from the first token of u.

    The k chosen experts form one bottleneck of width k*r, so there are two matrix products whatever k is. With more than k experts, each
    sample's weights are selected by a product with a 0/1 matrix. An expert that no sample chose then still has a gradient, zero (without
    one, ZeRO computes wrong gradients), and gradients are added in the same order on every device.
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

        noise: standard normals `[B, E]` for the router, or None. dropout_mask: `[B, L, k*r]` for the chosen experts, or None.
        """
        gates_KBk, chosen = self.gates(u[:, :, 0], stacked_params, noise)
        names = ("down_weight", "down_bias", "up_weight", "up_bias")
        down, down_bias, up, up_bias = (_of_experts(chosen, stacked_params[name]) for name in names)
        hidden = F.relu(linear(u, down.flatten(-3, -2), down_bias.flatten(-2)))
        scale = self.config.scale
        weight_KBk = gates_KBk * (scale / (1 - self.config.dropout) if dropout_mask is not None else scale)
        hidden = (hidden.unflatten(-1, (self.config.top_k, -1)) * weight_KBk[:, :, None, :, None]).flatten(-2)
        if dropout_mask is not None:
            hidden = hidden * dropout_mask
        gates_KBk = gates_KBk * scale
        bias_KBD = torch.matmul(gates_KBk, up_bias) if chosen is None else torch.matmul(gates_KBk[..., None, :], up_bias)[..., 0, :]
        return linear(hidden, up.flatten(-3, -2).transpose(-1, -2)) + bias_KBD[:, :, None]

    def gates(self, first_KBD: Tensor, stacked_params: dict[str, Tensor], noise: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return the gates `[K, B, k]`, a softmax over the k largest noisy logits, and the choices, 0/1 `[K, B, k, E]`.

        Chosen experts are in ascending order. The choices are None if all experts act.
        """
        logits = torch.matmul(first_KBD, stacked_params["router"])
        # DDP and ZeRO need every parameter in the graph. Without noise, the factor 0.0 gives the noise weights a zero gradient.
        # float64: the CPU's exp has other last bits at the end of a tensor, so a sample's gate would depend on its place in the batch.
        spread = F.softplus(torch.matmul(first_KBD, stacked_params["noise"]).double()).to(logits.dtype) + 0.01
        logits = logits + spread * (noise if noise is not None else 0.0)
        if self.config.top_k == self.config.experts:
            return logits.softmax(-1), None
        chosen = choices(logits, self.config.top_k)
        return torch.matmul(chosen, logits[..., None])[..., 0].softmax(-1), chosen

    def draw(self, noise: Any, branch: str, layer: int, tokens: int, training: bool) -> tuple[Tensor | None, Tensor | None]:
        """Return (router noise, dropout mask) of this block. noise: the step's `StepNoise`, or None for neither."""
        config = self.config
        if noise is None:
            return None, None
        router = noise.router(branch, layer, config.experts) if config.router_noise and (training or config.noise_at_eval) else None
        width = config.top_k * config.bottleneck
        dropout_mask = noise.dropout_mask(branch, layer, tokens, width, config.dropout) if config.dropout > 0 and training else None
        return router, dropout_mask


@perturbable(difference)
def choices(logits: Tensor, k: int) -> Tensor:
    """Return which k logits of `[..., E]` are largest, as 0/1 `[..., k, E]`, in ascending order of the expert."""
    best = logits.topk(k, dim=-1).indices.sort(-1).values
    return (best[..., None] == torch.arange(logits.shape[-1], device=best.device)).to(logits.dtype)


def _of_experts(chosen: Tensor | None, values: Tensor) -> Tensor:
    """Return the values `[K, B, k, ...]` of the chosen experts, from the values `[K, E, ...]` of all. None: return all values."""
    if chosen is None:
        return values
    picked = torch.matmul(chosen.flatten(1, 2), values.flatten(2))  # exact: each sum has one factor 1 and the others 0
    return picked.unflatten(1, chosen.shape[1:3]).unflatten(-1, values.shape[2:])


@perturbable(product)
def linear(x_KBLD: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return x W^T + b `[K, B, L, O]` for a weight `[K, O, D]` per parameter set, or `[K, B, O, D]` per set and sample."""
    if weight.ndim == 4:
        y = torch.matmul(x_KBLD, weight.transpose(-1, -2))
        return y if bias is None else y + bias[:, :, None]
    if weight.shape[0] == 1:
        return F.linear(x_KBLD, weight[0], None if bias is None else bias[0])
    y = torch.matmul(x_KBLD.flatten(1, 2), weight.transpose(1, 2))
    return (y if bias is None else y + bias[:, None]).unflatten(1, x_KBLD.shape[1:3])
