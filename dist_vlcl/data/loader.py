"""The batches of a task: the same global batches for every number of ranks, each rank reading its own part of each."""

# B images of this rank in a batch, S side in pixels

import io
import os
import random
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from dist_vlcl.data.order import SampleId, generator, plain_order, rank_slice, train_order
from dist_vlcl.data.settings import ON_ERROR
from dist_vlcl.data.shards import Index, ShardError, StoredSample, log, read_shard
from dist_vlcl.data.tasks import Task
from dist_vlcl.data.transforms import Transform

MAX_PIXELS = 1 << 26  # a bomb has a few bytes and billions of pixels


@dataclass(frozen=True)
class Batch:
    """One rank's part of a global batch; it may be empty, so that every rank has the same number of batches."""

    images: Tensor  # uint8 [B, 3, S, S]
    labels: Tensor  # int64 [B], the place of the class in the stream's order
    positions: Tensor  # int64 [B], the place of each sample in the global batch
    count: int  # samples of the global batch, those skipped included
    index: int  # of the batch in the epoch
    samples: list[str]  # keys
    skipped: list[str] = field(default_factory=list)  # this rank's damaged samples, in words; they are not in the tensors

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "Batch":
        moved = {name: getattr(self, name).to(device, non_blocking=non_blocking) for name in ("images", "labels", "positions")}
        return replace(self, **moved)

    def pin_memory(self) -> "Batch":
        """The DataLoader's pinning thread calls this."""
        return replace(self, images=self.images.pin_memory(), labels=self.labels.pin_memory(), positions=self.positions.pin_memory())


