"""Proof, at start and every so often, that the ranks run the same thing."""

import hashlib
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from dist_vlcl.dist.world import World


class DisagreementError(RuntimeError):
    """Ranks that should be equal are not; the message names what differs and where."""


class ReplicaDivergedError(DisagreementError):
    """Ranks that were equal once are no longer."""


def digest(tensors: Mapping[str, Tensor]) -> str:
    """Return a short digest of the names and bytes of some tensors."""
    h = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(tensors.items()):
        h.update(name.encode())
        h.update(tensor.detach().contiguous().cpu().flatten().view(torch.uint8).numpy().tobytes())
    return h.hexdigest()


def agree(world: World, facts: Mapping[str, Any]) -> None:
    """Raise DisagreementError on all ranks, naming the fact and the ranks, unless every fact is the same on each. All ranks call this."""
    values = world.gather_objects(dict(facts), "what must agree")
    for what in facts:
        odd = [rank for rank, other in enumerate(values) if other.get(what) != values[0][what]]
        if odd:
            shown = "; ".join(f"rank {rank}: {str(values[rank].get(what))[:200]}" for rank in [0, *odd[:3]])
            raise DisagreementError(f"{what}: ranks {odd} differ from rank 0 ({shown})")


def agree_on_tensors(world: World, what: str, tensors: Mapping[str, Tensor]) -> None:
    """Raise ReplicaDivergedError on all ranks, naming ranks and tensors, unless the tensors are the same, bit for bit. All ranks call this.

    Ranks are compared with the majority; where there is none, with the lowest rank: which of two is right cannot be told.
    """
    if len(set(world.gather_objects(digest(tensors), what))) == 1:
        return
    each = world.gather_objects({name: digest({name: tensor}) for name, tensor in tensors.items()}, what)
    whole = [tuple(sorted(own.items())) for own in each]
    usual = whole.index(Counter(whole).most_common(1)[0][0])
    odd = {rank: [name for name in each[rank] if each[rank][name] != each[usual].get(name)] for rank in range(world.size)}
    told = [f"{world.collectives.named(rank)} in {_listed(names)}" for rank, names in odd.items() if names]
    raise ReplicaDivergedError(f"{what}: ranks {[rank for rank in odd if odd[rank]]} differ from rank {usual}: {'; '.join(told)}")


def _listed(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more tensors" if len(names) > 3 else "")
