"""The batches of a run: the same global batches for every number of ranks, each rank reading its own part of each."""

# B images of this rank in a batch, S side in pixels, H W sides as stored

import os
import time
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from dist_vlcl.data.order import SampleId, generator, plain_order, rank_slice, train_order
from dist_vlcl.data.settings import ON_ERROR
from dist_vlcl.data.shards import Index, ShardError, StoredSample, Unread, UnreadShard, decode, is_ppm, log, ppm, read_shard
from dist_vlcl.data.tasks import Task
from dist_vlcl.data.transforms import Plan, Transform, resize_batch, resize_image

WORKERS_OF_A_GPU = 4
LARGEST = 4  # stored images with more than this many times the model's pixels are resized before they travel to the device


@dataclass(frozen=True)
class Batch:
    """One rank's part of a global batch; it may be empty, so that every rank has the same number of batches."""

    images: Tensor  # uint8 [B, 3, S, S]; as stored [B, H, W, 3] while it has plans
    labels: Tensor  # int64 [B], the place of the class in the stream's order
    positions: Tensor  # int64 [B], the place of each sample in the global batch
    count: int  # samples of the global batch, those skipped included
    index: int  # of the batch in the epoch
    samples: list[str]  # keys
    skipped: list[str] = field(default_factory=list)  # this rank's damaged samples, in words; they are not in the tensors
    plans: list[Plan] | None = None  # how the device is to crop and resize
    waited_s: float = 0.0  # how long the trainer waited for it

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "Batch":
        moved = {name: getattr(self, name).to(device, non_blocking=non_blocking) for name in ("images", "labels", "positions")}
        return replace(self, **moved)

    def pin_memory(self) -> "Batch":
        """The DataLoader's pinning thread calls this."""
        return replace(self, images=self.images.pin_memory(), labels=self.labels.pin_memory(), positions=self.positions.pin_memory())


@dataclass(frozen=True)
class Part:
    """What one rank loads of a global batch, in full: any process can load it."""

    split: str
    members: Sequence[SampleId]
    positions: Sequence[int]
    labels: Sequence[int]
    count: int
    index: int
    transform: Transform
    seeds: tuple[int, ...]
    shards: int  # that may have to be at hand at a time
    turn: int = 0  # the number of the epoch or evaluation in the run


def parts_of(
    split: str,
    order: Sequence[SampleId],
    labels: Mapping[int, int],
    *,
    batch_size: int,
    rank: int,
    size: int,
    transform: Transform,
    seeds: tuple[int, ...] = (),
    shards: int = 8,
) -> list[Part]:
    """A rank's part of order[i * batch_size : (i + 1) * batch_size], for every i, the last one short; nothing dropped or repeated."""
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size}: 1 or more")
    if not 0 <= rank < size:
        raise ValueError(f"rank={rank}: choose from 0 to {size - 1}, with {size} ranks")
    parts = []
    for index, first in enumerate(range(0, len(order), batch_size)):
        whole = order[first : first + batch_size]
        positions = rank_slice(len(whole), rank, size)
        members = [whole[position] for position in positions]
        own = [labels[member.class_id] for member in members]
        parts.append(Part(split, members, positions, own, len(whole), index, transform, seeds, shards))
    return parts


class Held(NamedTuple):
    samples: list[StoredSample]
    problem: str  # "" for a sound shard
    turn: int  # in which it was read


