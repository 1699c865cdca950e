"""Counted costs, the same on any machine however busy: FLOPs, bytes kept for the backward pass, bytes alive at the peak.

Counts need shapes, not numbers, so any size can be counted anywhere: put the model on the `meta` device and work `without_numbers`.
"""

import contextlib
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry


class Flops(TorchDispatchMode):
    """Within it, `total` counts the FLOPs (two per multiply-add) of matrix products, convolutions and attention, by torch's formulas.

    torch's FlopCounterMode also attributes them to modules, by hooks that fail on views of parameters made under no_grad.
    """

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        formula = flop_registry.get(function.overloadpacket)
        if formula is not None:
            if function._overloadname == "dtype":  # of a product whose sums stay wide (model/perturbed.py), which the formulas do not know
                args = args[:2]
            self.total += formula(*args, **kwargs, out_val=result)
        return result


def flops(work: Callable[[], Any]) -> int:
    """Return the FLOPs that `work` executes."""
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # open_clip's attention without a graph is else one operator, which has no formula
    try:
        with Flops() as counter:
            work()
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
    return counter.total


def saved_bytes(work: Callable[[], Any], besides: Iterable[Tensor] = ()) -> int:
    """Return the bytes that the graph of `work()` keeps for the backward pass, each storage once, those of `besides` (weights) not."""
    known = {t.untyped_storage()._cdata for t in besides}
    kept: dict[int, Tensor] = {}  # holding the tensors keeps the addresses unique

    def pack(tensor: Tensor) -> Tensor:
        kept.setdefault(tensor.untyped_storage()._cdata, tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = work()
    total = sum(t.untyped_storage().nbytes() for address, t in kept.items() if address not in known)
    del result
    return total


class PeakBytes(TorchDispatchMode):
    """Within it, `peak` is the most bytes alive at a time in tensors made within it, without what an operator uses inside itself."""

    def __init__(self) -> None:
        super().__init__()
        self.alive = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._add(tensor.untyped_storage(), given)
        return result

    def _add(self, storage: torch.UntypedStorage, given: set[int]) -> None:
        address, size = storage._cdata, storage.nbytes()
        if address in self._known or address in given:
            return
        self._known.add(address)
        self.alive += size
        self.peak = max(self.peak, self.alive)
        weakref.finalize(storage, self._drop, address, size)

    def _drop(self, address: int, size: int) -> None:
        self._known.discard(address)
        self.alive -= size


def _attention(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0, is_causal: bool = False) -> Tensor:
    """Attention on the meta device as real devices do it: fused, without a matrix of all pairs."""
    fused: Any = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return fused(q, k, v, dropout_p, is_causal, attn_mask=None if attn_mask is None else attn_mask.to(q.dtype))[0]


class _Zeros(TorchDispatchMode):
    """Whatever is read from the meta device is zero."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is torch.ops.aten._local_scalar_dense.default and args[0].device.type == "meta":
            return 0 if not args[0].is_floating_point() else 0.0
        if function is torch.ops.aten._to_copy.default and args[0].device.type == "meta":
            target = kwargs.get("device")
            if target is not None and torch.device(target).type != "meta":
                return torch.zeros(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)
        return function(*args, **kwargs)


class Collectives(TorchDispatchMode):
    """Within it, `found` lists the exchanges of the process group: (operation, bytes that this rank contributes)."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, int]] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "c10d":
            name = function.overloadpacket.__name__.rstrip("_")
            given = args[1] if name.startswith("allgather") else args[0]  # all-gathers name their output first
            self.found.append((name, sum(t.nbytes for t in tree_leaves(given) if isinstance(t, Tensor))))
        return function(*args, **(kwargs or {}))


@contextlib.contextmanager
def without_numbers() -> Iterator[None]:
    """Let training code run on the meta device: a loss that it reads there is zero."""
    with _Zeros(), mock.patch.object(torch.nn.functional, "scaled_dot_product_attention", _attention):
        yield
