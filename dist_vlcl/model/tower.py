"""One tower of CLIP: embed, blocks with one adapter each, pool. It evaluates K parameter sets in one forward pass, from any block on."""

# K parameter sets, B samples, L tokens, R positions that are read, D width, H heads, F features; an axis of size 1 serves every K

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dist_vlcl.model.graphs import Graphs
from dist_vlcl.model.perturbed import difference, perturbable
from dist_vlcl.model.units import Unit, UnitId

StackedParams = Mapping[UnitId, dict[str, Tensor]]
Draws = list[tuple[Tensor | None, Tensor | None]]  # (router noise, dropout mask) of some blocks
Hidden = Tensor | tuple[Tensor, ...]  # the input of a block `[K, B, L, D]`, or its cached_input

ROWS_AT_A_TIME = {"cpu": 4096, "meta": 4096, "cuda": 8192}  # few rows stay in a CPU's caches; more rows need fewer kernel launches
# Matrix products with fewer rows use other CPU kernels, whose results differ in the last bits. A sample's loss would then depend on how
# many samples its rank, or its part of a batch, has. Most CPUs need 4 or 5 rows, Intel's 5th generation of Xeon 16 (docs/LOG.md).
MIN_SAMPLES = 16


class Context(NamedTuple):
    """What a block gets beside its input."""

    noise: Tensor | None = None  # of the router, [B, E]; None for none
    dropout_mask: Tensor | None = None  # [B, R, width]
    reads: Tensor | None = None  # the positions of the output that are read, [B, R]; None for all
    visible: Tensor | None = None  # which positions each position sees, [B, L, L]; None for what `causal` says


