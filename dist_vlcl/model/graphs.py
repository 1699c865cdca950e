"""CUDA graphs: record a function once for each set of input shapes, then replay its kernels in one launch.

A step has thousands of small kernels, and a fast GPU finishes each one before the next is launched. A replay has no such gaps. It runs the
same kernels, so its results are bit-identical.
"""

import functools
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from dist_vlcl.model.perturbed import Perturbed

Outputs = tuple[Tensor | None, ...]

# Graphs kept, with gradients (True) and without. A graph with gradients has its own memory, those without share theirs. The one that was
# used longest ago is dropped. With zo.granularity=unit each block of a tower has its own: up to four for each of 24 blocks.
MAX_GRAPHS = {True: 2, False: 128}


class Graphs:
    """The recorded graphs of one function.

    The function takes weights by name, which replace its own, and arguments: nested tensors and plain values. It returns a tensor that may
    have a gradient, then tensors without one. It may depend on nothing else, because Python runs only while recording, and it must not
    read anything back from the GPU. The first call with new shapes, plain values or addresses of weights runs directly; the second is
    recorded. With gradients, the backward pass of a call must run before the next call.

    A recording that fails gives one warning. After it, this process records nothing more: torch does not promise that its allocator is in
    order then. Functions run directly instead, which gives the same bits.
    """

    has_failed: ClassVar[bool] = False  # a recording of this process

    def __init__(self) -> None:
        self.seen: set[Any] = set()
        self.graphs: dict[bool, dict[Any, Graph]] = {True: {}, False: {}}
        self.pool: Any = None  # of graphs without gradients: such a call ends before another begins

    def __deepcopy__(self, memo: dict) -> None:
        """Copy a model without its graphs: the weights of the copy have other addresses."""

    def __call__(self, function: Callable[..., Outputs], arguments: tuple, weights: Mapping[str, Tensor]) -> Outputs:
        """Return `function({}, *arguments)`, if possible by a replay.

        weights: all that the function reads besides its arguments, by name. Those that require a gradient receive one.
        """
        leaves, spec = tree_flatten(arguments)
        tensors = [tensor for leaf in leaves for tensor in _parts(leaf)]
        learning = {name: w for name, w in weights.items() if w.requires_grad} if torch.is_grad_enabled() else {}
        key = (tuple(w.data_ptr() for w in weights.values()), str(spec), tuple(map(_kind, leaves)))

        def of_tensors(inputs: Sequence[Tensor], replacements: Mapping[str, Tensor]) -> Outputs:
            rest = iter(inputs)
            return function(replacements, *tree_unflatten([_rebuilt(leaf, rest) for leaf in leaves], spec))

        graphs = self.graphs[bool(learning)]
        if key not in graphs and (bool(learning), key) in self.seen and not Graphs.has_failed:
            self._record(key, of_tensors, tensors, learning)
        if key not in graphs:
            self.seen.add((bool(learning), key))
            # Clones: their alignment, by which libraries choose kernels, is that of a graph's inputs.
            return of_tensors([t.clone() for t in tensors], {})
        graphs[key] = graphs.pop(key)  # the newest
        return graphs[key](tensors)

    def _record(self, key: Any, function: Callable[..., Outputs], tensors: Sequence[Tensor], learning: Mapping[str, Tensor]) -> None:
        """Add a recording. If it fails, warn, and drop all of this function's: memory may be short."""
        graphs, self.pool = self.graphs[bool(learning)], self.pool or torch.cuda.graph_pool_handle()
        try:
            graphs[key] = Graph(function, tensors, learning, torch.cuda.graph_pool_handle() if learning else self.pool)
        except RuntimeError as error:
            Graphs.has_failed = True
            for recorded in self.graphs.values():
                recorded.clear()
            why = f"could not record the model as a CUDA graph ({error.__context__ or error}). Training is slower, with the same results."
            advice = "An adapter must not read values from the GPU. A smaller batch saves memory. model.graphs=false avoids this warning"
            warnings.warn(f"{why} {advice}", stacklevel=2)
        if Graphs.has_failed:
            torch.cuda.empty_cache()  # here, because the error held the tensors of the recording
        while len(graphs) > MAX_GRAPHS[bool(learning)]:
            del graphs[next(iter(graphs))]


