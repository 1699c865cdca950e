"""The batches of a run. The global batches are the same for every number of ranks; each rank reads its own part of each."""

# B images of this rank in a batch, S side of an image in pixels

import os
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from dist_vlcl.data.images import PPM_HEADER, ppm
from dist_vlcl.data.settings import DataConfig
from dist_vlcl.data.shards import Index, ShardError, StoredSample, decode, read_shard
from dist_vlcl.data.tasks import SampleId, Task, generator, plain_order, rank_slice, train_order
from dist_vlcl.data.transforms import EvalTransform, TrainTransform


@dataclass(frozen=True)
class Batch:
    """One rank's part of a global batch. It may be empty, so that every rank has the same number of batches."""

    images: Tensor  # uint8 [B, 3, S, S]
    labels: Tensor  # int64 [B], the place of the class among the classes asked for
    positions: Tensor  # int64 [B], the place of each sample in the global batch
    count: int  # samples of the global batch in its first micro-batch, 0 in the others, so that the sum is right
    index: int  # of the batch in the epoch
    samples: list[str]  # keys of the B samples
    waited_s: float = 0.0  # how long the trainer waited for the batch

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "Batch":
        """Return the batch with all its tensors on a device."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "Batch":
        """Return the batch in pinned memory. The DataLoader's pinning thread calls this."""
        return self._map(Tensor.pin_memory)

    def cut(self, start: int, stop: int) -> "Batch":
        """Return the samples from `start` to `stop`."""
        return replace(self._map(lambda tensor: tensor[start:stop]), samples=self.samples[start:stop])

    def _map(self, function: Callable[[Tensor], Tensor]) -> "Batch":
        return replace(self, images=function(self.images), labels=function(self.labels), positions=function(self.positions))


@dataclass(frozen=True)
class Request:
    """All that a process needs to load one rank's part of a global batch."""

    split: str
    samples: Sequence[SampleId]
    labels: Sequence[int]
    positions: range
    count: int
    index: int
    transform: TrainTransform | EvalTransform
    seeds: tuple[int, ...]  # of the random crops
    min_shards: int  # that stay in memory whatever their size


def _requests(
    order: Sequence[SampleId], classes: Sequence[int], *, batch_size: int, rank: int = 0, size: int = 1, **shared: Any
) -> Iterator[Request]:
    """Yield a rank's part of order[i * batch_size : (i + 1) * batch_size] for every i. The last global batch may be smaller.

    `shared`: the fields that all requests have in common.
    """
    labels = {class_id: label for label, class_id in enumerate(classes)}
    for index, first in enumerate(range(0, len(order), batch_size)):
        batch = order[first : first + batch_size]
        positions = rank_slice(len(batch), rank, size)
        samples = [batch[position] for position in positions]
        own_labels = [labels[sample.class_id] for sample in samples]
        yield Request(samples=samples, labels=own_labels, positions=positions, count=len(batch), index=index, **shared)


class Reader(Dataset[Batch | ShardError]):
    """Turns requests into batches, in the trainer or in loading processes.

    Shards and decoded pixels stay in memory up to `limit_bytes`. A ShardError takes the place of a batch with a sample or a shard that is
    damaged: raised in a loading process, its text would be in the middle of a traceback.
    """

    def __init__(self, index: Index, limit_bytes: float) -> None:
        self.index, self.limit, self.bytes = index, limit_bytes, 0
        self._shards: OrderedDict[tuple[str, int, int], list[StoredSample]] = OrderedDict()

    def __getitem__(self, request: Request) -> Batch | ShardError:
        try:
            return self.batch(request)
        except ShardError as error:
            return error.with_traceback(None)

    def batch(self, request: Request) -> Batch:
        """Return a batch. Raises ShardError if anything is wrong with a sample or its shard."""
        images, keys = [], []
        for sample in request.samples:
            key, pixels = self.image(request, sample)
            # the crop depends on the sample, not on the process that loads it
            images.append(request.transform(pixels, generator(*request.seeds, "crop", key)))
            keys.append(key)
        size = request.transform.size
        stacked = torch.stack(images) if images else torch.empty((0, 3, size, size), dtype=torch.uint8)
        places = torch.tensor(request.labels, dtype=torch.int64), torch.tensor(request.positions, dtype=torch.int64)
        return Batch(stacked, *places, request.count, request.index, keys)

    def image(self, request: Request, sample: SampleId) -> tuple[str, np.ndarray]:
        """Return key and pixels, uint8 [H, W, 3]."""
        stored = self._shard(request, sample)
        key, data = stored[sample.position]
        pixels = decode(data, key)
        if not PPM_HEADER.match(data) and self.bytes + pixels.nbytes <= self.limit:
            stored[sample.position] = StoredSample(key, ppm(pixels))
            self.bytes += len(stored[sample.position].image) - len(data)
        return key, pixels

    def _shard(self, request: Request, sample: SampleId) -> list[StoredSample]:
        name = (request.split, sample.class_id, sample.shard)
        if name not in self._shards:
            self._shards[name] = read_shard(self.index, self.index.shards[request.split][sample.class_id][sample.shard])
            self.bytes += _bytes_of(self._shards[name])
            while self.bytes > self.limit and len(self._shards) > request.min_shards:
                self.bytes -= _bytes_of(self._shards.popitem(last=False)[1])
        self._shards.move_to_end(name)
        return self._shards[name]


