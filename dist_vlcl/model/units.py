"""Units: the adapters of both towers, each addressed by branch and layer, and the storage of those that learn by zeroth order."""

# n numbers in a flat buffer

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

BRANCHES = ("language", "vision")


@dataclass(frozen=True, order=True)
class UnitId:
    """Address of a unit; layers count from 1. Prints as `vision.3`."""

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
    """An adapter at its address; its tensors are parameters (first order) or buffers of the same names (zeroth order, frozen)."""

    def __init__(self, id: UnitId, adapter: nn.Module):
        self.id, self.adapter = id, adapter
        self.names = tuple(name for name, _ in adapter.named_parameters())

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors by name, without the axis of parameter sets."""
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
        """Return every tensor of every unit under `branch.layer/name`, whatever its order: a checkpoint moves between plans."""
        return {f"{id}/{name}": t.detach() for id, unit in self.items() for name, t in unit.tensors().items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Copy the tensors in; raise ValueError on a missing, unknown or misshapen one, with nothing changed."""
        own = self.state_dict()
        if set(own) != set(state):
            raise ValueError(f"adapter tensors do not match: {sorted(set(own) ^ set(state))[:4]} are in one of model and checkpoint only")
        for name, tensor in own.items():
            if tensor.shape != state[name].shape:
                raise ValueError(
                    f"adapter tensor {name}: the model has shape {tuple(tensor.shape)}, the checkpoint {tuple(state[name].shape)}"
                )
        for name, tensor in own.items():
            tensor.copy_(state[name])


class FlatUnits:
    """Units of one branch as views of one flat fp32 buffer, outside of every optimiser.

    Their parameters become module buffers under the same names: DDP and every ZeRO stage leave buffers alone, while in-place writes to
    engine-owned parameters are silently reverted (DeepSpeed #2424).
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
        """Make the module buffers views of the flat values, which are the truth.

        Call it after anything that may have replaced the buffers: accelerate's `prepare` does, and training would go on without effect.
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
        """Return K candidate values `[K, n]` as tensors `[K, ...]` by unit and name; views, nothing is copied."""
        result: dict[UnitId, dict[str, Tensor]] = {unit.id: {} for unit in self.units}
        for unit, name, shape, offset in self.layout:
            result[unit.id][name] = values_Kn[:, offset : offset + shape.numel()].view(-1, *shape)
        return result


def freeze(unit: Unit) -> None:
    """Turn a unit's parameters into buffers of the same names: no gradient, no optimiser."""
    for name in unit.names:
        tensor = getattr(unit.adapter, name)
        if isinstance(tensor, nn.Parameter):
            delattr(unit.adapter, name)
            unit.adapter.register_buffer(name, tensor.detach().clone())
