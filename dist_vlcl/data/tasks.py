"""Which classes and which samples come when.

A task is a set of classes. The order of its samples is a pure function of the shards' sizes, the seed, the task and the epoch. It does not
depend on the number of ranks or of loading processes.
"""

import hashlib
import random
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

ClassOrder = Sequence[int] | None  # of class ids; None: as they are numbered
ShardSizes = Mapping[int, Sequence[int]]  # class id -> number of samples in each of its shards


@dataclass(frozen=True)
class Task:
    """Some classes of a data set. The label of a class is its place among them."""

    index: int
    classes: tuple[int, ...]  # class ids of the data set, in the stream's order
    names: tuple[str, ...]  # for prompts, in the same order


class TaskStream(list[Task]):
    """The tasks of a run: an order of classes, cut into tasks of `increment` classes; the last task may be smaller.

    The first task has `base` classes, or `increment` if `base` is 0. `num_tasks` keeps only the first tasks.
    A list as `increment` gives the number of classes of every task.
    `whole_length` is the number of tasks without that. Raises ValueError, naming the option, if a value does not fit the classes.
    """

    def __init__(
        self, names: Sequence[str], increment: int | Sequence[int], order: ClassOrder = None, base: int = 0, num_tasks: int | None = None
    ) -> None:
        num_classes = len(names)
        order = range(num_classes) if order is None else order
        once, given = Counter(range(num_classes)), Counter(order)
        if once != given:
            wrong = f"missing {sorted(once - given)[:5]}, unknown or repeated {sorted(given - once)[:5]}"
            raise ValueError(f"tasks.order: list each class id from 0 to {num_classes - 1} once; {wrong}")
        if isinstance(increment, int):
            starts = [0, *range(base or increment, num_classes, max(1, increment))]
        else:
            starts = [sum(increment[:k]) for k in range(len(increment))]
        self.whole_length = len(starts)
        sizes = {"increment": (increment, 1, num_classes), "base": (base, 0, num_classes), "num_tasks": (num_tasks, 1, len(starts))}
        for option, (value, low, high) in sizes.items():
            if isinstance(value, int) and not low <= value <= high:
                raise ValueError(f"tasks.{option}={value}: choose from {low} to {high}")
        for index, (start, stop) in enumerate(zip(starts[:num_tasks], [*starts[1:], num_classes], strict=False)):
            classes = tuple(order[start:stop])
            self.append(Task(index, classes, tuple(names[class_id] for class_id in classes)))

    def seen(self, index: int) -> Task:
        """Return all classes up to and including task `index` as one task."""
        tasks = self[: self[index].index + 1]
        classes = tuple(class_id for task in tasks for class_id in task.classes)
        names = tuple(name for task in tasks for name in task.names)
        return Task(tasks[-1].index, classes, names)


class SampleId(NamedTuple):
    """Where a sample is stored."""

    class_id: int
    shard: int
    position: int  # in the shard


def generator(*parts: object) -> random.Random:
    """Return a random generator that depends on `parts` alone, on every machine and in every process; `hash()` would not do."""
    return random.Random(int.from_bytes(hashlib.blake2s("\x1f".join(map(str, parts)).encode(), digest_size=16).digest(), "big"))


def train_order(sizes: ShardSizes, seed: int, task: int, epoch: int) -> list[SampleId]:
    """Return every sample once, shuffled within windows of about one shard of every class.

    A window mixes all classes and fits in memory, so that each shard is read once.
    """
    order: list[SampleId] = []
    for number, window in enumerate(_windows(sizes, seed, task, epoch)):
        samples = _samples_of(window, sizes)
        generator(seed, task, epoch, "window", number).shuffle(samples)
        order += samples
    return order


def _windows(sizes: ShardSizes, seed: int, task: int, epoch: int) -> list[list[tuple[int, int]]]:
    """Return lists of (class id, shard). With classes of equal size, window j holds the j-th shard of each class's own permutation."""
    windows: list[list[tuple[int, int]]] = [[] for _ in range(max((len(shards) for shards in sizes.values()), default=0))]
    for class_id, shards in sizes.items():
        draw = generator(seed, task, epoch, "class", class_id)
        shuffled = draw.sample(range(len(shards)), len(shards))
        # Spread small classes over the epoch. If they all began in window 0, the last windows would hold the large classes alone.
        offset = draw.random()
        for place, shard in enumerate(shuffled):
            windows[int((place + offset) * len(windows) / len(shards))].append((class_id, shard))
    return windows


def plain_order(sizes: ShardSizes) -> list[SampleId]:
    """Return every sample once, class by class."""
    return _samples_of([(class_id, shard) for class_id, shards in sizes.items() for shard in range(len(shards))], sizes)


def _samples_of(shards: Iterable[tuple[int, int]], sizes: ShardSizes) -> list[SampleId]:
    """Return every sample of some shards, which are given as (class id, shard)."""
    return [SampleId(class_id, shard, position) for class_id, shard in shards for position in range(sizes[class_id][shard])]


def held_out(sizes: ShardSizes, fraction: float, seed: int) -> list[SampleId]:
    """Return a random part of every class, at least one sample, in `plain_order`; nothing for fraction 0.

    The part of a class does not depend on the other classes.
    """
    chosen: set[SampleId] = set()
    for class_id in sizes if fraction > 0 else ():
        samples = plain_order({class_id: sizes[class_id]})
        chosen |= set(generator(seed, "held out", class_id).sample(samples, max(1, round(len(samples) * fraction))))
    return [sample for sample in plain_order(sizes) if sample in chosen] if chosen else []


def rank_slice(length: int, rank: int, size: int) -> range:
    """Return the contiguous positions of `range(length)` that rank `rank` of `size` takes. The parts differ by at most one."""
    part, extra = divmod(length, size)
    start = rank * part + min(rank, extra)
    return range(start, start + part + (rank < extra))
