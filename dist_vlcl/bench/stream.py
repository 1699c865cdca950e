"""Images a second of the loader, on one core, from real shards written for the occasion; and whether a step would wait for it."""

import argparse
import io
import tempfile
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from dist_vlcl.bench.result import Result, Table, interleaved, median
from dist_vlcl.data.loader import decode, train_batches
from dist_vlcl.data.shards import Index, RawSample, RawSet, read_shard, write_shards
from dist_vlcl.data.tasks import TaskStream
from dist_vlcl.data.transforms import TrainTransform

EXAMPLES = """examples:
  python -m dist_vlcl.bench stream
  python -m dist_vlcl.bench stream --side 256 --format jpeg --size 224 --count 512"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--side", type=int, default=32, help="of the stored images, in pixels: 32 as CIFAR, 64 as Tiny-ImageNet, 256 (default: %(default)s)"
    )
    parser.add_argument("--format", default="png", choices=("png", "jpeg"), help="of the stored images (default: %(default)s)")
    parser.add_argument("--size", type=int, default=224, help="of the images that the model takes (default: %(default)s)")
    parser.add_argument("--count", type=int, default=1024, help="images (default: %(default)s)")
    parser.add_argument("--images", type=int, default=128, help="of a batch (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=3, help="turns that are timed (default: %(default)s)")


def run(args: argparse.Namespace) -> Result:
    with tempfile.TemporaryDirectory() as folder:
        index = write_shards(_raw_set(args), Path(folder) / "set", name="bench", reader="folder", samples_per_shard=128)
        task = TaskStream(index.class_names, 8, list(range(8)))[0]

        def load(start: int = 0) -> None:
            options = {"batch_size": args.images, "seed": 0, "epoch": 0, "rank": 0, "size": 1, "transform": TrainTransform(args.size)}
            batches = train_batches(index, task, start=start, **options)
            for _ in batches if start == 0 else [next(iter(batches))]:
                pass

        shards = [shard for by_class in index.shards["train"] for shard in by_class]
        middle = max(1, args.count // args.images // 2)
        ways = {
            "read": lambda: [read_shard(index, shard) for shard in shards],
            "read, decode": lambda: _decode_all(index, shards),
            "read, decode, crop, resize": load,
            "resume in the middle": lambda: load(middle),
        }
        seconds = interleaved(ways, args.repeats, "cpu")
    rows = [[way, args.count / median(s), ""] for way, s in seconds.items() if way != "resume in the middle"]
    rows.append(["resume in the middle: the first batch", "", median(seconds["resume in the middle"])])
    title = f"The loader on one core: {args.format} of {args.side} pixels to {args.size}, batches of {args.images}"
    return Result([Table(title, ["", "images/s", "CPU s"], rows)], [{"way": way, "s": s} for way, s in seconds.items()])


def _decode_all(index: Index, shards: list) -> None:
    for shard in shards:
        for key, data in read_shard(index, shard)[0]:
            decode(data, key)


def _raw_set(args: argparse.Namespace) -> RawSet:
    samples = [
        RawSample(
            "train", k % 8, f"class{k % 8}/{k:06d}", "png" if args.format == "png" else "jpg", partial(_picture, k, args.side, args.format)
        )
        for k in range(args.count)
    ]
    samples += [RawSample("test", c, f"class{c}/test", "png", partial(_picture, c, args.side, "png")) for c in range(8)]
    return RawSet([f"class {c}" for c in range(8)], samples)


def _picture(seed: int, side: int, format: str) -> bytes:
    """Return an image with structure at all scales, which compresses about as photographs do."""
    rng = np.random.default_rng(seed)
    sides = [s for s in (2, 8, 32, 128) if s < side] + [side]
    layers = [
        Image.fromarray(rng.integers(0, 256, (s, s, 3), dtype=np.uint8)).resize((side, side), Image.Resampling.BICUBIC) for s in sides
    ]
    weights = np.array([2.0**-k for k in range(len(layers))])
    mixed = sum(w * np.asarray(layer, dtype=np.float32) for w, layer in zip(weights / weights.sum(), layers, strict=True))
    stream = io.BytesIO()
    Image.fromarray(np.asarray(mixed, dtype=np.uint8)).save(stream, format=format, **({"quality": 90} if format == "jpeg" else {}))
    return stream.getvalue()