class ImageStore:
    """Images by their place in the shards; what was read and decoded stays in memory, as pixels, while there is room."""

    def __init__(self, index: Index, limit_bytes: float, on_error: str = "stop") -> None:
        if on_error not in ON_ERROR:
            raise ValueError(f"data.on_error={on_error!r}: choose from {', '.join(ON_ERROR)}")
        self.index, self.limit, self.on_error, self.bytes = index, limit_bytes, on_error, 0
        self._held: OrderedDict[tuple[str, int, int], Held] = OrderedDict()

    def image(self, split: str, sample: SampleId, shards: int, turn: int = 0) -> tuple[str, np.ndarray]:
        """Key and pixels, uint8 [H, W, 3]. The newest `shards` shards are kept whatever they take, for an order that mixes so many.

        A shard with a problem is read again in another `turn`: it may have been the network's.
        """
        stored, problem, _ = self._shard((split, sample.class_id, sample.shard), shards, turn)
        if problem and (self.on_error == "stop" or sample.position >= len(stored)):
            raise (UnreadShard if isinstance(problem, Unread) else ShardError)(f"{problem}; needed: sample {sample.position}")
        key, data = stored[sample.position]
        pixels = decode(data, key)
        if not is_ppm(data) and self.bytes + pixels.nbytes <= self.limit:
            stored[sample.position] = StoredSample(key, ppm(pixels))
            self.bytes += len(stored[sample.position].image) - len(data)
        return key, pixels

    def _shard(self, name: tuple[str, int, int], shards: int, turn: int) -> Held:
        held = self._held.get(name)
        if held and held.problem and held.turn != turn:
            self._drop(name)
        if name not in self._held:
            split, class_id, number = name
            self._held[name] = held = Held(*read_shard(self.index, self.index.shards[split][class_id][number]), turn)
            if held.problem:
                log.warning("%s", held.problem)
            self.bytes += _bytes_of(held.samples)
            while self.bytes > self.limit and len(self._held) > shards:
                self._drop(next(iter(self._held)))
        self._held.move_to_end(name)
        return self._held[name]

    def _drop(self, name: tuple[str, int, int]) -> None:
        self.bytes -= _bytes_of(self._held.pop(name).samples)


def _bytes_of(samples: Sequence[StoredSample]) -> int:
    return sum(len(sample.image) for sample in samples)


class Reader(Dataset[Batch]):
    """What a process that loads does: a part in, a batch out. `as_stored`: leave cropping and resizing to the device, where it can."""

    def __init__(self, store: ImageStore, as_stored: bool) -> None:
        self.store, self.as_stored = store, as_stored

    def __getitem__(self, part: Part) -> Batch:
        images, plans, labels, positions, keys, skipped = [], [], [], [], [], []
        for member, position, label in zip(part.members, part.positions, part.labels, strict=True):
            try:
                key, pixels = self.store.image(part.split, member, part.shards, part.turn)
            except ShardError as error:
                skipped.append(self._skip(error))
                continue
            images.append(pixels)
            # a crop is a function of the sample, not of who loads it
            plans.append(part.transform.plan(pixels.shape[0], pixels.shape[1], generator(*part.seeds, "crop", key)))
            labels.append(label)
            positions.append(position)
            keys.append(key)
        where = torch.tensor(labels, dtype=torch.int64), torch.tensor(positions, dtype=torch.int64)
        size = part.transform.size
        if self.as_stored and can_be_stacked(images, size):
            return Batch(torch.from_numpy(np.stack(images)), *where, part.count, part.index, keys, skipped, plans)
        resized = [resize_image(pixels, plan, size) for pixels, plan in zip(images, plans, strict=True)]
        stacked = torch.stack(resized) if resized else torch.empty((0, 3, size, size), dtype=torch.uint8)
        return Batch(stacked, *where, part.count, part.index, keys, skipped)

    def _skip(self, error: ShardError) -> str:
        if self.store.on_error == "stop":
            raise error
        log.warning("skipped: %s", error)
        return str(error)


def can_be_stacked(images: Sequence[np.ndarray], size: int) -> bool:
    """Whether images are of one size, and not so large that resizing them first is the shorter way."""
    shapes = {image.shape for image in images}
    return len(shapes) == 1 and images[0].size <= LARGEST * 3 * size * size


