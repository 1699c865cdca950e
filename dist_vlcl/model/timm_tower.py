"""Vision transformers of timm as towers: timm's own stem, blocks and head, with an adapter in each block."""

# K parameter sets, B images, L tokens, D width, F features

import contextlib
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dist_vlcl.model.perturbed import Perturbed
from dist_vlcl.model.tower import AdaptedBlock, Context, ImageStemAndHead

# The module of a block whose input is the sum after the attention, where an adapter beside the MLP reads; by class of the block.
MLP_INPUT = {"Block": "norm2", "RelPosBlock": "norm2", "EvaBlock": "norm2", "EvaBlockPostNorm": "mlp"}


class TimmStemAndHead(ImageStemAndHead):
    """What timm computes before and after the blocks of a vision transformer."""

    def take_blocks(self) -> list[tuple[Any, dict[str, Tensor]]]:
        """Move the blocks out of the model, and return each with the constant tensors that timm gives it beside its input.

        Such a constant is the rotary embedding of the positions.
        """
        trunk = self.visual.trunk
        self.norm, trunk.norm = trunk.norm, nn.Identity()
        blocks, recorders = list(trunk.blocks), [_Recorder() for _ in trunk.blocks]
        trunk.blocks = nn.Sequential(*recorders)
        with torch.no_grad():
            blank = torch.zeros(1, 3, *self.visual.image_size, device=next(trunk.parameters()).device)
            self.tokens, self.width = trunk.forward_features(blank).shape[1:]
        trunk.blocks = nn.Sequential()
        return [(block, recorder.constants) for block, recorder in zip(blocks, recorders, strict=True)]

    def embed(self, images: Tensor) -> Tensor:
        return self.visual.trunk.forward_features(self.normalized(images))

    def reads(self, images: Tensor) -> None:
        """Return None: timm's blocks compute all positions."""

    def pool(self, hidden: Tensor) -> Tensor:
        return self.visual.head(self.visual.trunk.forward_head(self.norm(hidden)))


class _Recorder(nn.Module):
    """Stands where a block was, and keeps the tensors that it gets beside its input."""

    def forward(self, x: Tensor, **arguments: Any) -> Tensor:
        self.constants = {name: value.detach() for name, value in arguments.items() if isinstance(value, Tensor)}
        return x


class WholeBlock(AdaptedBlock):
    """A frozen block that is called whole, with its adapter. Hooks reach the places inside where the adapter acts.

    It computes all positions. An adapter at the attention has no part of the block that could be cached, only the block's input.
    """

    def __init__(self, block: Any, adapter: Any, unit_id: Any, constants: dict[str, Tensor]):
        super().__init__(block, adapter, unit_id, causal=False)
        self.constants = tuple(constants)
        for name, tensor in constants.items():
            self.register_buffer(name, tensor, persistent=False)
        attention = block.attn
        if getattr(attention, "q_bias", None) is not None:  # EVA adds three biases in a product that no hook reaches
            attention.qkv.bias = nn.Parameter(torch.cat([attention.q_bias, attention.k_bias, attention.v_bias]), requires_grad=False)
            attention.q_bias = attention.k_bias = attention.v_bias = None

    def cached_input(self, x: Tensor, context: Context) -> tuple[Tensor, ...]:
        if self.adapter.site == "attention":
            return (x,)
        sums: list[Tensor] = []
        place = getattr(self.block, MLP_INPUT[type(self.block).__name__])
        with place.register_forward_pre_hook(lambda _, inputs: sums.append(inputs[0])):
            out = self._call(x)
        return sums[0].unflatten(0, tuple(x.shape[:2])), out

    def finish(self, cached_input: tuple[Tensor, ...], stacked_params: dict[str, Tensor], context: Context) -> Tensor:
        if self.adapter.site == "mlp":
            return super().finish(cached_input, stacked_params, context)
        x: Any = cached_input[0]
        copies = max(t.shape[0] for t in (x, *stacked_params.values()))
        if any(isinstance(t, Perturbed) for t in stacked_params.values()) and not isinstance(x, Perturbed):
            x = Perturbed(x, x.new_zeros(copies, *x.shape[1:]))

        def add(targets: str, _: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
            inputs_KBLD = inputs[0].unflatten(0, (copies, -1))
            parts = output.unflatten(0, (copies, -1)).chunk(len(targets), -1)
            moved = [self._adapted(part, inputs_KBLD, stacked_params, target) for part, target in zip(parts, targets, strict=True)]
            return torch.cat(moved, -1).flatten(0, 1)

        attention = self.block.attn
        fused = getattr(attention, "qkv", None)
        projections = {"qkv": fused} if fused is not None else {target: getattr(attention, f"{target}_proj") for target in "qkv"}
        with contextlib.ExitStack() as hooks:
            for targets, projection in projections.items():
                hooks.enter_context(projection.register_forward_hook(partial(add, targets)))
            return self._call(x.expand(copies, *x.shape[1:]))

    def _call(self, x: Any) -> Tensor:
        """Return the block's output `[K, B, L, D]`: K B samples at once, also where a perturbed x has one base for all K."""
        samples = x.expand(*x.shape).flatten(0, 1)
        return self.block(samples, **{name: getattr(self, name) for name in self.constants}).unflatten(0, tuple(x.shape[:2]))
