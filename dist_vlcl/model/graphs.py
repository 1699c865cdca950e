"""CUDA graphs: a function of tensors is recorded once for the shapes it is called with, and from then on replayed in one launch.

A step is thousands of small kernels. A fast GPU is done with each before the next is launched, and waits; a replay has no such gaps, and
the same kernels, so the same bits.
"""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from dist_vlcl.model.perturbed import Perturbed

Outputs = tuple[Tensor | None, ...]

KEPT = {True: 2, False: 32}  # graphs with gradients, each with memory of its own, and without, which share theirs; the oldest is dropped


class Graphs:
    """Graphs of one function, which returns a tensor that may have a gradient, and more that have none.

    It takes nested tensors, options, and weights that stand in for its own, by name. It depends on these and on the weights alone: what
    Python computes in it is computed once, and it must not read anything back from the GPU. The first call with new shapes, options or
    places of weights runs as it is, the second is recorded. With gradients, a call's backward pass has to run before the next call.
    """

    def __init__(self) -> None:
        self.seen: set[Any] = set()
        self.graphs: dict[bool, dict[Any, Graph]] = {True: {}, False: {}}
        self.pool: Any = None  # of graphs without gradients: such a call ends before another begins

    def __deepcopy__(self, memo: dict) -> None:
        """Have none in a copy, whose weights are elsewhere."""
        return None

    def __call__(self, function: Callable[..., Outputs], arguments: Any, options: tuple, weights: Mapping[str, Tensor]) -> Outputs:
        """Call the function. weights: what it reads besides its arguments, by name; those that require a gradient get one."""
        leaves, spec = tree_flatten(arguments)
        tensors = [tensor for leaf in leaves for tensor in _parts(leaf)]
        learning = {name: w for name, w in weights.items() if w.requires_grad} if torch.is_grad_enabled() else {}
        key = (options, tuple(w.data_ptr() for w in weights.values()), str(spec), tuple(map(_kind, leaves)))

        def of_flat(inputs: Sequence[Tensor], standing_in: Mapping[str, Tensor]) -> Outputs:
            rest = iter(inputs)
            return function(tree_unflatten([_whole(leaf, rest) for leaf in leaves], spec), options, standing_in)

        graphs = self.graphs[bool(learning)]
        if (bool(learning), key) not in self.seen:
            self.seen.add((bool(learning), key))
            return of_flat([t.clone() for t in tensors], {})  # aligned as those of the graph, for which libraries may have other kernels
        if key not in graphs:
            graphs[key] = self._recorded(of_flat, tensors, learning)
            while len(graphs) > KEPT[bool(learning)]:
                del graphs[next(iter(graphs))]
        graphs[key] = graphs.pop(key)  # the newest
        return graphs[key](tensors)

    def _recorded(self, function: Callable[..., Outputs], tensors: Sequence[Tensor], learning: Mapping[str, Tensor]) -> "Graph":
        if self.pool is None:
            self.pool = torch.cuda.graph_pool_handle()
        try:
            return Graph(function, tensors, learning, torch.cuda.graph_pool_handle() if learning else self.pool)
        except RuntimeError as error:
            raise RuntimeError(
                f"the model cannot be recorded as a CUDA graph ({error}). An adapter that reads values back from the GPU, or a GPU that is "
                "short of memory, needs model.graphs=false"
            ) from error