class Loader:
    """Loads all batches of a run: one set of workers and one store of images, over epochs, tasks and evaluations.

    On a GPU, images travel as they are stored, and are cropped and resized there, with the same bits. Iterators follow one another: a
    new one ends the one before.
    """

    def __init__(
        self,
        index: Index,
        *,
        device: torch.device | str = "cpu",
        num_workers: int | None = None,
        cache_gib: float = 1.0,
        on_error: str = "stop",
        resize_on_device: bool | None = None,
    ) -> None:
        self.index, self.device = index, torch.device(device)
        on_gpu = self.device.type == "cuda"
        workers = _default_workers(on_gpu) if num_workers is None else num_workers
        store = ImageStore(index, cache_gib * 2**30 / max(1, workers), on_error)
        self._asked: list[Part] = []  # what the workers are to load now
        self._turn = 0
        self._loader = DataLoader(
            Reader(store, as_stored=on_gpu if resize_on_device is None else resize_on_device),
            batch_size=None,
            sampler=self._asked,
            num_workers=workers,
            persistent_workers=workers > 0,
            # other ways to start (the default of Python 3.14) import torch and all of this again: 9 s on two busy cores
            multiprocessing_context="fork" if workers else None,
            pin_memory=on_gpu,
            # without its own generator a DataLoader draws from the global one, and a resumed run would leave the path of an unbroken one
            generator=torch.Generator(),
            worker_init_fn=_leave_process_group,
        )

    def train(
        self,
        task: Task,
        *,
        batch_size: int,
        seed: int,
        epoch: int,
        transform: Transform,
        rank: int = 0,
        size: int = 1,
        start: int = 0,
        without: Sequence[SampleId] = (),
    ) -> "Batches":
        """One epoch of a task; `batch_size` counts the samples of all ranks. A resume starts at batch `start`. `without` is held out."""
        left_out = set(without)
        order = [s for s in train_order(self.index.sizes("train", task.classes), seed, task.index, epoch) if s not in left_out]
        parts = parts_of(
            "train",
            order,
            task.labels,
            batch_size=batch_size,
            rank=rank,
            size=size,
            transform=transform,
            seeds=(seed, task.index, epoch),
            shards=2 * len(task.classes),  # a batch may straddle two windows
        )
        return Batches(self, parts, start)

    def test(
        self,
        classes: Sequence[int],
        *,
        batch_size: int,
        transform: Transform,
        rank: int = 0,
        size: int = 1,
        held_out: Sequence[SampleId] = (),
    ) -> "Batches":
        """Every test sample of the classes, given in the stream's order, exactly once over all ranks; or in their place `held_out`."""
        parts = parts_of(
            "train" if held_out else "test",
            held_out or plain_order(self.index.sizes("test", classes)),
            {class_id: label for label, class_id in enumerate(classes)},
            batch_size=batch_size,
            rank=rank,
            size=size,
            transform=transform,
        )
        return Batches(self, parts)

    def load(self, parts: Sequence[Part]) -> Iterator[Batch]:
        """The batches of some parts, on the device, ready for the model."""
        self._turn += 1
        self._asked[:] = [replace(part, turn=self._turn) for part in parts]
        batches = iter(self._loader)
        while True:
            asked = time.perf_counter()
            try:
                batch = next(batches, None)
            except ShardError as error:
                # torch's frames hold the error, which holds them: as garbage, workers are given up only after 5 s each
                raise error.with_traceback(None) from None
            if batch is None:
                return
            batch = batch.to(self.device, non_blocking=True)
            images = batch.images if batch.plans is None else resize_batch(batch.images, batch.plans, parts[0].transform.size)
            yield replace(batch, images=images, plans=None, waited_s=time.perf_counter() - asked)


class Batches:
    """Iterate over the batches from `start` on."""

    def __init__(self, loader: Loader, parts: Sequence[Part], start: int = 0) -> None:
        if not 0 <= start <= len(parts):
            raise ValueError(f"start={start}: choose from 0 to {len(parts)}, the number of batches")
        self._loader, self._parts, self._start = loader, parts, start

    @property
    def num_batches(self) -> int:
        """Of the whole epoch."""
        return len(self._parts)

    def __len__(self) -> int:
        """Batches from `start` on."""
        return len(self._parts) - self._start

    def __iter__(self) -> Iterator[Batch]:
        return self._loader.load(self._parts[self._start :])


def _default_workers(on_gpu: bool) -> int:
    """A CPU's cores are busy with the step; a GPU wants its batches made meanwhile, by its share of the cores."""
    ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return min(WORKERS_OF_A_GPU, max(1, len(os.sched_getaffinity(0)) // ranks_here - 1)) if on_gpu else 0


def _leave_process_group(_worker: int) -> None:
    # A launcher signals the whole process group; a worker that dies of it takes the trainer down before it has saved.
    os.setpgid(0, 0)
