"""Units: the adapters of both towers, addressed by branch and layer, and the flat buffers of the zeroth-order ones."""

# n parameters of a branch

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
from torch import Tensor, nn


@dataclass(frozen=True, order=True)
class UnitId:
    """Address of a unit, printed as `vision.3`. Layers count from 1."""

    branch: str
    layer: int

    def __str__(self) -> str:
        return f"{self.branch}.{self.layer}"

    @classmethod
    def parse(cls, text: str) -> "UnitId":
        """Return the address that prints as `text`."""
        branch, layer = text.split(".")
        return cls(branch, int(layer))


class Unit:
    """An adapter and its address. Its tensors are parameters (first order) or buffers with the same names (zeroth order, frozen)."""

    def __init__(self, id: UnitId, adapter: nn.Module):
        self.id, self.adapter = id, adapter
        self.names = tuple(name for name, _ in adapter.named_parameters())
        if inner := [name for name in self.names if "." in name]:
            raise ValueError(f"{type(adapter).__name__}.{inner[0]}: make it a parameter of the adapter itself, not of a module in it")

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors by name, without the K axis."""
        return {name: getattr(self.adapter, name) for name in self.names}

    @property
    def numel(self) -> int:
        return sum(t.numel() for t in self.tensors().values())


class Units(dict[UnitId, Unit]):
    """All units of a model, language first, each branch from layer 1 up."""

    def __init__(self, units: list[Unit]):
        super().__init__({unit.id: unit for unit in sorted(units, key=lambda unit: unit.id)})

    def state_dict(self) -> dict[str, Tensor]:
        """Return every tensor of every unit under `branch.layer/name`. The names do not depend on the order plan."""
        return {f"{id}/{name}": t.detach() for id, unit in self.items() for name, t in unit.tensors().items()}

    def check(self, state: Mapping[str, Tensor]) -> None:
        """Raise ValueError if a name is missing or unknown, or a shape differs."""
        shapes, saved = ({name: tuple(t.shape) for name, t in tensors.items()} for tensors in (self.state_dict(), state))
        if odd := sorted(name for name in {**shapes, **saved} if shapes.get(name) != saved.get(name)):
            found = "; ".join(f"{name}: the model has {shapes.get(name)}, the file {saved.get(name)}" for name in odd[:4])
            raise ValueError(f"the shapes of {len(odd)} adapter tensors differ ({found})")

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Copy the tensors in. Raises ValueError, with nothing changed, if they are not those of this model."""
        self.check(state)
        for name, tensor in self.state_dict().items():
            tensor.copy_(state[name])


class FlatTensors:
    """The tensors of some units of one branch, by names such as `vision.3/router`, as one flat tensor. Replay works on these."""

    def __init__(self, tensors: Mapping[str, Tensor]):
        self.values_n = torch.cat([tensor.flatten() for tensor in tensors.values()])
        self.shapes: dict[UnitId, dict[str, torch.Size]] = {}
        for place, tensor in tensors.items():
            unit, name = place.split("/")
            self.shapes.setdefault(UnitId.parse(unit), {})[name] = tensor.shape
        stops = accumulate((sum(shape.numel() for shape in shapes.values()) for shapes in self.shapes.values()), initial=0)
        self.slices = {id: slice(*place) for id, place in zip(self.shapes, pairwise(stops), strict=True)}

    def names(self) -> list[tuple[str, int]]:
        """Return (qualified name, number of elements) in flat order."""
        return [(f"{id}/{name}", shape.numel()) for id, shapes in self.shapes.items() for name, shape in shapes.items()]

    def units_in(self, part: slice) -> list[UnitId]:
        """Return the units that lie in a part of the flat values."""
        return [id for id, place in self.slices.items() if part.start <= place.start < part.stop]

    def views(self, values: Tensor, part: slice | None = None) -> dict[UnitId, dict[str, Tensor]]:
        """Return values `[..., n]` as tensors `[..., *shape]` by unit and name. They are views.

        part: the slice of the flat values that `values` has; None: all.
        """
        own = {id: self.shapes[id] for id in (self.shapes if part is None else self.units_in(part))}
        parts = iter(values.split([shape.numel() for shapes in own.values() for shape in shapes.values()], -1))
        return {id: {name: next(parts).unflatten(-1, shape) for name, shape in shapes.items()} for id, shapes in own.items()}

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors by qualified name; they are views of `values_n`."""
        return {f"{id}/{name}": t for id, tensors in self.views(self.values_n).items() for name, t in tensors.items()}


class FlatUnits(FlatTensors):
    """Zeroth-order units of one branch, as views of one flat fp32 buffer that no optimiser sees.

    Their parameters become module buffers with the same names. DDP and every ZeRO stage ignore buffers, whereas DeepSpeed silently reverts
    in-place writes to parameters that it owns (DeepSpeed #2424).
    """

    def __init__(self, units: list[Unit]):
        self.units = Units(units)
        super().__init__({name: tensor.float() for name, tensor in self.units.state_dict().items()})
        for unit in units:
            freeze(unit)
        self.rebind_views()

    def rebind_views(self) -> None:
        """Make the module buffers views of the flat values again.

        Call it after anything that may replace buffers, such as accelerate's `prepare`. Otherwise updates would not reach the model.
        """
        for id, tensors in self.views(self.values_n).items():
            for name, tensor in tensors.items():
                setattr(self.units[id].adapter, name, tensor)


def freeze(unit: Unit) -> None:
    """Turn a unit's parameters into buffers with the same names, without gradient or optimiser."""
    for name in unit.names:
        tensor = getattr(unit.adapter, name)
        if isinstance(tensor, nn.Parameter):
            delattr(unit.adapter, name)
            unit.adapter.register_buffer(name, tensor.detach().clone())