class GlobalBatches(Dataset[Batch]):
    """Batch i is this rank's part of order[i * batch_size : (i + 1) * batch_size], the last one short; nothing dropped or repeated."""

    def __init__(
        self,
        index: Index,
        split: str,
        order: Sequence[SampleId],
        labels: Mapping[int, int],
        *,
        batch_size: int,
        rank: int,
        size: int,
        transform: Transform,
        seeds: tuple[int, ...] = (),
        cached_shards: int = 8,
        on_error: str = "stop",
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size}: 1 or more")
        if not 0 <= rank < size:
            raise ValueError(f"rank={rank}: choose from 0 to {size - 1}, with {size} ranks")
        if on_error not in ON_ERROR:
            raise ValueError(f"data.on_error={on_error!r}: choose from {', '.join(ON_ERROR)}")
        self.index, self.split, self.order, self.labels = index, split, order, labels
        self.batch_size, self.rank, self.size, self.transform = batch_size, rank, size, transform
        self.seeds, self.cached_shards, self.on_error = seeds, cached_shards, on_error
        self._cache: OrderedDict[tuple[int, int], tuple[list[StoredSample], str]] = OrderedDict()

    def __len__(self) -> int:
        return -(-len(self.order) // self.batch_size)

    def __getitem__(self, number: int) -> Batch:
        if not 0 <= number < len(self):
            raise IndexError(f"batch {number} of {len(self)}")
        members = self.order[number * self.batch_size : (number + 1) * self.batch_size]
        images, labels, positions, keys, skipped = [], [], [], [], []
        for position in rank_slice(len(members), self.rank, self.size):
            try:
                key, image = self._load(members[position])
            except ShardError as error:
                skipped.append(self._skip(error))
                continue
            images.append(image)
            labels.append(self.labels[members[position].class_id])
            positions.append(position)
            keys.append(key)
        stacked = torch.stack(images) if images else torch.empty((0, 3, self.transform.size, self.transform.size), dtype=torch.uint8)
        as_tensor = {"labels": torch.tensor(labels, dtype=torch.int64), "positions": torch.tensor(positions, dtype=torch.int64)}
        return Batch(stacked, **as_tensor, count=len(members), index=number, samples=keys, skipped=skipped)

    def _load(self, sample: SampleId) -> tuple[str, Tensor]:
        stored, problem = self._shard(sample.class_id, sample.shard)
        if problem and (self.on_error == "stop" or sample.position >= len(stored)):
            raise ShardError(f"{problem}; needed: sample {sample.position}")
        key, data = stored[sample.position]
        # a crop is a function of the sample, not of who loads it
        return key, self.transform(decode(data, key), self._draw(key))

    def _draw(self, key: str) -> random.Random:
        return generator(*self.seeds, "crop", key)

    def _shard(self, class_id: int, number: int) -> tuple[list[StoredSample], str]:
        name = (class_id, number)
        if name not in self._cache:
            self._cache[name] = read_shard(self.index, self.index.shards[self.split][class_id][number])
            if problem := self._cache[name][1]:
                log.warning("%s", problem)
            while len(self._cache) > self.cached_shards:
                self._cache.popitem(last=False)
        self._cache.move_to_end(name)
        return self._cache[name]

    def _skip(self, error: ShardError) -> str:
        if self.on_error == "stop":
            raise error
        log.warning("skipped: %s", error)
        return str(error)


def _leave_process_group(_worker: int) -> None:
    # A launcher signals the whole process group; a worker that dies of it takes the trainer down before it has saved.
    os.setpgid(0, 0)


class BatchLoader:
    """Iterate over the batches from `start` on; a DataLoader that leaves torch's global generator alone."""

    def __init__(self, batches: GlobalBatches, *, start: int = 0, num_workers: int = 0, pin_memory: bool = False) -> None:
        if not 0 <= start <= len(batches):
            raise ValueError(f"start={start}: choose from 0 to {len(batches)}, the number of batches")
        self.num_batches = len(batches)
        self._loader = DataLoader(
            batches,
            batch_size=None,
            sampler=range(start, len(batches)),
            num_workers=num_workers,
            pin_memory=pin_memory,
            # without its own generator a DataLoader draws from the global one, and a resumed run would leave the path of an unbroken one
            generator=torch.Generator(),
            worker_init_fn=_leave_process_group,
        )

    def __len__(self) -> int:
        """Batches from `start` on; `num_batches` is the whole epoch."""
        return len(self._loader)

    def __iter__(self) -> Iterator[Batch]:
        return iter(self._loader)


def train_batches(
    index: Index,
    task: Task,
    *,
    batch_size: int,
    seed: int,
    epoch: int,
    rank: int,
    size: int,
    transform: Transform,
    start: int = 0,
    num_workers: int = 0,
    on_error: str = "stop",
    pin_memory: bool = False,
    without: Sequence[SampleId] = (),
) -> BatchLoader:
    """One epoch of a task; `batch_size` counts the samples of all ranks. A resume starts at batch `start`. `without` is held out."""
    left_out = set(without)
    order = [s for s in train_order(index.sizes("train", task.classes), seed, task.index, epoch) if s not in left_out]
    batches = GlobalBatches(
        index,
        "train",
        order,
        task.labels,
        batch_size=batch_size,
        rank=rank,
        size=size,
        transform=transform,
        seeds=(seed, task.index, epoch),
        cached_shards=2 * len(task.classes),  # a batch may straddle two windows
        on_error=on_error,
    )
    return BatchLoader(batches, start=start, num_workers=num_workers, pin_memory=pin_memory)


def test_batches(
    index: Index,
    classes: Sequence[int],
    *,
    batch_size: int,
    rank: int,
    size: int,
    transform: Transform,
    num_workers: int = 0,
    on_error: str = "stop",
    pin_memory: bool = False,
    held_out: Sequence[SampleId] = (),
) -> BatchLoader:
    """Every test sample of the classes, given in the stream's order, exactly once over all ranks; or in their place `held_out`."""
    batches = GlobalBatches(
        index,
        "train" if held_out else "test",
        held_out or plain_order(index.sizes("test", classes)),
        {class_id: label for label, class_id in enumerate(classes)},
        batch_size=batch_size,
        rank=rank,
        size=size,
        transform=transform,
        on_error=on_error,
    )
    return BatchLoader(batches, num_workers=num_workers, pin_memory=pin_memory)


def decode(data: bytes, key: str) -> Image.Image:
    """PNG, JPEG or WebP bytes -> RGB image; raises ShardError for anything else."""
    try:
        image = Image.open(io.BytesIO(data), formats=("PNG", "JPEG", "WEBP"))
        if image.width * image.height > MAX_PIXELS:
            raise ValueError(f"{image.width} x {image.height} pixels are more than {MAX_PIXELS:,}")
        return image.convert("RGB")
    except Exception as error:  # PIL raises what it likes on damaged bytes
        raise ShardError(f"{key}: no image: {error}") from error
