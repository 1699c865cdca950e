import gc
import io
import multiprocessing
import os
import random
import re
import struct
import subprocess
import sys
import time
import zlib
from pathlib import Path

import pytest
import torch
from PIL import Image

from dist_vlcl.data import loader
from dist_vlcl.data.loader import Loader
from dist_vlcl.data.settings import DataConfig
from dist_vlcl.data.shards import ShardError, decode
from dist_vlcl.data.tasks import TaskStream, plain_order, train_order
from dist_vlcl.data.transforms import EvalTransform, TrainTransform
from tests.helpers.memory import peak_mib
from tests.helpers.shards import make_index

WORLDS = [1, 2, 3, 8]


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    return make_index(tmp_path_factory.mktemp("data"))  # 4 classes of 7 training and 3 test images, 3 to a shard


@pytest.fixture(scope="module")
def task(index):
    return TaskStream(index.class_names, increment=3, order=[2, 0, 3, 1])[0]  # 21 training images


OF_LOADER = ("num_workers", "cache_gib")


def loader_of(index, **options):
    return Loader(index, DataConfig(**options))


def train(index, task, rank=0, size=1, **options):
    settings = {"batch_size": 8, "seed": 0, "epoch": 0, "transform": TrainTransform(16)} | options
    of_loader = {name: settings.pop(name) for name in OF_LOADER if name in settings}
    return loader_of(index, **of_loader).train(task, rank=rank, size=size, **settings)


def joined(parts):
    """The global batch from the ranks' parts: keys, labels, images in the order of their positions."""
    return (
        [key for part in parts for key in part.samples],
        torch.cat([part.labels for part in parts]).tolist(),
        torch.cat([part.images for part in parts]),
    )


def assert_equal_batches(actual, expected):
    for mine, other in zip(actual, expected, strict=True):
        assert mine.samples == other.samples and mine.index == other.index and mine.count == other.count
        assert torch.equal(mine.images, other.images) and torch.equal(mine.labels, other.labels)
        assert torch.equal(mine.positions, other.positions)


def test_every_sample_comes_once_per_epoch(index, task):
    keys = [key for batch in train(index, task) for key in batch.samples]
    assert sorted(keys) == [f"class{class_id}/train_{number:02d}" for class_id in (0, 2, 3) for number in range(7)]


@pytest.mark.parametrize("size", WORLDS[1:])
def test_global_batches_are_the_same_for_every_number_of_ranks(index, task, size):
    alone = list(train(index, task))
    ranks = [list(train(index, task, rank, size)) for rank in range(size)]
    for expected, parts in zip(alone, zip(*ranks, strict=True), strict=True):
        keys, labels, images = joined(parts)
        assert keys == expected.samples
        assert labels == expected.labels.tolist()
        assert torch.equal(images, expected.images)  # crops do not depend on the rank
        assert torch.cat([part.positions for part in parts]).tolist() == list(range(expected.count))
        assert {part.count for part in parts} == {expected.count} and {part.index for part in parts} == {expected.index}


@pytest.mark.parametrize("size", WORLDS)
def test_ranks_have_equally_many_batches_as_predicted(index, task, size):
    loaders = [train(index, task, rank, size) for rank in range(size)]
    assert [len(loader) for loader in loaders] == [3] * size
    batches = [list(loader) for loader in loaders]
    assert [len(of_rank) for of_rank in batches] == [3] * size
    assert [batch.count for batch in batches[0]] == [8, 8, 5]


def test_a_rank_without_samples_gets_an_empty_batch(index, task):
    last = list(train(index, task, rank=7, size=8))[-1]
    assert last.images.shape == (0, 3, 16, 16) and last.images.dtype == torch.uint8
    assert last.labels.shape == (0,) and last.labels.dtype == torch.int64
    assert (last.samples, last.count) == ([], 5)


def test_labels_are_places_among_the_classes_of_the_task(index):
    stream = TaskStream(index.class_names, increment=2, order=[2, 0, 3, 1])
    for batch in train(index, stream[1]):
        assert [{"class3": 0, "class1": 1}[key.split("/")[0]] for key in batch.samples] == batch.labels.tolist()