class Graph:
    """One recording. Raises RuntimeError if the function cannot be recorded, or if the replay gives other numbers than the function.

    Gradients are taken of aliases of the learning weights. A weight's own autograd node may exist already (DDP and earlier micro-batches
    hold it), and it belongs to the stream on which it was made. Autograd would make that stream wait for the recording, which CUDA refuses.
    """

    unfinished: ClassVar[list[Any]] = []  # torch's allocator holds a pointer to a graph whose recording failed, so that graph must live

    def __init__(self, function: Callable[..., Outputs], tensors: Sequence[Tensor], learning: Mapping[str, Tensor], pool: Any):
        self.inputs = [t.clone() for t in tensors]
        torch.cuda.empty_cache()  # another stream cannot use the memory that the first call freed
        device = tensors[0].device
        stream = _stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        # If a recording fails, torch 2.11 leaves its stream as the current one. The end of this block restores the caller's.
        with torch.cuda.stream(stream):
            aliases = {name: w.detach().requires_grad_() for name, w in learning.items()}
            outputs = list(function(self.inputs, aliases))  # a first run on this stream lets libraries make their workspaces
            result: Any = outputs[0]
            if learning:
                self.grad_output = torch.linspace(0.5, 1.5, result.numel(), dtype=result.dtype, device=device).view_as(result)
                found = torch.autograd.grad(result, [*aliases.values(), *learning.values()], self.grad_output, allow_unused=True)
                if missed := [name for name, g in zip(learning, found[len(aliases) :], strict=True) if g is not None]:
                    raise RuntimeError(f"{missed[0]} is read in another way than as a parameter of its module")
                outputs += found[: len(aliases)]
            expected = [part.detach() for t in outputs for part in _parts(t)]
            del outputs, result
            torch.cuda.synchronize(device)
            # thread_local: other threads (the one that pins batches, NCCL's) may use CUDA meanwhile.
            self._capture(function, aliases, learning, pool=pool, stream=stream, capture_error_mode="thread_local")
        self._verify(expected)

    def _capture(self, function: Callable, aliases: Mapping[str, Tensor], learning: Mapping[str, Tensor], **options: Any) -> None:
        """Record the forward pass and, with learning weights, the backward pass. options: of `torch.cuda.graph`."""
        self.forward, self.backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        Graph.unfinished.append((self.forward, self.backward))
        with torch.cuda.graph(self.forward, **options):
            self.outputs = function(self.inputs, aliases)
        self.learning: list[Tensor] = []
        self.gradients: list[Tensor] = []
        if learning:
            result: Any = self.outputs[0]
            with torch.cuda.graph(self.backward, **options):
                found = torch.autograd.grad(result, list(aliases.values()), self.grad_output, allow_unused=True)
            self.outputs = (result.detach(), *self.outputs[1:])
            pairs = [(w, g) for w, g in zip(learning.values(), found, strict=True) if g is not None]
            self.learning, self.gradients = [w for w, _ in pairs], [g for _, g in pairs]
        Graph.unfinished.pop()

    def _verify(self, expected: list[Tensor]) -> None:
        """Compare a replay with the function's own results. A recording that reads from reused memory would give wrong numbers silently."""
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
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        graph = ctx.graph
        graph.grad_output.copy_(grad_outputs[0])
        graph.backward.replay()
        return None, *torch._foreach_mul(graph.gradients, 1.0)  # copies, because the next replay overwrites the gradients


# The stream of all recordings on a device. One is enough: freed memory and the workspaces of libraries belong to their stream.
_stream = functools.cache(torch.cuda.Stream)


def _is_near(found: Tensor, expected: Tensor) -> bool:
    """Return whether two tensors differ by at most a hundredth of the largest finite number, and are not finite in the same places."""
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


def _rebuilt(leaf: Any, tensors: Iterator[Tensor]) -> Any:
    """Return the leaf with the next tensors in place of the old ones."""
    if isinstance(leaf, Perturbed):
        return Perturbed(next(tensors), next(tensors), leaf.dtype)
    return next(tensors) if isinstance(leaf, Tensor) else leaf
