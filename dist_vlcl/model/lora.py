"""Low-rank adapters: the paper's variant with LoRA instead of experts (concepts.md 1.10)."""

# K parameter sets, B samples, L tokens, D width

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dist_vlcl.model.moe import INIT, linear
from dist_vlcl.options import option

TARGETS = ("q", "k", "v", "mlp")


@dataclass
class LoRAConfig:
    """Rank, scale and place of the low-rank adapters of a block."""

    rank: int = option(10, "Rank of each adapter.", min=1, max=1024)
    targets: list[str] = option(["k", "v"], "Attention projections with an adapter, or [mlp] alone: beside the MLP.", choices=TARGETS)
    scale: float = option(1.0, "Factor of the adapter's output.", above=0)
    alpha: float | None = option(None, "If given, the scale is alpha / rank.", above=0)
    init: str | None = option(None, INIT)

    @property
    def label(self) -> str:
        """Return the adapter's name in the names of runs."""
        return "lora_mlp" if self.targets == ["mlp"] else "lora"

    @property
    def factor(self) -> float:
        """Return the factor of the adapter's output."""
        return self.scale if self.alpha is None else self.alpha / self.rank

    def make(self, width: int, generator: torch.Generator) -> "LoRAAdapter":
        """Return a new adapter for a block of width D."""
        return LoRAAdapter(width, self, generator)

    def check(self) -> None:
        if not self.targets or ("mlp" in self.targets and len(self.targets) > 1):
            raise ValueError(f"adapter.targets={self.targets}: choose from q, k, v, or [mlp] alone")


class LoRAAdapter(nn.Module):
    """Delta = scale * up (down x) for each target. `down` starts Kaiming uniform and `up` at zero. No bias, no dropout."""

    def __init__(self, width: int, config: LoRAConfig, generator: torch.Generator):
        super().__init__()
        self.config = config
        self.scale = config.factor
        self.site = "mlp" if config.targets == ["mlp"] else "attention"
        bound = 1 / math.sqrt(width)
        for target in config.targets:
            self.register_parameter(f"{target}_down", nn.Parameter((torch.rand(config.rank, width, generator=generator) * 2 - 1) * bound))
            self.register_parameter(f"{target}_up", nn.Parameter(torch.zeros(width, config.rank)))

    def delta(self, x_KBLD: Tensor, stacked_params: dict[str, Tensor], target: str) -> Tensor:
        """Return the change `[K, B, L, D]` of the projection `target` of x."""
        return linear(linear(x_KBLD, stacked_params[f"{target}_down"]), stacked_params[f"{target}_up"]) * self.scale

    def forward(self, u: Tensor, stacked_params: dict[str, Tensor], noise: Tensor | None, dropout_mask: Tensor | None) -> Tensor:
        """Return the output beside the MLP `[K, B, L, D]` (target mlp)."""
        return self.delta(u, stacked_params, "mlp")

    def draw(self, noise: Any, branch: str, layer: int, tokens: int, training: bool) -> tuple[None, None]:
        """Return (None, None): LoRA has no router noise and no dropout."""
        return None, None