def test_order_and_crops_change_with_epoch_and_seed_and_repeat_for_equal_ones(index, task):
    first = list(train(index, task))
    assert_equal_batches(train(index, task), first)
    for other in (train(index, task, epoch=1), train(index, task, seed=1)):
        batches = list(other)
        assert [key for batch in batches for key in batch.samples] != [key for batch in first for key in batch.samples]
        mine, theirs = ({key: image for b in some for key, image in zip(b.samples, b.images, strict=True)} for some in (batches, first))
        assert sum(not torch.equal(mine[key], theirs[key]) for key in theirs) > 10


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("start", [1, 3])
def test_a_resume_continues_with_the_next_batch(index, task, start, num_workers):
    whole = list(train(index, task))
    rest = train(index, task, start=start, num_workers=num_workers)
    assert len(rest) == 3 - start
    assert_equal_batches(rest, whole[start:])


def test_workers_do_not_change_the_batches(index, task):
    assert_equal_batches(train(index, task, num_workers=2), list(train(index, task)))


def test_workers_are_forks_whatever_the_default_is(index, task, monkeypatch):
    """Those of a rank that a forkserver had started took 9 s: another forkserver, and all imports again."""
    default = multiprocessing.get_start_method()

    def fail(*_):
        raise ShardError("as in this process")

    monkeypatch.setattr(loader, "read_shard", fail)
    try:
        multiprocessing.set_start_method("forkserver", force=True)
        with pytest.raises(ShardError, match="as in this process"):
            next(iter(train(index, task, num_workers=1)))
    finally:
        multiprocessing.set_start_method(default, force=True)


def test_workers_of_a_failed_epoch_end_with_their_loader(truncated, task):
    """Not as garbage, which torch waits five seconds for."""

    def fail():
        try:
            list(train(truncated, task, num_workers=1))
        except ShardError:
            return multiprocessing.active_children()

    gc.collect()
    others = multiprocessing.active_children()
    gc.disable()
    try:
        assert len(fail()) == len(others) + 1 and multiprocessing.active_children() == others
    finally:
        gc.enable()


def test_loading_leaves_the_global_generators_alone(index, task):
    torch.manual_seed(0)
    random.seed(0)
    before = torch.get_rng_state(), random.getstate()
    list(train(index, task, num_workers=1)), list(train(index, task))
    assert torch.equal(torch.get_rng_state(), before[0]) and random.getstate() == before[1]


def test_each_shard_is_read_once_per_epoch(index, task, monkeypatch):
    read = []
    original = loader.read_shard
    monkeypatch.setattr(loader, "read_shard", lambda index, shard: read.append(shard.path) or original(index, shard))
    list(train(index, task, batch_size=4))
    assert len(read) == len(set(read)) == 9


@pytest.mark.parametrize("size", WORLDS)
def test_evaluation_sees_every_test_sample_once(index, size):
    options = {"batch_size": 4, "transform": EvalTransform(16)}
    ranks = [list(loader_of(index).test([3, 1, 0], rank=rank, size=size, **options)) for rank in range(size)]
    assert {len(batches) for batches in ranks} == {3}
    keys = [key for batches in ranks for batch in batches for key in batch.samples]
    assert sorted(keys) == [f"class{class_id}/test_{number:02d}" for class_id in (0, 1, 3) for number in range(3)]
    labels = [label for batches in ranks for batch in batches for label in batch.labels.tolist()]
    assert labels == [{"class3": 0, "class1": 1, "class0": 2}[key.split("/")[0]] for key in keys]


def of_digits(*loaders):
    """Batches of a training epoch, the evaluation after it and a second epoch, by each of the loaders."""
    task = TaskStream(loaders[0].index.class_names, increment=4)[0]

    def run(loader):
        for epoch in (0, 1):
            yield from loader.train(task, batch_size=8, seed=0, epoch=epoch, transform=TrainTransform(16))
            yield from loader.test(task.classes, batch_size=5, transform=EvalTransform(16))

    return [list(run(loader)) for loader in loaders]


