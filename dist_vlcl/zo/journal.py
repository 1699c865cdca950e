"""Zeroth-order units as a checkpoint holds them: what a journal is replayed on, without a model."""

# n numbers of a branch

from collections.abc import Mapping

import torch
from torch import Tensor


class StoredUnits:
    """The units of one branch, flat, from named tensors such as `vision.3/router`; units count in the order in which they come."""

    def __init__(self, tensors: Mapping[str, Tensor]):
        self.shapes = {name: tensor.shape for name, tensor in tensors.items()}
        self.values_n = torch.cat([tensor.flatten() for tensor in tensors.values()])

    @property
    def slices(self) -> dict[str, slice]:
        """Where each unit lies in the flat values; the tensors of a unit are neighbours."""
        result: dict[str, slice] = {}
        stop = 0
        for name, numel in self.names():
            unit = name.split("/")[0]
            result[unit] = slice(result[unit].start if unit in result else stop, stop + numel)
            stop += numel
        return result

    def names(self) -> list[tuple[str, int]]:
        """Return (qualified name, number of elements) in flat order."""
        return [(name, shape.numel()) for name, shape in self.shapes.items()]

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors by name, in their shapes; views of the flat values."""
        parts = self.values_n.split([shape.numel() for shape in self.shapes.values()])
        return {name: part.view(shape) for (name, shape), part in zip(self.shapes.items(), parts, strict=True)}