def _bytes_of(samples: Sequence[StoredSample]) -> int:
    return sum(len(sample.image) for sample in samples)


@dataclass(frozen=True)
class Batches:
    """One rank's batches of an epoch or evaluation. Each iteration loads them again."""

    loader: "Loader"
    requests: Sequence[Request]

    def __len__(self) -> int:
        return len(self.requests)

    def __iter__(self) -> Iterator[Batch]:
        """Yield the batches, with all tensors on the device."""
        self.loader.requests[:] = self.requests
        batches = iter(self.loader.data_loader)
        while True:
            started = time.perf_counter()
            batch = next(batches, None)
            if batch is None:
                return
            if isinstance(batch, ShardError):
                try:
                    raise batch
                finally:
                    del batch  # a cycle would keep the workers alive until garbage collection, which then waits 5 s for each
            yield replace(batch.to(self.loader.device, non_blocking=True), waited_s=time.perf_counter() - started)


class Loader:
    """Loads all batches of a run, with one set of loading processes and one cache for all epochs, tasks and evaluations.

    The options `data` say how many processes load and how much memory they use. Only one iterator is active: a new one ends the older one.
    """

    def __init__(self, index: Index, data: DataConfig, device: torch.device | str = "cpu") -> None:
        self.index, self.device = index, torch.device(device)
        is_on_gpu = self.device.type == "cuda"
        workers = _default_workers(is_on_gpu) if data.num_workers is None else data.num_workers
        self.requests: list[Request] = []  # of the current pass
        self.data_loader = DataLoader(
            Reader(index, data.cache_gib * 2**30 / max(1, workers)),
            batch_size=None,
            sampler=self.requests,
            num_workers=workers,
            persistent_workers=workers > 0,
            # The other start methods (the default of Python 3.14) import torch again: 9 s on two busy cores.
            multiprocessing_context="fork" if workers else None,
            pin_memory=is_on_gpu,
            # Without its own generator a DataLoader draws from the global one, and a resumed run would differ from an unbroken one.
            generator=torch.Generator(),
            # A launcher signals the whole process group. A worker that dies of the signal would end the trainer before it has saved.
            worker_init_fn=lambda _: os.setpgid(0, 0),
        )

    def train(self, task: Task, *, seed: int, epoch: int, start: int = 0, without: Sequence[SampleId] = (), **options: Any) -> Batches:
        """Return one epoch of a task from batch `start` on. The samples `without` are left out.

        options: transform, and batch_size (samples of all ranks), rank and size as `_requests` takes them.
        """
        left_out = set(without)
        order = [s for s in train_order(self.index.sizes("train", task.classes), seed, task.index, epoch) if s not in left_out]
        min_shards = 2 * len(task.classes)  # a batch may span two windows, each with about one shard of every class
        shared: dict[str, Any] = {"split": "train", "seeds": (seed, task.index, epoch), "min_shards": min_shards}
        return Batches(self, list(_requests(order, task.classes, **shared, **options))[start:])

    def test(self, classes: Sequence[int], *, held_out: Sequence[SampleId] = (), **options: Any) -> Batches:
        """Return every test sample of the classes exactly once over all ranks, or instead the training samples `held_out`.

        The label of a class is its place in `classes`. options: as for `train`.
        """
        order = held_out or plain_order(self.index.sizes("test", classes))
        shared: dict[str, Any] = {"split": "train" if held_out else "test", "seeds": (), "min_shards": 8}
        return Batches(self, list(_requests(order, classes, **shared, **options)))


def _default_workers(is_on_gpu: bool) -> int:
    """Return this rank's share of the cores for a GPU, at most 4. On a CPU the cores are busy with the step."""
    ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return min(4, max(1, len(os.sched_getaffinity(0)) // ranks_here - 1)) if is_on_gpu else 0