def test_pixels_do_not_depend_on_where_they_are_stored_or_decoded(tmp_path, index):
    """Original or decoded shards, cached or not, with workers or without: the same bits."""
    decoded = make_index(tmp_path, pixels=True)
    assert decoded.encodings == ("ppm",) and index.encodings == ("png",)
    loaders = [loader_of(data_set, cache_gib=gib) for data_set in (index, decoded) for gib in (0, 1)]
    first, *others = of_digits(*loaders, loader_of(decoded, num_workers=2))
    assert len(first) == 14 and first[0].images.shape == (8, 3, 16, 16)
    for other in others:
        assert_equal_batches(other, first)


def test_one_set_of_workers_serves_epochs_tasks_and_evaluations(index, task):
    loader, seen = loader_of(index, num_workers=2), set()
    others = {process.pid for process in multiprocessing.active_children()}
    for epoch in range(2):
        batches = iter(loader.train(task, batch_size=4, seed=0, epoch=epoch, transform=TrainTransform(16)))
        expected = list(train(index, task, batch_size=4, epoch=epoch))
        assert_equal_batches([next(batches), next(batches)], expected[:2])  # left in mid-epoch, as max_steps does
        assert_equal_batches(*(by.test([0], batch_size=2, transform=EvalTransform(16)) for by in (loader, loader_of(index))))
        seen |= {worker.pid for worker in multiprocessing.active_children()}
    assert len(seen - others) == 2


@pytest.fixture
def reads(monkeypatch):
    """Shards that are read and images that are decoded, as they happen."""
    happened = []
    whole_read, whole_decode = loader.read_shard, loader.decode
    monkeypatch.setattr(loader, "read_shard", lambda index, shard: happened.append(shard.path) or whole_read(index, shard))

    def decode(data, key):
        happened.extend([] if data.startswith(b"P6") else [key])
        return whole_decode(data, key)

    monkeypatch.setattr(loader, "decode", decode)
    return happened


@pytest.mark.parametrize("pixels", [False, True])
def test_what_fits_in_memory_is_read_and_decoded_once_a_run(tmp_path, reads, pixels):
    index = make_index(tmp_path, pixels=pixels)
    of_digits(loader_of(index))
    assert len(reads) == len(set(reads)) == 16 + (0 if pixels else 40)


def cached_bytes(cache):
    return sum(len(sample.image) for samples in cache._shards.values() for sample in samples)


def request(split="train", min_shards=8):
    return loader.Request(split, [], [], range(0), 0, 0, EvalTransform(16), (), min_shards)


def test_memory_stays_within_its_bound(index, reads):
    limit = 20_000  # six images of 32 x 32
    cache = loader.Reader(index, limit)
    for sample in plain_order(index.sizes("train", range(4))) * 2:
        key, pixels = cache.image(request(min_shards=1), sample)
        assert key.startswith(f"class{sample.class_id}/") and pixels.shape == (32, 32, 3)
        assert cache.bytes == cached_bytes(cache) <= limit
    assert len(reads) > 2 * 28  # nothing of the first pass was left in the second
    small = loader.Reader(index, 0)
    for sample in train_order(index.sizes("train", range(4)), 0, 0, 0):
        small.image(request(), sample)  # two windows of a shuffled order stay in memory whatever the limit
    assert len([path for path in reads[-40:] if path.endswith(".tar")]) == 12


def test_the_wait_for_a_batch_is_measured(index, task, monkeypatch):
    whole = loader.read_shard
    monkeypatch.setattr(loader, "read_shard", lambda index, shard: time.sleep(0.05) or whole(index, shard))
    waits = [batch.waited_s for batch in train(index, task, batch_size=21)]
    assert len(waits) == 1 and waits[0] > 9 * 0.05


def test_a_gpu_has_workers_by_default_and_a_cpu_has_none(index, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(16)))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert [loader._default_workers(on_gpu) for on_gpu in (False, True)] == [0, 1]
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert loader._default_workers(True) == 4


def test_a_batch_moves_to_a_device(index, task):
    batch = next(iter(train(index, task)))
    moved = batch.to("meta")
    assert {moved.images.device.type, moved.labels.device.type, moved.positions.device.type} == {"meta"}
    assert (moved.samples, moved.count) == (batch.samples, batch.count)