class Graph:
    """A function of tensors of certain shapes, recorded. RuntimeError where it cannot be, or where its replay gives other numbers.

    Gradients are those of aliases of the weights that learn. A weight's own node may be there already (DDP holds it, as does a micro-batch
    before this one), and belongs to the stream where it was made: autograd would have that stream wait for a recording, which is refused.
    """

    def __init__(self, function: Callable[..., Outputs], tensors: Sequence[Tensor], learning: Mapping[str, Tensor], pool: Any):
        self.inputs = [t.clone() for t in tensors]
        torch.cuda.empty_cache()  # what the first call left is of no use to another stream
        device = tensors[0].device
        stream = _stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):  # libraries make what they need for a stream at its first use
            aliases = {name: w.detach().requires_grad_() for name, w in learning.items()}
            outputs = list(function(self.inputs, aliases))
            result: Any = outputs[0]
            if learning:
                self.slope = torch.linspace(0.5, 1.5, result.numel(), dtype=result.dtype, device=device).view_as(result)
                found = torch.autograd.grad(result, [*aliases.values(), *learning.values()], self.slope, allow_unused=True)
                if missed := [name for name, g in zip(learning, found[len(aliases) :], strict=True) if g is not None]:
                    raise RuntimeError(f"{missed[0]} is read in another way than as a parameter of its module")
                outputs += found[: len(aliases)]
            expected = [part.detach() for t in outputs for part in _parts(t)]
            del outputs, result
        torch.cuda.synchronize(device)
        # The thread that pins batches goes on meanwhile, and so may NCCL's.
        options: dict[str, Any] = {"pool": pool, "stream": stream, "capture_error_mode": "thread_local"}
        self.forward, self.backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.forward, **options):
            self.outputs = function(self.inputs, aliases)
        self.learning: list[Tensor] = []
        self.gradients: list[Tensor] = []
        if learning:
            result = self.outputs[0]
            with torch.cuda.graph(self.backward, **options):
                found = torch.autograd.grad(result, list(aliases.values()), self.slope, allow_unused=True)
            self.outputs = (result.detach(), *self.outputs[1:])
            pairs = [(w, g) for w, g in zip(learning.values(), found, strict=True) if g is not None]
            self.learning, self.gradients = [w for w, _ in pairs], [g for _, g in pairs]
        self._verify(expected)

    def _verify(self, expected: list[Tensor]) -> None:
        """Compare a replay with the function's own numbers: one that read from memory since reused would be wrong in silence."""
        self.forward.replay()
        if self.learning:
            self.backward.replay()
        found = [part for t in (*self.outputs, *self.gradients) for part in _parts(t)]
        if not all(_is_near(f, e) for f, e in zip(found, expected, strict=True)):
            raise RuntimeError("its replay gives other numbers than the model itself")

    def __call__(self, tensors: Sequence[Tensor]) -> Outputs:
        torch._foreach_copy_(self.inputs, list(tensors))
        first = _Replay.apply(self, *self.learning) if self.learning else self.replayed()
        return first, *(None if t is None else t.clone() for t in self.outputs[1:])

    def replayed(self) -> Tensor:
        self.forward.replay()
        first: Any = self.outputs[0]
        return first.clone()


class _Replay(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, graph: Graph, *learning: Tensor) -> Tensor:
        ctx.graph = graph
        return graph.replayed()

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor | None, ...]:
        graph = ctx.graph
        graph.slope.copy_(slopes[0])
        graph.backward.replay()
        return None, *torch._foreach_mul(graph.gradients, 1.0)  # copies: the next replay writes where these are


@functools.cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    """Return the one stream of all recordings: freed memory serves its own stream only, and libraries keep a workspace for each."""
    return torch.cuda.Stream(device)


def _is_near(found: Tensor, expected: Tensor) -> bool:
    """Whether two tensors differ by at most a hundredth of the largest finite number; what is not finite has to be in the same places."""
    f, e = found.double(), expected.double()
    largest = float(e.nan_to_num(0, 0, 0).abs().max()) if e.numel() else 0.0
    return torch.allclose(f, e, rtol=0, atol=0.01 * largest, equal_nan=True)


def _kind(leaf: Any) -> Any:
    if isinstance(leaf, Perturbed):
        return leaf.dtype, _kind(leaf.base), _kind(leaf.change)
    return (*leaf.shape, leaf.dtype) if isinstance(leaf, Tensor) else leaf


def _parts(leaf: Any) -> tuple[Tensor, ...]:
    if isinstance(leaf, Perturbed):
        return leaf.base, leaf.change
    return (leaf,) if isinstance(leaf, Tensor) else ()


def _whole(leaf: Any, tensors: Iterator[Tensor]) -> Any:
    """Return the leaf with the next tensors in place of its own."""
    if isinstance(leaf, Perturbed):
        return Perturbed(next(tensors), next(tensors), leaf.dtype)
    return next(tensors) if isinstance(leaf, Tensor) else leaf
