"""Which sample comes when: pure functions of the shards' sizes and of a few numbers, never of ranks or workers."""

import hashlib
import random
from collections.abc import Mapping, Sequence
from typing import NamedTuple

ShardSizes = Mapping[int, Sequence[int]]  # class id -> samples in each of its shards


class SampleId(NamedTuple):
    class_id: int
    shard: int
    position: int  # in the shard


def generator(*parts: object) -> random.Random:
    """A random generator that is a function of `parts` alone, on every machine and in every process (hash() is not)."""
    text = "\x1f".join(map(str, parts))
    return random.Random(int.from_bytes(hashlib.blake2s(text.encode(), digest_size=16).digest(), "big"))


def train_order(sizes: ShardSizes, seed: int, task: int, epoch: int) -> list[SampleId]:
    """Every sample once: windows of about one shard of every class, shuffled inside.

    A window mixes all classes and is small enough to be held in memory, so that a shard is read once.
    """
    order: list[SampleId] = []
    for number, window in enumerate(_windows(sizes, seed, task, epoch)):
        samples = [SampleId(class_id, shard, position) for class_id, shard in window for position in range(sizes[class_id][shard])]
        generator(seed, task, epoch, "window", number).shuffle(samples)
        order += samples
    return order


def _windows(sizes: ShardSizes, seed: int, task: int, epoch: int) -> list[list[tuple[int, int]]]:
    """Lists of (class id, shard); with equal classes, window j holds the j-th shard of each class's own permutation."""
    windows: list[list[tuple[int, int]]] = [[] for _ in range(max((len(shards) for shards in sizes.values()), default=0))]
    for class_id, shards in sizes.items():
        draw = generator(seed, task, epoch, "class", class_id)
        shuffled = draw.sample(range(len(shards)), len(shards))
        # a class with few shards is spread over the epoch: packed in front, the last windows would hold the large classes alone
        offset = draw.random()
        for place, shard in enumerate(shuffled):
            windows[int((place + offset) * len(windows) / len(shards))].append((class_id, shard))
    return windows


def plain_order(sizes: ShardSizes) -> list[SampleId]:
    """Every sample once, class by class."""
    return [
        SampleId(class_id, shard, position)
        for class_id, shards in sizes.items()
        for shard, size in enumerate(shards)
        for position in range(size)
    ]


def held_out(sizes: ShardSizes, fraction: float, seed: int) -> list[SampleId]:
    """A seeded part of every class, at least one sample, in `plain_order`; none for fraction 0. A class's part is its own affair."""
    kept: set[SampleId] = set()
    for class_id in sizes if fraction > 0 else ():
        samples = plain_order({class_id: sizes[class_id]})
        kept |= set(generator(seed, "held out", class_id).sample(samples, max(1, round(len(samples) * fraction))))
    return [sample for sample in plain_order(sizes) if sample in kept]


def rank_slice(length: int, rank: int, size: int) -> range:
    """The contiguous part of `length` positions that rank `rank` of `size` takes; parts differ by at most one."""
    part, extra = divmod(length, size)
    start = rank * part + min(rank, extra)
    return range(start, start + part + (rank < extra))
