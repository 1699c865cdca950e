"""Images per second of the loader, on one core, from shards that are written for this measurement.

python -m benchmarks.data                                                 images of 32 pixels (CIFAR-100) as PNG
python -m benchmarks.data --side 256 --format jpeg --count 256
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.common import Table, interleaved, positive, run
from dist_vlcl.data.loader import Loader
from dist_vlcl.data.settings import DataConfig
from dist_vlcl.data.shards import Index, decode, read_shard
from dist_vlcl.data.tasks import TaskStream
from dist_vlcl.data.transforms import TrainTransform

CLASSES = 8


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", type=positive, default=32, help="side of the stored images in pixels (default: %(default)s)")
    parser.add_argument("--format", default="png", choices=("png", "jpeg"), help="format of the original images (default: %(default)s)")
    parser.add_argument("--size", type=positive, default=224, help="side that the model takes, in pixels (default: %(default)s)")
    parser.add_argument("--count", type=positive, default=512, help="number of images (default: %(default)s)")
    parser.add_argument("--images", type=positive, default=128, help="images of a batch (default: %(default)s)")
    parser.add_argument("--repeats", type=positive, default=3, help="turns that are timed (default: %(default)s)")
    run(parser, measure, arguments)


def measure(args: argparse.Namespace) -> list[Table]:
    """Return one row per part of the loader's work, one column per encoding of the shards."""
    with tempfile.TemporaryDirectory() as folder:
        write_images(Path(folder) / "images", args)
        indices = {encoding: build_shards(Path(folder), encoding) for encoding in ("original", "pixels")}
        work = {f"{way}/{encoding}": of for encoding, index in indices.items() for way, of in ways(args, index).items()}
        seconds = interleaved(work, args.repeats, "cpu")
    rows: dict[str, dict] = {}
    for name, turns in seconds.items():
        way, encoding = name.split("/")
        label = f"stored as {args.format if encoding == 'original' else encoding}"
        rows.setdefault(way, {"images per CPU second": way})[label] = args.count / statistics.median(turns)
    title = f"The loader on one core: images of {args.side} pixels to {args.size}, batches of {args.images}"
    return [Table(title, list(rows.values()))]


def ways(args: argparse.Namespace, index: Index) -> dict[str, Callable[[], Any]]:
    """Return what is timed on the shards of an index."""
    task = TaskStream(index.class_names, CLASSES)[0]
    shards = [shard for of_class in index.shards["train"] for shard in of_class]
    warm = Loader(index, DataConfig(num_workers=0))

    def load(loader: Loader) -> None:
        for _ in loader.train(task, batch_size=args.images, seed=0, epoch=0, transform=TrainTransform(args.size)):
            pass

    return {
        "read, decode": lambda: [decode(data, key) for shard in shards for key, data in read_shard(index, shard)],
        "read, decode, crop, resize": lambda: load(Loader(index, DataConfig(num_workers=0))),
        "crop, resize (images in memory)": lambda: load(warm),
    }


def build_shards(folder: Path, encoding: str) -> Index:
    """Build the shards of the images in `folder` with the command that a user calls."""
    options = [f"data.name={encoding}", f"data.source={folder / 'images'}", f"data.root={folder}", f"data.encoding={encoding}"]
    command = [sys.executable, "-m", "dist_vlcl.commands.build_data", "data=folder", *options]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"the shards could not be built: {done.stderr[-2000:]}")
    return Index.load(str(folder / encoding))


def write_images(folder: Path, args: argparse.Namespace) -> None:
    """Write `count` training images of all classes, and one test image of each."""
    for number in range(args.count + CLASSES):
        split, name = ("train", number) if number < args.count else ("test", number - args.count)
        path = folder / split / f"class{number % CLASSES}" / f"{name:06d}.{args.format}"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(number, args.side).save(path, quality=90)  # PNG has no quality and ignores it


def picture(seed: int, side: int) -> Image.Image:
    """Return an image with structure at all scales, which compresses about as photographs do."""
    rng = np.random.default_rng(seed)
    sides = [s for s in (2, 8, 32, 128) if s < side] + [side]
    layers = [
        Image.fromarray(rng.integers(0, 256, (s, s, 3), dtype=np.uint8)).resize((side, side), Image.Resampling.BICUBIC) for s in sides
    ]
    weights = np.array([2.0**-k for k in range(len(layers))])
    mixed = sum(w * np.asarray(layer, dtype=np.float32) for w, layer in zip(weights / weights.sum(), layers, strict=True))
    return Image.fromarray(np.asarray(mixed, dtype=np.uint8))


if __name__ == "__main__":
    main()