class AdaptedBlock(nn.Module):
    """A frozen residual attention block with its adapter, divided at the point where the adapter starts to act.

    `cached_input` computes everything that does not depend on the adapter, `finish` the rest. A perturbed evaluation restarts from the
    cached input of its first perturbed block, so attention and MLP of that block are not computed again. Positions that are not read serve
    only as keys and values.
    """

    def __init__(self, block: Any, adapter: Any, unit_id: UnitId, causal: bool):
        super().__init__()
        self.block: Any = block
        self.adapter: Any = adapter
        self.causal = causal
        self.unit = Unit(unit_id, adapter)

    def forward(self, hidden: Hidden, stacked_params: dict[str, Tensor] | None, context: Context) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Return the block's output `[K, B, L, D]` and its cached input, detached. stacked_params: None for the block's own tensors.

        Parameters are read only here, because ZeRO-3 gathers them for the time of a module's call.
        """
        cached_input = hidden if isinstance(hidden, tuple) else self.cached_input(hidden, context)
        tensors = stacked_params or {name: t[None] for name, t in self.unit.tensors().items()}
        tensors = {name: t.to(cached_input[0].dtype) for name, t in tensors.items()}
        return self.finish(cached_input, tensors, context), tuple(t.detach() for t in cached_input)

    def cached_input(self, x: Tensor, context: Context) -> tuple[Tensor, ...]:
        """Return everything that the block computes before its adapter acts, from its input `[K, B, L, D]`."""
        normed, reads = self.block.ln_1(x), context.reads
        query_input = normed if reads is None else select_positions(normed, reads)
        x = x if reads is None else select_positions(x, reads)
        if self.adapter.site == "attention":
            return x, normed, query_input, *self._project(normed, query_input)
        q, k, v = self._project(normed, query_input)
        del normed, query_input  # the peak memory of a candidate is here
        u = x + self.block.ls_1(self._attend(q, k, v, context))
        del q, k, v
        return u, u + self._mlp(u)

    def finish(self, cached_input: tuple[Tensor, ...], stacked_params: dict[str, Tensor], context: Context) -> Tensor:
        """Return the block's output `[K, B, L, D]`, or `[K, B, R, D]` at the positions that are read, for K parameter sets."""
        if self.adapter.site == "mlp":
            u, rest = cached_input
            return rest + self.adapter(u, stacked_params, context.noise, context.dropout_mask)
        x, normed, query_input, *qkv = cached_input
        inputs = {"q": query_input, "k": normed, "v": normed}
        q, k, v = (self._adapted(p, inputs[t], stacked_params, t) for t, p in zip("qkv", qkv, strict=True))
        u = x + self.block.ls_1(self._attend(q, k, v, context))
        return u + self._mlp(u)

    def _adapted(self, projected: Tensor, x: Tensor, stacked_params: dict[str, Tensor], target: str) -> Tensor:
        """Return a projection of x (target q, k or v) with the adapter's change; as it is if the adapter does not change this target."""
        return projected + self.adapter.delta(x, stacked_params, target) if f"{target}_up" in stacked_params else projected

    def _project(self, normed: Tensor, query_input: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries `[K, B, R, D]`, and keys and values `[K, B, L, D]` of all positions."""
        weight, bias = self.block.attn.in_proj_weight, self.block.attn.in_proj_bias
        if query_input is normed:
            q, k, v = F.linear(normed, weight, bias).chunk(3, -1)
            return q, k, v
        width = normed.shape[-1]
        k, v = F.linear(normed, weight[width:], bias[width:]).chunk(2, -1)
        return F.linear(query_input, weight[:width], bias[:width]), k, v

    def _mlp(self, u: Tensor) -> Tensor:
        return self.block.ls_2(self.block.mlp(self.block.ln_2(u)))

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, context: Context) -> Tensor:
        reads, visible_BRL = context.reads, context.visible
        if visible_BRL is not None and reads is not None:
            visible_BRL = select_positions(visible_BRL[None], reads)[0]
        elif self.causal and reads is not None:
            visible_BRL = torch.arange(k.shape[2], device=reads.device) <= reads[..., None]
        out_KBRD = attention(q, k, v, self.block.attn.num_heads, self.causal, visible_BRL)
        return self.block.attn.out_proj(out_KBRD.flatten(1, 2)).unflatten(1, out_KBRD.shape[1:3])


def attention_of_perturbed(_: Callable, q: Any, k: Any, v: Any, heads: int, causal: bool, visible_BRL: Tensor | None) -> Any:
    """Compute `attention` from products and a softmax, whose rules for perturbed tensors are known. It builds the matrix of all pairs."""
    q, k, v = (t.unflatten(-1, (heads, -1)).transpose(2, 3) for t in (q, k, v))
    scores_KBHRL = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    if causal:
        shape = scores_KBHRL.shape[-2:]
        visible = torch.ones(shape, dtype=torch.bool, device=q.device).tril() if visible_BRL is None else visible_BRL[:, None]
        scores_KBHRL = scores_KBHRL + torch.zeros(visible.shape, dtype=q.dtype, device=q.device).masked_fill(~visible, -math.inf)
    return (scores_KBHRL.softmax(-1) @ v).transpose(2, 3).flatten(-2)


@perturbable(attention_of_perturbed)
def attention(q: Tensor, k: Tensor, v: Tensor, heads: int, causal: bool, visible_BRL: Tensor | None) -> Tensor:
    """Return the heads' weighted values `[K, B, R, D]` for queries `[K, B, R, D]`, keys and values `[K, B, L, D]`.

    causal: a position sees itself and earlier ones; `visible_BRL`, if given, says so for R positions.
    """
    copies = max(t.shape[0] for t in (q, k, v))
    mask = None if visible_BRL is None else visible_BRL.repeat(copies, 1, 1)[:, None]
    q, k, v = (t.expand(copies, -1, -1, -1).flatten(0, 1).unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal and mask is None).transpose(1, 2).flatten(-2)
    return out.unflatten(0, (copies, -1))


def select_positions(x_KBLD: Tensor, reads_BR: Tensor) -> Tensor:
    """Return x at the positions that are read, `[K, B, R, D]`."""
    return x_KBLD[:, torch.arange(len(reads_BR), device=reads_BR.device)[:, None], reads_BR]


class ImageStemAndHead(nn.Module):
    """What comes before and after the blocks of a vision tower. A subclass has `embed`, `reads` and `pool`, and sets `tokens`."""

    mean: Tensor
    std: Tensor
    tokens: int

    def __init__(self, visual: Any):
        super().__init__()
        self.visual: Any = visual
        for name in ("mean", "std"):
            self.register_buffer(name, torch.tensor(visual.preprocess_cfg[name]).view(3, 1, 1), persistent=False)

    def normalized(self, images: Tensor) -> Tensor:
        """Return uint8 images as the model expects them."""
        return (images.float() / 255 - self.mean) / self.std

    def length(self, images: Tensor) -> int:
        """Return L."""
        return self.tokens

    def visible(self, images: Tensor) -> None:
        """Return None: every position sees all others."""

    def forward(self: Any, images: Tensor, hidden: Tensor | None = None) -> Tensor:
        return self.embed(images) if hidden is None else self.pool(hidden)


class Tower(nn.Module):
    """One branch of CLIP: blocks between a stem and a head. Everything but the adapters is frozen.

    `stem_and_head(inputs)` embeds, `[B, L, D]`. `stem_and_head(inputs, hidden)` pools, `[K*B, F]`. `stem_and_head.length(inputs)` is L.
    `stem_and_head.reads(inputs)` are the positions `[B, R]` of the last block's output that adapter and pooling read, or None for all. The
    first is position 0, where the router looks. `hidden` then has only these. `stem_and_head.visible(inputs)` says which positions each
    position sees `[B, L, L]`, or None for what the blocks' `causal` says.
    """

    def __init__(self, branch: str, blocks: list[AdaptedBlock], stem_and_head: Any, checkpoint: bool = False):
        super().__init__()
        self.branch, self.checkpoint = branch, checkpoint
        self.graphs: Graphs | None = None
        self.in_slices = True  # False under ZeRO-3: each call of a block is a collective, so all ranks must make equally many
        self.blocks, self.depth = nn.ModuleList(blocks), len(blocks)
        self.stem_and_head: Any = stem_and_head

    def __iter__(self) -> Iterator[AdaptedBlock]:
        return (self.block(layer) for layer in range(1, self.depth + 1))

    def block(self, layer: int) -> AdaptedBlock:
        """Return the block of a layer; layers count from 1."""
        return cast(AdaptedBlock, self.blocks[layer - 1])

    @property
    def dtype(self) -> torch.dtype:
        """Return the dtype of the blocks. Stem and head may have a wider one."""
        return next(self.block(1).block.parameters()).dtype

    def embed(self, inputs: Tensor) -> Tensor:
        """Return the input of the first block `[1, B, L, D]`."""
        return self.stem_and_head(inputs)[None].to(self.dtype)

    def run(
        self,
        hidden: Hidden,
        inputs: Tensor,
        *,
        start: int = 1,
        stacked_params: StackedParams | None = None,
        noise: Any = None,
        cache_layers: Collection[int] = (),
        training: bool = True,
    ) -> tuple[Tensor, dict[int, tuple[Tensor, ...]]]:
        """Return unit features `[K, B, F]`, and the cached inputs of the blocks `cache_layers` by layer.

        hidden: the result of `embed(inputs)`, or the cached input of block `start`. stacked_params: K values of some units; the others use
        their own. noise: the step's `StepNoise`. Without gradients a few samples at a time run through all blocks, so that the peak memory
        does not grow with the batch.
        """
        length = self.stem_and_head.length(inputs)
        drawn = [self.block(layer).adapter.draw(noise, self.branch, layer, length, training) for layer in range(start, self.depth + 1)]
        if torch.is_grad_enabled() or not self.in_slices:
            return _by_layer(self._call(hidden, inputs, drawn, stacked_params, start, cache_layers), cache_layers)
        copies = 1 + max((t.shape[0] for tensors in (stacked_params or {}).values() for t in tensors.values()), default=0)
        at_a_time = max(MIN_SAMPLES, ROWS_AT_A_TIME[inputs.device.type] // (copies * length))
        results = []
        for indices in torch.arange(len(inputs)).tensor_split(max(1, len(inputs) // at_a_time)):
            samples = slice(int(indices[0]), int(indices[-1]) + 1)
            part = tuple(t[:, samples] for t in hidden) if isinstance(hidden, tuple) else hidden[:, samples]
            draws = [tuple(None if t is None else t[samples] for t in pair) for pair in drawn]
            results.append(self._call(part, inputs[samples], draws, stacked_params, start, cache_layers))
        outputs = results[0] if len(results) == 1 else [torch.cat(tensors, 1) for tensors in zip(*results, strict=True)]
        return _by_layer(outputs, cache_layers)

    def _call(self, *arguments: Any) -> tuple[Any, ...]:
        """Return `forward(*arguments)`, by a CUDA graph if there is one."""
        if self.graphs is None:
            return self.forward(*arguments)
        return self.graphs(self._forward_with, arguments, {**dict(self.named_parameters()), **dict(self.named_buffers())})

    def _forward_with(self, weights: Mapping[str, Tensor], *arguments: Any) -> tuple[Tensor, ...]:
        """Return `forward(*arguments)` with other tensors instead of some weights, by name."""
        return torch.func.functional_call(self, dict(weights), arguments) if weights else self.forward(*arguments)

    def forward(
        self, hidden: Hidden, inputs: Tensor, drawn: Draws, stacked_params: StackedParams | None, start: int, cache_layers: Collection[int]
    ) -> tuple[Tensor, ...]:
        """Return unit features `[K, B, F]`, followed by the tensors of the cached inputs of the blocks `cache_layers`, from the lowest up.

        drawn: (router noise, dropout mask) of each block from `start` on. The K axis appears at the first block with stacked parameters.
        See `run` for the other arguments.
        """
        read, visible = self.stem_and_head.reads(inputs), self.stem_and_head.visible(inputs)
        reads = {} if read is None else {self.depth: read}
        cached: tuple[Tensor, ...] = ()
        recompute = self.checkpoint and torch.is_grad_enabled()
        for layer, (router, dropout_mask) in enumerate(drawn, start):
            block = self.block(layer)
            router = None if router is None else router.to(self.dtype)
            if dropout_mask is not None and layer in reads:
                dropout_mask = select_positions(dropout_mask[None], reads[layer])[0]
            stacked = stacked_params.get(block.unit.id) if stacked_params else None
            arguments = (hidden, stacked, Context(router, dropout_mask, reads.get(layer), visible))
            if recompute:
                hidden, cached_input = checkpoint(block, *arguments, use_reentrant=False, preserve_rng_state=False)
            else:
                hidden, cached_input = block(*arguments)
            if layer in cache_layers:
                cached += cached_input
            del arguments, cached_input  # keep the peak memory within a block
        return unit_features(hidden, inputs, self.stem_and_head), *cached


def _by_layer(outputs: Sequence[Tensor], cache_layers: Collection[int]) -> tuple[Tensor, dict[int, tuple[Tensor, ...]]]:
    """Return the features and the cached inputs by layer, from the outputs of `Tower.forward`: equally many tensors for each layer."""
    features, *cached = outputs
    size = len(cached) // max(1, len(cache_layers))
    return features, {layer: tuple(cached[k * size : (k + 1) * size]) for k, layer in enumerate(sorted(cache_layers))}


@perturbable(difference)
def unit_features(hidden: Any, inputs: Tensor, stem_and_head: Any) -> Tensor:
    """Return the pooled hidden state `[K, B, R, D]` scaled to length 1, `[K, B, F]`, in float32 or wider."""
    hidden = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
    return F.normalize(stem_and_head(inputs, hidden.flatten(0, 1)), dim=-1).unflatten(0, hidden.shape[:2])
