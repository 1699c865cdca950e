"""Proof, at start and every so often, that the ranks run the same thing."""

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from dist_vlcl.dist.world import World


class DisagreementError(RuntimeError):
    """Ranks that should be equal are not; the message names what differs and where."""


def digest(tensors: Mapping[str, Tensor]) -> str:
    """Return a short digest of the names and bytes of some tensors."""
    h = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(tensors.items()):
        h.update(name.encode())
        h.update(tensor.detach().contiguous().cpu().flatten().view(torch.uint8).numpy().tobytes())
    return h.hexdigest()


def agree(world: World, what: str, value: Any, hint: str = "") -> None:
    """Raise DisagreementError on all ranks unless `value` is the same on each. All ranks call this."""
    values = world.gather_objects(value)
    odd = [rank for rank, other in enumerate(values) if other != values[0]]
    if odd:
        shown = "; ".join(f"rank {rank}: {str(values[rank])[:200]}" for rank in [0, *odd[:3]])
        raise DisagreementError(f"{what}: ranks {odd} differ from rank 0 ({shown}). {hint}".strip())
