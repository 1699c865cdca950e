"""Images a second of the loader, on one core, from real shards written for the occasion."""

import argparse
import io
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks.result import Result, Table, interleaved, median
from benchmarks.setup import positive
from dist_vlcl.data.loader import Loader
from dist_vlcl.data.shards import Index, RawSample, RawSet, decode, read_shard, write_shards
from dist_vlcl.data.tasks import TaskStream, generator
from dist_vlcl.data.transforms import TrainTransform

EXAMPLES = """examples:
  python -m benchmarks stream
  python -m benchmarks stream --side 256 --format jpeg --size 224 --count 512"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--side",
        type=positive,
        default=32,
        help="of stored images, in pixels: 32 as CIFAR, 64 as Tiny-ImageNet, 256 (default: %(default)s)",
    )
    parser.add_argument(
        "--format", default="png", choices=("png", "jpeg"), help="of the original images, beside pixels (default: %(default)s)"
    )
    parser.add_argument("--size", type=positive, default=224, help="of the images that the model takes (default: %(default)s)")
    parser.add_argument("--count", type=positive, default=512, help="images (default: %(default)s)")
    parser.add_argument("--images", type=positive, default=128, help="of a batch (default: %(default)s)")
    parser.add_argument("--repeats", type=positive, default=3, help="turns that are timed (default: %(default)s)")


def run(args: argparse.Namespace) -> Result:
    ways: dict[str, dict[str, Callable]] = {}
    with tempfile.TemporaryDirectory() as folder:
        raw = _raw_set(args)
        for stored in (args.format, "pixels"):
            options: dict[str, Any] = {"reader": "folder", "samples_per_shard": 128, "pixels": stored == "pixels"}
            index = write_shards(raw, Path(folder) / stored, name="bench", **options)
            for way, work in _ways(args, index).items():
                ways.setdefault(way, {})[stored] = work
        seconds = interleaved({f"{way}, {k}": work for way in ways for k, work in ways[way].items()}, args.repeats, "cpu")
    spent = {way: [median(seconds[f"{way}, {k}"]) for k in ways[way]] for way in ways}
    rows = [[way, *(s if way == RESUME else args.count / s for s in spent[way])] for way in ways]
    loader = Table(
        f"The loader on one core: images of {args.side} pixels to {args.size}, batches of {args.images}",
        ["images/s of a CPU second", f"stored as {args.format}", "stored as pixels"],
        rows,
    )
    resize = interleaved(_resizes(args), args.repeats, "cpu")
    sides = [[way, args.images / median(s)] for way, s in resize.items()]
    resized = Table(f"Crop and resize alone: {args.side} pixels to {args.size}", ["", "images/s"], sides)
    records = [{"way": way, "s": s} for way, s in {**seconds, **resize}.items()]
    return Result([loader, resized], records)


RESUME = "resume in the middle: CPU s to the first batch"


def _ways(args: argparse.Namespace, index: Index) -> dict[str, Callable]:
    """Return what is timed over the shards of an index."""
    task = TaskStream(index.class_names, 8, list(range(8)))[0]

    def load(loader: Loader, start: int = 0) -> None:
        options = {"batch_size": args.images, "seed": 0, "epoch": 0, "transform": TrainTransform(args.size)}
        batches = loader.train(task, start=start, **options)
        for _ in batches if start == 0 else [next(iter(batches))]:
            pass

    def read_and_decode() -> None:
        for shard in (shard for of_class in index.shards["train"] for shard in of_class):
            for key, data in read_shard(index, shard)[0]:
                decode(data, key)

    kept, middle = Loader(index), max(1, args.count // args.images // 2)
    return {
        "read, decode": read_and_decode,
        "read, decode, crop, resize": lambda: load(Loader(index)),
        "crop, resize: from memory": lambda: load(kept),
        RESUME: lambda: load(Loader(index), middle),
    }


def _resizes(args: argparse.Namespace) -> dict[str, Callable]:
    """Return crop and resize of one batch, on one core."""
    pixels = torch.randint(0, 256, (args.images, args.side, args.side, 3), dtype=torch.uint8)
    transform = TrainTransform(args.size)
    return {"one core": lambda: [transform(image.numpy(), generator(number)) for number, image in enumerate(pixels)]}


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
