"""Units: the adapters of both towers, addressed by branch and layer, and the flat buffers of the zeroth-order ones."""

# K parameter sets, n parameters of a branch

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

BRANCHES = ("language", "vision")


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

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors by name, without the K axis."""
        return {name: getattr(self.adapter, name) for name in self.names}

    @property
    def numel(self) -> int:
        return sum(t.numel() for t in self.tensors().values())


class Units(Mapping[UnitId, Unit]):
    """All units of a model, language first, each branch from layer 1 up."""

    def __init__(self, units: list[Unit]):
        self._units = {unit.id: unit for unit in sorted(units, key=lambda u: u.id)}

    def __getitem__(self, id: UnitId) -> Unit:
        return self._units[id]

    def __iter__(self) -> Iterator[UnitId]:
        return iter(self._units)

    def __len__(self) -> int:
        return len(self._units)

    def state_dict(self) -> dict[str, Tensor]:
        """Return every tensor of every unit under `branch.layer/name`. The names do not depend on the order plan."""
        return {f"{id}/{name}": t.detach() for id, unit in self.items() for name, t in unit.tensors().items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Copy the tensors in. Raises ValueError, with nothing changed, if a name is missing or unknown, or a shape differs."""
        own = self.state_dict()
        if set(own) != set(state):
            raise ValueError(
                f"adapter tensors do not match: {sorted(set(own) ^ set(state))[:4]} are only in the model or only in the checkpoint"
            )
        for name, tensor in own.items():
            if tensor.shape != state[name].shape:
                raise ValueError(
                    f"adapter tensor {name}: the model has shape {tuple(tensor.shape)}, the checkpoint {tuple(state[name].shape)}"
                )
        for name, tensor in own.items():
            tensor.copy_(state[name])


class FlatUnits:
    """Zeroth-order units of one branch, as views of one flat fp32 buffer that no optimiser sees.

    Their parameters become module buffers with the same names. DDP and every ZeRO stage ignore buffers, whereas DeepSpeed silently reverts
    in-place writes to parameters that it owns (DeepSpeed #2424).
    """

    def __init__(self, units: list[Unit]):
        self.units = units
        self.slices: dict[UnitId, slice] = {}
        self.layout: list[tuple[Unit, str, torch.Size, int]] = []
        stop = 0
        for unit in units:
            start = stop
            for name, tensor in unit.tensors().items():
                self.layout.append((unit, name, tensor.shape, stop))
                stop += tensor.numel()
            self.slices[unit.id] = slice(start, stop)
        device = next(iter(units[0].tensors().values())).device if units else None
        self.values_n = torch.empty(stop, dtype=torch.float32, device=device)
        for unit, name, shape, offset in self.layout:
            parameter = getattr(unit.adapter, name)
            self.values_n[offset : offset + shape.numel()] = parameter.detach().flatten()
            delattr(unit.adapter, name)
            unit.adapter.register_buffer(name, None)
        self.rebind_views()

    def rebind_views(self) -> None:
        """Make the module buffers views of the flat values again.

        Call it after anything that may replace buffers, such as accelerate's `prepare`. Otherwise updates would not reach the model.
        """
        for unit, name, shape, offset in self.layout:
            setattr(unit.adapter, name, self.values_n[offset : offset + shape.numel()].view(shape))

    @property
    def numel(self) -> int:
        return self.values_n.numel()

    def names(self) -> list[tuple[str, int]]:
        """Return (qualified name, number of elements) in flat order."""
        return [(f"{unit.id}/{name}", shape.numel()) for unit, name, shape, _ in self.layout]

    def stacked_params(self, values_Kn: Tensor) -> dict[UnitId, dict[str, Tensor]]:
        """Return K sets of values `[K, n]` as tensors `[K, ...]` by unit and name. They are views."""
        result: dict[UnitId, dict[str, Tensor]] = {unit.id: {} for unit in self.units}
        for unit, name, shape, offset in self.layout:
            result[unit.id][name] = values_Kn[:, offset : offset + shape.numel()].view(-1, *shape)
        return result


def freeze(unit: Unit) -> None:
    """Turn a unit's parameters into buffers with the same names, without gradient or optimiser."""
    for name in unit.names:
        tensor = getattr(unit.adapter, name)
        if isinstance(tensor, nn.Parameter):
            delattr(unit.adapter, name)
            unit.adapter.register_buffer(name, tensor.detach().clone())
