"""Finite differences without cancellation: a tensor together with its change under a perturbation.

The difference of two evaluations has a rounding error relative to their values, which is large relative to a small change. A `Perturbed`
carries the change itself through the model, as a dual number carries a derivative, but exactly and for a perturbation of any size. The
rounding error is then relative to the change, so zeroth order works with matrix products in bfloat16. Functions and operators of torch work
for Perturbed tensors too, if they return floating-point tensors and change none in place.
"""

# K perturbations: the first axis of the change has size K, that of the base has size 1

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

RESHAPING = {"expand", "flatten", "permute", "reshape", "squeeze", "transpose", "unflatten", "unsqueeze", "view"}
DIVIDING = {"chunk", "getitem", "select", "split", "tensor_split", "unbind"}
REARRANGING = {"cat", "clone", "contiguous", "detach", "neg", "stack"} | RESHAPING | DIVIDING


def _operator(function: Callable) -> Any:
    """Return the method of a class for an operator, which computes a function of torch."""
    return lambda self, *others: self.__torch_function__(function, (), (self, *others))


class Perturbed:
    """A base and its change. A torch function f returns the base f(base) and the change f(base + change) - f(base).

    One of the rules below computes the change; which one depends on f. Base and change are float32 or wider. `dtype` is the dtype of the
    factors of matrix products.
    """

    def __init__(self, base: Tensor, change: Tensor, dtype: torch.dtype | None = None):
        self.dtype = dtype or base.dtype
        self.base, self.change = (t.to(_wide(self.dtype)) for t in (base, change))
        self.shape, self.ndim, self.device = change.shape, change.ndim, base.device

    @property
    def moved(self) -> Tensor:
        return self.base + self.change

    def to(self, dtype: torch.dtype) -> "Perturbed":
        return Perturbed(self.base, self.change, dtype)

    @classmethod
    def __torch_function__(cls, function: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        """Compute a torch function of which an argument is Perturbed."""
        name = function.__name__.strip("_")
        if function.__name__ == f"{name}_":
            raise TypeError(f"{function.__name__}: a Perturbed tensor cannot be changed in place; use {name}")
        rule = rearrange if name in REARRANGING else RULES.get(name, difference)
        return rule(function, *args, **(kwargs or {}))

    def __getattr__(self, name: str) -> Callable:
        """Return a method of torch.Tensor that works on this pair."""
        method = getattr(Tensor, name)
        if not callable(method):
            raise AttributeError(f"a Perturbed tensor has no .{name}; use a function of torch")
        return lambda *args, **kwargs: self.__torch_function__(method, (), (self, *args), kwargs)

    __getitem__, __neg__, __abs__ = _operator(Tensor.__getitem__), _operator(torch.neg), _operator(torch.abs)
    __add__ = __radd__ = _operator(torch.add)
    __mul__ = __rmul__ = _operator(torch.mul)
    __sub__, __matmul__, __truediv__, __pow__ = (_operator(f) for f in (torch.sub, torch.matmul, torch.div, torch.pow))

    def __rsub__(self, other: Any) -> "Perturbed":
        return -self + other

    def __rtruediv__(self, other: Any) -> "Perturbed":
        return difference(torch.div, other, self)


def rearrange(function: Callable, *args: Any, **kwargs: Any) -> Any:
    """Rule for functions that only rearrange numbers: apply the function to base and to change."""
    if function.__name__ in ("cat", "stack") and any(isinstance(x, Tensor) for x in tree_leaves((args, kwargs))):
        return difference(function, *args, **kwargs)  # a tensor among pairs does not change
    dtype = _dtype((args, kwargs))
    base, change = (function(*tree_map(part, args), **tree_map(part, kwargs)) for part in (_base, _change))
    if isinstance(base, Tensor):
        return Perturbed(base, change, dtype)
    return tuple(Perturbed(b, c, dtype) for b, c in zip(base, change, strict=True))


def add_changes(function: Callable, a: Any, b: Any) -> Perturbed:
    """Rule for sums: add the changes."""
    changes = [a.change] if isinstance(a, Perturbed) else []
    if isinstance(b, Perturbed):
        changes.append(-b.change if function.__name__.strip("_") == "sub" else b.change)
    base, change = function(_base(a), _base(b)), sum(changes[1:], changes[0])
    return Perturbed(base, change.expand(torch.broadcast_shapes(change.shape, base.shape)), _dtype((a, b)))


def product(function: Callable, a: Any, b: Any, *bias: Any) -> Perturbed:
    """Rule for products, which are linear in a and in b: (a + da)(b + db) + c + dc - (a b + c) = da b + (a + da) db + dc, bias c."""
    if any(isinstance(c, Perturbed) for c in bias) and not isinstance(b, Perturbed):
        return difference(function, a, b, *bias)
    dtype = _dtype((a, b))
    narrow = _wide(dtype) if function.__name__.strip("_") == "mul" else dtype

    def multiplied(*factors: Any) -> Tensor:
        with WideSums() if narrow != _wide(dtype) else contextlib.nullcontext():
            return function(*(_cast(x, narrow) for x in factors))

    changes = [multiplied(a.change, _base(b))] if isinstance(a, Perturbed) else []
    if isinstance(b, Perturbed):
        changes.append(multiplied(_moved(a), b.change, *(c.change for c in bias if isinstance(c, Perturbed))))
    return Perturbed(multiplied(_base(a), _base(b), *map(_base, bias)), sum(changes[1:], changes[0]), dtype)


def difference(function: Callable, *args: Any, **kwargs: Any) -> Perturbed:
    """Rule for all other functions: evaluate twice, in float32 or wider, and subtract."""
    dtype = _dtype((args, kwargs))

    def evaluated(part: Callable) -> Tensor:
        arguments, options = tree_map(lambda x: _cast(part(x), _wide(dtype)), (args, kwargs))
        return function(*arguments, **options)

    before, after = evaluated(_base), evaluated(_moved)
    return Perturbed(before, after - before, dtype)


RULES = {"add": add_changes, "sub": add_changes, "mul": product, "matmul": product, "linear": product}


class WideSums(TorchDispatchMode):
    """A context in which matrix products of bfloat16 factors return their float32 sums, without rounding them to bfloat16."""

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        aten = torch.ops.aten
        if function is aten.addmm.default:
            return self._product(aten.mm, *args[1:]) + args[0]
        if function in (aten.mm.default, aten.bmm.default):
            return self._product(function.overloadpacket, *args)
        return function(*args, **(kwargs or {}))

    def _product(self, operator: Any, a: Tensor, b: Tensor) -> Tensor:
        # the CPU has no operator with another output type
        return operator(a.float(), b.float()) if a.device.type == "cpu" else operator(a, b, torch.float32)


def perturbable(rule: Callable) -> Callable[[Callable], Callable]:
    """Let a function of tensors accept Perturbed tensors too; `rule` computes the result for them. Torch's functions do this already."""

    def decorate(function: Callable) -> Callable:
        @functools.wraps(function)
        def either(*args: Any, **kwargs: Any) -> Any:
            return rule(function, *args, **kwargs) if any(isinstance(x, Perturbed) for x in args) else function(*args, **kwargs)

        return either

    return decorate


def _part(name: str) -> Callable[[Any], Any]:
    """Return a function that takes this part of a Perturbed tensor, and any other value as it is."""
    return lambda x: getattr(x, name) if isinstance(x, Perturbed) else x


_base, _change, _moved = map(_part, ("base", "change", "moved"))


def _dtype(args: Any) -> torch.dtype:
    return next(x.dtype for x in tree_leaves(args) if isinstance(x, Perturbed))


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _cast(x: Any, dtype: torch.dtype) -> Any:
    return x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x
