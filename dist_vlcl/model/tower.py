"""A tower of CLIP: embed, blocks with an adapter each, pool; K parameter sets in one forward, from any block on."""

# K parameter sets, B samples, L tokens, D width, H heads, F features; an axis of size 1 stands for every K

from collections.abc import Iterator, Mapping
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dist_vlcl.model.units import Unit, UnitId

Sets = Mapping[UnitId, dict[str, Tensor]]


class AdaptedBlock(nn.Module):
    """A frozen residual attention block and its adapter, cut in two where the adapter begins to matter.

    `carry` is everything that does not depend on the adapter, `finish` the rest: a perturbed evaluation restarts from the carry of its
    first perturbed block, so attention and MLP of that block are not computed again.
    """

    def __init__(self, block: Any, adapter: Any, unit_id: UnitId, causal: bool):
        super().__init__()
        self.block: Any = block
        self.adapter: Any = adapter
        self.causal = causal
        self.unit = Unit(unit_id, adapter)

    def forward(
        self,
        hidden: Tensor | tuple[Tensor, ...],
        sets: dict[str, Tensor] | None = None,
        noise: Tensor | None = None,
        kept: Tensor | None = None,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Return the block's output `[K, B, L, D]` and its carry, detached, from its input or its carry; without sets, for its own tensors.

        Parameters are read in here only: an engine that holds them in pieces makes them whole for the time of a module's call.
        """
        carry = hidden if isinstance(hidden, tuple) else self.carry(hidden)
        tensors = sets or {name: t[None] for name, t in self.unit.tensors().items()}
        return self.finish(carry, tensors, noise, kept), tuple(t.detach() for t in carry)

    def carry(self, x: Tensor) -> tuple[Tensor, ...]:
        """Return what the block knows before its adapter acts, from its input `[K, B, L, D]`."""
        normed = self.block.ln_1(x)
        qkv = F.linear(normed, self.block.attn.in_proj_weight, self.block.attn.in_proj_bias)
        if self.adapter.site == "attention":
            return x, normed, qkv
        u = x + self.block.ls_1(self._attend(qkv))
        return u, u + self.block.ls_2(self.block.mlp(self.block.ln_2(u)))

    def finish(self, carry: tuple[Tensor, ...], sets: dict[str, Tensor], noise: Tensor | None, kept: Tensor | None) -> Tensor:
        """Return the block's output `[K, B, L, D]` for K sets of the adapter's tensors."""
        if self.adapter.site == "mlp":
            u, rest = carry
            return rest + self.adapter(u, sets, noise, kept)
        x, normed, qkv = carry
        parts = qkv.chunk(3, -1)
        added = [p + self.adapter.delta(normed, sets, t) if f"{t}_up" in sets else p for t, p in zip("qkv", parts, strict=True)]
        added = torch.broadcast_tensors(*added)
        u = x + self.block.ls_1(self._attend(torch.cat(added, -1)))
        return u + self.block.ls_2(self.block.mlp(self.block.ln_2(u)))

    def _attend(self, qkv: Tensor) -> Tensor:
        attn = self.block.attn
        q, k, v = (t.flatten(0, 1).unflatten(-1, (attn.num_heads, -1)).transpose(1, 2) for t in qkv.chunk(3, -1))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal).transpose(1, 2).flatten(-2)
        return attn.out_proj(out).unflatten(0, qkv.shape[:2])


class Tower(nn.Module):
    """One branch of CLIP: blocks between two ends; everything but the adapters is frozen.

    `ends` is a module: `ends(inputs) -> [B, L, D]` embeds, `ends(inputs [K*B, ...], hidden [K*B, L, D]) -> [K*B, F]` pools.
    """

    def __init__(self, branch: str, blocks: list[AdaptedBlock], ends: Any):
        super().__init__()
        self.branch = branch
        self.blocks = nn.ModuleList(blocks)
        self.ends: Any = ends

    def __iter__(self) -> Iterator[AdaptedBlock]:
        return (self.block(layer) for layer in range(1, self.depth + 1))

    def block(self, layer: int) -> AdaptedBlock:
        """Return the block of a layer, from 1."""
        return cast(AdaptedBlock, self.blocks[layer - 1])

    @property
    def depth(self) -> int:
        return len(self.blocks)

    def embed(self, inputs: Tensor) -> Tensor:
        """Return the input of the first block `[1, B, L, D]`."""
        return self.ends(inputs)[None]

    def run(
        self,
        hidden: Tensor | tuple[Tensor, ...],
        inputs: Tensor,
        *,
        start: int = 1,
        sets: Sets | None = None,
        noise: Any = None,
        keep: int | None = None,
        training: bool = True,
    ) -> tuple[Tensor, tuple[Tensor, ...] | None]:
        """Return unit features `[K, B, F]` and the carry of block `keep`.

        hidden: what `embed` made of `inputs`, or the carry of block `start`. sets: K values for some of the units; the others act with
        their own. The K axis appears at the first block that has K sets.
        """
        kept_carry, x = None, hidden
        tokens = (hidden[0] if isinstance(hidden, tuple) else hidden).shape[2]
        for layer in range(start, self.depth + 1):
            block = self.block(layer)
            router, kept = block.adapter.draw(noise, self.branch, layer, tokens, training)
            x, carry = block(x, sets=sets.get(block.unit.id) if sets else None, noise=router, kept=kept)
            if layer == keep:
                kept_carry = carry
        assert isinstance(x, Tensor)
        sets_count = x.shape[0]
        features = self.ends(inputs.repeat(sets_count, *[1] * (inputs.ndim - 1)) if sets_count > 1 else inputs, x.flatten(0, 1))
        return F.normalize(features, dim=-1).unflatten(0, (sets_count, -1)), kept_carry