# damage


@pytest.fixture
def truncated(tmp_path):
    """A set one of whose training shards (class 2, samples 0..2) has lost all but its first sample, at a member's border."""
    index = make_index(tmp_path)
    path = tmp_path / "tiny/train/0002-000.tar"
    content = path.read_bytes()
    path.write_bytes(content[: content.index(b"class2/train_01.cls")])
    return index


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_truncated_shard_stops_the_run_by_name_and_counts(truncated, task, num_workers):
    said = refusal_of(train(truncated, task, num_workers=num_workers))
    assert re.fullmatch(r".*train/0002-000\.tar: .*; the index says \d+ bytes, found \d+.*", said, re.S) and "Traceback" not in said


def refusal_of(loader) -> str:
    """Return what the loader says, without its error: that would keep the loader and its workers alive."""
    try:
        list(loader)
    except ShardError as error:
        return str(error)
    return ""


def test_a_missing_shard_stops_the_run_by_name(tmp_path, task):
    index = make_index(tmp_path)
    (tmp_path / "tiny/train/0003-001.tar").unlink()
    with pytest.raises(ShardError, match=r"0003-001\.tar: cannot be read"):
        list(train(index, task))


def test_changed_bytes_are_never_trained_on_even_if_every_image_opens(tmp_path, task):
    index = make_index(tmp_path, pixels=True)
    path = tmp_path / "tiny/train/0003-000.tar"
    content = path.read_bytes()
    path.write_bytes(content[:2000] + bytes([content[2000] ^ 1]) + content[2001:])  # one bit of one pixel
    with pytest.raises(ShardError, match=r"0003-000\.tar: the bytes differ from those that were written"):
        list(train(index, task))


def test_a_broken_image_is_refused_by_name():
    with pytest.raises(ShardError, match="apple/1: no image"):
        decode(b"\x89PNG\r\n\x1a\nnothing", "apple/1")
    gif = io.BytesIO()
    Image.new("RGB", (8, 8)).save(gif, format="GIF")
    with pytest.raises(ShardError, match="apple/2: no image"):
        decode(gif.getvalue(), "apple/2")


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size, and has a few bytes."""
    chunk = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = b"IDAT" + zlib.compress(b"\0" * 1000)
    chunks = (struct.pack(">I", len(c) - 4) + c + struct.pack(">I", zlib.crc32(c)) for c in (chunk, body))
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


@pytest.mark.parametrize("side", [9_000, 100_000])
def test_an_image_that_claims_a_gigabyte_of_pixels_is_refused_unopened(side):
    def refuse():
        with pytest.raises(ShardError, match="bomb/1: no image"):
            loader.decode(png_header(side, side), "bomb/1")

    assert peak_mib(refuse) < 50 < peak_mib(lambda: b"x" * (100 << 20))


GROUP_SIGNAL = """
import os, signal, sys
from pathlib import Path
from dist_vlcl.data.loader import Loader
from dist_vlcl.data.settings import DataConfig
from dist_vlcl.data.transforms import EvalTransform
from dist_vlcl.run.signals import Preemption
from tests.helpers.shards import make_index

if __name__ == "__main__":
    index = make_index(Path(sys.argv[1]), num_classes=4, train=7, test=6)
    batches = Loader(index, DataConfig(num_workers=1)).test(range(4), batch_size=2, transform=EvalTransform(32))
    with Preemption() as preemption:
        seen = 0
        for number, batch in enumerate(batches):
            seen += len(batch.labels)
            if number == 1:
                os.killpg(0, signal.SIGTERM)
    print(seen, preemption.requested)
"""


def test_a_signal_to_the_process_group_leaves_the_workers_at_work(tmp_path):
    """As torchelastic sends it: the trainer has to live on to save itself, and so must not lose a worker."""
    script = tmp_path / "group_signal.py"
    script.write_text(GROUP_SIGNAL)
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path / "shards")],
        env={**os.environ, "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        timeout=120,
        start_new_session=True,
    )
    assert (done.returncode, done.stdout.split()) == (0, ["24", "True"]), done.stderr[-1000:]
