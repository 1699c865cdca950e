"""A tower of CLIP: embed, blocks with an adapter each, pool; K parameter sets in one forward, from any block on."""

# K parameter sets, B samples, L tokens, D width, H heads, F features; an axis of size 1 stands for every K

import functools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dist_vlcl.model.graphs import Graphs
from dist_vlcl.model.perturbed import difference, perturbable
from dist_vlcl.model.units import Unit, UnitId

Sets = Mapping[UnitId, dict[str, Tensor]]

ROWS_AT_A_TIME = {"cpu": 4096, "meta": 4096, "cuda": 8192}  # few stay in the caches, many are fewer launches
SAMPLES_AT_A_TIME = 8  # at least: matrix products of a few rows have other last bits


class AdaptedBlock(nn.Module):
    """A frozen residual attention block and its adapter, cut in two where the adapter begins to matter.

    `cached_input` is everything that does not depend on the adapter, `finish` the rest: a perturbed evaluation restarts from the cached_input of its
    first perturbed block, so attention and MLP of that block are not computed again. `reads`, positions `[B, R]`, says that no other
    position of the block's output will be read: the others then serve as keys and values only.
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
        stacked_params: dict[str, Tensor] | None = None,
        noise: Tensor | None = None,
        dropout_mask: Tensor | None = None,
        reads: Tensor | None = None,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Return the block's output `[K, B, L, D]` and its cached_input, detached, from its input or its cached_input; without stacked_params, for its own tensors.

        Parameters are read in here only: an engine that holds them in pieces makes them whole for the time of a module's call.
        """
        cached_input = hidden if isinstance(hidden, tuple) else self.cached_input(hidden, reads)
        tensors = stacked_params or {name: t[None] for name, t in self.unit.tensors().items()}
        tensors = {name: t.to(cached_input[0].dtype) for name, t in tensors.items()}
        return self.finish(cached_input, tensors, noise, dropout_mask, reads), tuple(t.detach() for t in cached_input)

    def cached_input(self, x: Tensor, reads: Tensor | None = None) -> tuple[Tensor, ...]:
        """Return what the block knows before its adapter acts, from its input `[K, B, L, D]`."""
        normed = self.block.ln_1(x)
        asking = normed if reads is None else pick(normed, reads)
        x = x if reads is None else pick(x, reads)
        if self.adapter.site == "attention":
            return x, normed, asking, *self._project(normed, asking)
        q, k, v = self._project(normed, asking)
        del normed, asking  # a probe's peak is here
        u = x + self.block.ls_1(self._attend(q, k, v, reads))
        del q, k, v
        return u, u + self._mlp(u)

    def finish(
        self,
        cached_input: tuple[Tensor, ...],
        stacked_params: dict[str, Tensor],
        noise: Tensor | None,
        dropout_mask: Tensor | None,
        reads: Tensor | None = None,
    ) -> Tensor:
        """Return the block's output `[K, B, L, D]` (`[K, B, R, D]` where it is read) for K sets of the adapter's tensors."""
        if self.adapter.site == "mlp":
            u, rest = cached_input
            return rest + self.adapter(u, stacked_params, noise, dropout_mask)
        x, normed, asking, *qkv = cached_input
        inputs = {"q": asking, "k": normed, "v": normed}
        q, k, v = (
            p + self.adapter.delta(inputs[t], stacked_params, t) if f"{t}_up" in stacked_params else p
            for t, p in zip("qkv", qkv, strict=True)
        )
        u = x + self.block.ls_1(self._attend(q, k, v, reads))
        return u + self._mlp(u)

    def _project(self, normed: Tensor, asking: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries `[K, B, R, D]` of the positions that are asking, keys and values `[K, B, L, D]` of all."""
        weight, bias = self.block.attn.in_proj_weight, self.block.attn.in_proj_bias
        if asking is normed:
            q, k, v = F.linear(normed, weight, bias).chunk(3, -1)
            return q, k, v
        width = normed.shape[-1]
        k, v = F.linear(normed, weight[width:], bias[width:]).chunk(2, -1)
        return F.linear(asking, weight[:width], bias[:width]), k, v

    def _mlp(self, u: Tensor) -> Tensor:
        return self.block.ls_2(self.block.mlp(self.block.ln_2(u)))

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, reads: Tensor | None) -> Tensor:
        seen_BRL = None
        if self.causal and reads is not None:
            seen_BRL = torch.arange(k.shape[2], device=reads.device) <= reads[..., None]
        out_KBRD = attention(q, k, v, self.block.attn.num_heads, self.causal, seen_BRL)
        return self.block.attn.out_proj(out_KBRD.flatten(1, 2)).unflatten(1, out_KBRD.shape[1:3])


def attention_by_products(_: Callable, q: Any, k: Any, v: Any, heads: int, causal: bool, seen_BRL: Tensor | None) -> Any:
    """Do as `attention` does by the rules of products and softmax, with a matrix of all pairs."""
    q, k, v = (t.unflatten(-1, (heads, -1)).transpose(2, 3) for t in (q, k, v))
    scores_KBHRL = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    if causal:
        seen = torch.ones(scores_KBHRL.shape[-2:], dtype=torch.bool, device=q.device).tril() if seen_BRL is None else seen_BRL[:, None]
        scores_KBHRL = scores_KBHRL + torch.zeros(seen.shape, dtype=q.dtype, device=q.device).masked_fill(~seen, -math.inf)
    return (scores_KBHRL.softmax(-1) @ v).transpose(2, 3).flatten(-2)


@perturbable(attention_by_products)
def attention(q: Tensor, k: Tensor, v: Tensor, heads: int, causal: bool, seen_BRL: Tensor | None) -> Tensor:
    """Return the heads' weighted values `[K, B, R, D]`, for queries `[K, B, R, D]`, keys and values `[K, B, L, D]`.

    causal: a position sees itself and those before it, or, of R queries, what `seen_BRL` says.
    """
    copies = max(t.shape[0] for t in (q, k, v))
    mask = None if seen_BRL is None else seen_BRL.repeat(copies, 1, 1)[:, None]
    q, k, v = (t.expand(copies, -1, -1, -1).flatten(0, 1).unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal and mask is None).transpose(1, 2).flatten(-2)
    return out.unflatten(0, (copies, -1))


def pick(x_KBLD: Tensor, reads_BR: Tensor) -> Tensor:
    """Return the positions that are read, `[K, B, R, D]`."""
    return x_KBLD[:, torch.arange(len(reads_BR), device=reads_BR.device)[:, None], reads_BR]


class Tower(nn.Module):
    """One branch of CLIP: blocks between two ends; everything but the adapters is frozen.

    `ends` is a module: `ends(inputs) -> [B, L, D]` embeds, `ends(inputs, hidden) -> [K*B, F]` pools. Its `reads(inputs) -> [B, R]` are the
    positions of the last block's output that adapter and pooling look at (position 0, where the experts are chosen, first), or None for
    all; `hidden` has just those.
    """

    def __init__(self, branch: str, blocks: list[AdaptedBlock], ends: Any, checkpoint: bool = False):
        super().__init__()
        self.branch, self.checkpoint = branch, checkpoint
        self.graphs: Graphs | None = None
        self.in_slices = True  # not where a block's call is an exchange between ranks: all have to make as many
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

    @property
    def dtype(self) -> torch.dtype:
        """Return that of the blocks, in which their products run; the ends may be wider."""
        return self.block(1).block.ln_1.weight.dtype

    def embed(self, inputs: Tensor) -> Tensor:
        """Return the input of the first block `[1, B, L, D]`."""
        return self.ends(inputs)[None].to(self.dtype)

    def run(
        self,
        hidden: Tensor | tuple[Tensor, ...],
        inputs: Tensor,
        *,
        start: int = 1,
        stacked_params: Sets | None = None,
        noise: Any = None,
        cache_layer: int | None = None,
        training: bool = True,
    ) -> tuple[Tensor, tuple[Tensor, ...] | None]:
        """Return unit features `[K, B, F]` and the cached_input of block `cache_layer`.

        hidden: what `embed` made of `inputs`, or the cached_input of block `start`. stacked_params: K values for some of the units; the others act with
        their own. The K axis appears at the first block that has K sets. Where no graph is kept, some samples at a time run through all
        blocks, so that the peak of memory does not grow with the batch.
        """
        length = self.ends.length(inputs)
        drawn = [self.block(layer).adapter.draw(noise, self.branch, layer, length, training) for layer in range(start, self.depth + 1)]
        call: Any = self.forward
        if self.graphs is not None:
            call = functools.partial(self.graphs, self._with, weights={**dict(self.named_parameters()), **dict(self.named_buffers())})
        if torch.is_grad_enabled() or not self.in_slices:
            features, *cached_input = call((hidden, inputs, drawn, stacked_params), (start, cache_layer))
            return features, tuple(cached_input) or None
        copies = 1 + max((t.shape[0] for tensors in (stacked_params or {}).values() for t in tensors.values()), default=0)
        at_a_time = max(SAMPLES_AT_A_TIME, ROWS_AT_A_TIME[inputs.device.type] // (copies * length))
        cuts = torch.arange(len(inputs)).tensor_split(max(1, len(inputs) // at_a_time))
        parts = []
        for cut in cuts:
            samples = slice(int(cut[0]), int(cut[-1]) + 1)
            part = tuple(t[:, samples] for t in hidden) if isinstance(hidden, tuple) else hidden[:, samples]
            masks = [tuple(None if t is None else t[samples] for t in pair) for pair in drawn]
            parts.append(call((part, inputs[samples], masks, stacked_params), (start, cache_layer)))
        features, *cached_input = parts[0] if len(parts) == 1 else (torch.cat(pieces, 1) for pieces in zip(*parts, strict=True))
        return features, tuple(cached_input) or None

    def record(self) -> None:
        """Replay CUDA graphs from now on."""
        self.graphs = Graphs()

    def _with(self, arguments: tuple, options: tuple, weights: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        """Do as `forward` does, with other tensors in place of some weights, by name."""
        return torch.func.functional_call(self, dict(weights), (arguments, options)) if weights else self.forward(arguments, options)

    def forward(self, arguments: tuple, options: tuple) -> tuple[Tensor, ...]:
        """Return unit features `[K, B, F]`, and the cached_input of block `cache_layer`, from (hidden, inputs, drawn, stacked_params) and (start, cache_layer)."""
        (hidden, inputs, drawn, stacked_params), (start, cache_layer) = arguments, options
        read = self.ends.reads(inputs)
        reads = {} if read is None else {self.depth: read}
        cached: tuple[Tensor, ...] = ()
        recompute = self.checkpoint and torch.is_grad_enabled()
        for layer, (router, dropout_mask) in enumerate(drawn, start):
            block = self.block(layer)
            router = None if router is None else router.to(self.dtype)
            if dropout_mask is not None and layer in reads:
                dropout_mask = pick(dropout_mask[None], reads[layer])[0]
            places = (hidden, stacked_params.get(block.unit.id) if stacked_params else None, router, dropout_mask, reads.get(layer))
            if recompute:
                hidden, cached_input = checkpoint(block, *places, use_reentrant=False, preserve_rng_state=False)
            else:
                hidden, cached_input = block(*places)
            if layer == cache_layer:
                cached = cached_input
            del places, cached_input  # the peak of memory is within a block
        return unit_features(hidden, inputs, self.ends), *cached


@perturbable(difference)
def unit_features(hidden: Any, inputs: Tensor, ends: Any) -> Tensor:
    """Return the pooled hidden state `[K, B, R, D]` at length 1, `[K, B, F]`, in float32 or wider."""
    hidden = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
    return F.normalize(ends(inputs, hidden.flatten(0, 1)), dim=-1).unflatten(0, hidden.shape[:2])
