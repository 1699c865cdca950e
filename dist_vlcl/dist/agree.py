"""Check that the ranks run the same thing: at the start, and again every few steps."""

import hashlib
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from dist_vlcl.dist.world import World
from dist_vlcl.options import flatten


class DisagreementError(RuntimeError):
    """Ranks that must be equal differ. The message names what differs and on which ranks."""


class ReplicaDivergedError(DisagreementError):
    """The adapters of some ranks became different during the run."""


def digest(tensors: Mapping[str, Tensor]) -> str:
    """Return a short digest of the names and bytes of some tensors."""
    h = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(tensors.items()):
        h.update(name.encode())
        h.update(tensor.detach().contiguous().cpu().flatten().view(torch.uint8).numpy().tobytes())
    return h.hexdigest()


def agree(world: World, facts: Mapping[str, Any], hint: str = "") -> None:
    """Raise DisagreementError on all ranks if a fact differs between ranks. All ranks call this, with small picklable facts.

    Dictionaries are compared entry by entry, so the message can name `configuration.train.batch_size`. The `hint` says what the user can do
    about a difference.
    """
    values = world.gather_objects(flatten(facts), " and ".join(facts))
    problems = []
    for name in dict.fromkeys(name for own in values for name in own):
        if odd := [rank for rank, own in enumerate(values) if own.get(name) != values[0].get(name)]:
            shown = "; ".join(f"rank {rank}: {str(values[rank].get(name))[:200]}" for rank in [0, *odd[:3]])
            problems.append(f"{name}: ranks {odd} differ from rank 0 ({shown})")
    if problems:
        raise DisagreementError(f"{'. '.join(problems[:3])}. {hint}".strip())


def agree_on_tensors(world: World, what: str, tensors: Mapping[str, Tensor]) -> None:
    """Raise ReplicaDivergedError on all ranks, naming ranks and tensors, if the tensors are not bit-identical. All ranks call this.

    Ranks are compared with the majority. Without a majority they are compared with the lowest rank: which one is right is unknown.
    """
    if len(set(world.gather_objects(digest(tensors), what))) == 1:
        return
    each = world.gather_objects({name: digest({name: tensor}) for name, tensor in tensors.items()}, what)
    replicas = [tuple(sorted(own.items())) for own in each]
    usual = replicas.index(Counter(replicas).most_common(1)[0][0])
    odd = {rank: [name for name in each[rank] if each[rank][name] != each[usual].get(name)] for rank in range(world.size)}
    where = [f"{world.collectives.named(rank)} in {len(names)} tensors, {', '.join(names[:3])}" for rank, names in odd.items() if names]
    raise ReplicaDivergedError(f"{what}: ranks {[rank for rank in odd if odd[rank]]} differ from rank {usual}: {'; '.join(where)}")
