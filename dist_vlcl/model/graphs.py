"""CUDA graphs: a function of tensors is recorded once for the shapes it is called with, and from then on replayed in one launch.

A step is thousands of small kernels. A fast GPU is done with each before the next is launched, and waits; a replay has no such gaps, and
the same kernels, so the same bits.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from dist_vlcl.model.perturbed import Perturbed

Outputs = tuple[Tensor | None, ...]


class Graphs:
    """Graphs of one function, which returns a tensor that may have a gradient, and more that have none.

    function: of (nested tensors, options); it must not read anything back from the GPU. The first call with new shapes, options or places
    of weights runs as it is, the second is recorded. With gradients, a call's backward pass has to run before the next call.
    """

    KEPT = 8  # the longest unused is dropped

    def __init__(self, function: Callable[..., Outputs]):
        self.function = function
        self.graphs: dict[Any, _Graph | None] = {}
        self.pool: Any = None  # of what needs no gradients: such calls end before another begins, and share their memory

    def __call__(self, arguments: Any, options: tuple, weights: Sequence[Tensor]) -> Outputs:
        """Call the function. weights: what it reads besides its arguments; those that require a gradient get one."""
        leaves, spec = tree_flatten(arguments)
        tensors = [tensor for leaf in leaves for tensor in _parts(leaf)]
        learning = [w for w in weights if w.requires_grad] if torch.is_grad_enabled() else []
        places = tuple(w.data_ptr() for w in weights)
        key = (options, len(learning), places, tuple((*t.shape, t.dtype) for t in tensors), tuple(map(type, leaves)))
        if key not in self.graphs:
            self.graphs[key] = None
            self._drop()
            return self.function(arguments, options)
        graph = self.graphs.pop(key)
        if graph is None:

            def recorded(inputs: Sequence[Tensor]) -> Outputs:
                rest = iter(inputs)
                return self.function(tree_unflatten([_whole(leaf, rest) for leaf in leaves], spec), options)

            self.pool = self.pool or torch.cuda.graph_pool_handle()
            graph = _Graph(recorded, tensors, learning, torch.cuda.graph_pool_handle() if learning else self.pool)
        self.graphs[key] = graph
        return graph(tensors)

    def _drop(self) -> None:
        while len(self.graphs) > self.KEPT:
            del self.graphs[next(iter(self.graphs))]


class _Graph:
    """The function with certain shapes, recorded."""

    def __init__(self, function: Callable[[Sequence[Tensor]], Outputs], tensors: Sequence[Tensor], learning: list[Tensor], pool: Any):
        self.inputs, self.learning = [t.clone() for t in tensors], learning
        torch.cuda.empty_cache()  # what the first call left is of no use to another stream
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        # The thread that pins batches goes on meanwhile, and so may NCCL's.
        options: dict[str, Any] = {"pool": pool, "stream": stream, "capture_error_mode": "thread_local"}
        with torch.cuda.stream(stream):  # libraries make what they need for a stream at its first use
            first = function(self.inputs)[0]
            if learning and first is not None:
                torch.autograd.grad(first, learning, torch.zeros_like(first), allow_unused=True)
            del first
        torch.cuda.synchronize()
        self.forward, self.backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.forward, **options):
            self.outputs = function(self.inputs)
        self.slope: Tensor | None = None
        self.gradients: list[Tensor | None] = []
        if learning:
            result: Any = self.outputs[0]
            self.slope = torch.empty_like(result)
            with torch.cuda.graph(self.backward, **options):
                self.gradients = list(torch.autograd.grad(result, learning, self.slope, allow_unused=True))
            self.outputs = (result.detach(), *self.outputs[1:])

    def __call__(self, tensors: Sequence[Tensor]) -> Outputs:
        torch._foreach_copy_(self.inputs, list(tensors))
        first = _Replay.apply(self, *self.learning) if self.learning else self._replayed()
        return first, *(None if t is None else t.clone() for t in self.outputs[1:])

    def _replayed(self) -> Tensor:
        self.forward.replay()
        first: Any = self.outputs[0]
        return first.clone()


class _Replay(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, graph: _Graph, *learning: Tensor) -> Tensor:
        ctx.graph = graph
        return graph._replayed()

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor | None, ...]:
        graph = ctx.graph
        graph.slope.copy_(slopes[0])
        graph.backward.replay()
        found = [g for g in graph.gradients if g is not None]
        copies = iter(torch._foreach_mul(found, 1.0))  # the next replay writes where these are
        return None, *(None if g is None else next(copies) for g in graph.gradients)


def _parts(leaf: Any) -> tuple[Tensor, ...]:
    if isinstance(leaf, Perturbed):
        return leaf.base, leaf.change
    return (leaf,) if isinstance(leaf, Tensor) else ()


def _whole(leaf: Any, tensors: Any) -> Any:
    """Return the leaf with its tensors in place of those that it was recorded with."""
    if isinstance(leaf, Perturbed):
        return Perturbed(next(tensors), next(tensors), leaf.dtype)
    return next(tensors) if isinstance(leaf, Tensor) else leaf
