"""Images per second of the loader, on one core, from shards that are written for this measurement.

python -m benchmarks.data                                                 images of 32 pixels (CIFAR-100) as PNG
python -m benchmarks.data --side 256 --format jpeg --stored 256
"""

import argparse
import collections
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.common import Table, benchmark, interleaved
from dist_vlcl.config import compose_config
from dist_vlcl.data.loader import Loader
from dist_vlcl.data.settings import DataConfig
from dist_vlcl.data.shards import Index, decode, make_shards, read_shard
from dist_vlcl.data.tasks import TaskStream
from dist_vlcl.data.transforms import TrainTransform

CLASSES = 8


def measure(args: argparse.Namespace) -> list[Table]:
    """Return the images per CPU second of each part of the loader's work, one row per encoding of the shards."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        write_images(Path(folder) / "images", args)
        for encoding in ("original", "pixels"):
            seconds = interleaved(ways(args, build_shards(Path(folder), encoding)), args.repeats, "cpu")
            rates = {way: args.stored / statistics.median(turns) for way, turns in seconds.items()}
            rows.append({"stored as": args.format if encoding == "original" else encoding, **rates})
    title = f"Images per CPU second of the loader: images of {args.side} pixels to {args.size}, batches of {args.images}"
    return [Table(title, rows)]


def ways(args: argparse.Namespace, index: Index) -> dict[str, Callable[[], Any]]:
    """Return what is timed on the shards of an index."""
    task, transform = TaskStream(index.class_names, CLASSES)[0], TrainTransform(args.size)
    shards = [shard for of_class in index.shards["train"] for shard in of_class]

    def load() -> None:
        loader = Loader(index, DataConfig(num_workers=0))
        collections.deque(loader.train(task, batch_size=args.images, seed=0, epoch=0, transform=transform), maxlen=0)

    return {
        "read, decode": lambda: [decode(data, key) for shard in shards for key, data in read_shard(index, shard)],
        "read, decode, crop, resize": load,
    }


def build_shards(folder: Path, encoding: str) -> Index:
    """Build the shards of the images in `folder`."""
    options = [f"data.name={encoding}", f"data.source={folder / 'images'}", f"data.root={folder}", f"data.encoding={encoding}"]
    return make_shards(compose_config(["data=folder", *options]).data)


def write_images(folder: Path, args: argparse.Namespace) -> None:
    """Write `stored` training images of all classes, and one test image of each."""
    for number in range(args.stored + CLASSES):
        split, name = ("train", number) if number < args.stored else ("test", number - args.stored)
        path = folder / split / f"class{number % CLASSES}" / f"{name:06d}.{args.format}"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(number, args.side).save(path, quality=90)  # PNG has no quality and ignores it


def picture(seed: int, side: int) -> Image.Image:
    """Return an image with structure at all scales, which compresses about as photographs do."""
    rng, mixed = np.random.default_rng(seed), np.zeros((side, side, 3))
    for k, s in enumerate([s for s in (2, 8, 32, 128) if s < side] + [side]):
        layer = Image.fromarray(rng.integers(0, 256, (s, s, 3), dtype=np.uint8)).resize((side, side), Image.Resampling.BICUBIC)
        mixed += 2.0**-k * np.asarray(layer)
    return Image.fromarray((mixed * (255 / mixed.max())).astype(np.uint8))


main = benchmark(measure, __doc__, side=32, format="png", size=224, stored=512, images=128, repeats=3)
