"""Low-rank adapters: the paper's variant in which LoRA takes the place of the experts (METHOD 1.10)."""

# K parameter sets, B samples, L tokens, D width, r rank

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from dist_vlcl.model.moe import linear

PROJECTIONS = ("q", "k", "v")


@dataclass
class LoRAConfig:
    """Rank, scale, and where: any of the attention projections q, k, v, or `mlp`, the site of the experts."""

    rank: int = 10
    targets: list[str] = field(default_factory=lambda: ["k", "v"])
    scale: float = 1.0
    alpha: float | None = None  # when given, the scale is alpha / rank

    @property
    def label(self) -> str:
        """In the names of runs."""
        return "lora_mlp" if self.targets == ["mlp"] else "lora"

    def make(self, width: int, generator: torch.Generator) -> "LoRAAdapter":
        """Return a fresh adapter for a block of some width."""
        return LoRAAdapter(width, self, generator)

    def check(self) -> None:
        allowed = (*PROJECTIONS, "mlp")
        if self.rank < 1:
            raise ValueError(f"adapter.rank={self.rank}: give a positive number")
        if not self.targets or set(self.targets) - set(allowed) or ("mlp" in self.targets and len(self.targets) > 1):
            raise ValueError(f"adapter.targets={self.targets}: choose from q, k, v, or [mlp] alone")


class LoRAAdapter(nn.Module):
    """Delta = scale * up (down x) for each target; down starts Kaiming uniform, up at zero; no bias, no dropout."""

    def __init__(self, width: int, config: LoRAConfig, generator: torch.Generator):
        super().__init__()
        self.config = config
        self.scale = config.scale if config.alpha is None else config.alpha / config.rank
        self.site = "mlp" if config.targets == ["mlp"] else "attention"
        bound = 1 / math.sqrt(width)
        for target in config.targets:
            self.register_parameter(f"{target}_down", nn.Parameter((torch.rand(config.rank, width, generator=generator) * 2 - 1) * bound))
            self.register_parameter(f"{target}_up", nn.Parameter(torch.zeros(width, config.rank)))

    def delta(self, x_KBLD: Tensor, stacked_params: dict[str, Tensor], target: str) -> Tensor:
        """Return what `target` adds to its projection of x, `[K, B, L, D]`."""
        return linear(linear(x_KBLD, stacked_params[f"{target}_down"]), stacked_params[f"{target}_up"]) * self.scale

    def forward(self, u: Tensor, stacked_params: dict[str, Tensor], noise: Tensor | None, dropout_mask: Tensor | None) -> Tensor:
        """Return the output at the experts' site `[K, B, L, D]` (target mlp)."""
        return self.delta(u, stacked_params, "mlp")

    def draw(self, noise: Any, branch: str, layer: int, tokens: int, training: bool) -> tuple[None, None]:
        """LoRA has no noise of its own."""
        return None, None
