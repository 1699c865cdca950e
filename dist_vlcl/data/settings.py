"""The options of the `data` group: what to read, from where, and how."""

import re
from dataclasses import dataclass

from dist_vlcl.data.download import check_scheme
from dist_vlcl.options import option

KNOWN = ("digits", "cifar100", "tiny_imagenet", "imagenet_r")  # data sets with a reader of their own
READERS = (*KNOWN, "folder", "webdataset", "hf", "torchvision")
SMALL_IMAGES = ("digits", "cifar100", "tiny_imagenet")  # 3 to 12 kB an image as pixels


def check_name(option: str, name: str) -> None:
    """Raise ValueError for the name of a data set that cannot be a folder, or a folder of a folder as for ORG/NAME.

    The name is a part of addresses and of the shell's command of a `pipe:`, also if a saved run names it.
    """
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) or {".", ".."} & set(name.split("/")):
        raise ValueError(f"{option}={name!r}: give a plain folder name of letters, digits, '.', '_' and '-', or ORG/NAME")


@dataclass
class DataConfig:
    """Which data set to read and how. `options.validate` checks the values."""

    name: str = option("digits", "Name of the data set; its shards are in the folder root/name.")
    reader: str | None = option(None, "Format of the raw data set; null takes the reader that has the data set's name.", choices=READERS)
    root: str = option("data", "Folder for shards and downloads, relative to the working directory.")
    url: str | None = option(None, "Folder or http(s) address of the shards instead of root/name; `{}` in it stands for a shard's path.")
    source: str | None = option(None, "The raw data set: a folder, .tar, .zip or address; null downloads it where the reader can.")
    train_split: str = option("train", "With reader=hf and torchvision: name of the training split.")
    test_split: str | None = option(None, "The same of the test split; null takes test, and with reader=hf also valid or validation.")
    subset: str | None = option(None, "With reader=hf: name of a configuration of the data set.")
    image_column: str | None = option(None, "With reader=hf: column of the images; null takes the only one of type Image.")
    label_column: str | None = option(None, "With reader=hf: column of the classes; null takes the only one of type ClassLabel.")
    test_fraction: float = option(0.2, "Part of each class for testing, if the source has no split.", above=0, below=1)
    split_file: str | None = option(None, "Text file: `train`, image paths, `test`, image paths; it replaces test_fraction.")
    split_seed: int = option(0, "Seed of the held-out images and, when shards are built, of a random split for testing.")
    class_names: str | None = option(None, 'JSON list of {"folder": ..., "name": ...} by class id; numbered classes: one name a line.')
    underscore_names: bool = option(False, "Keep underscores of class names in prompts, as the baseline's code does.")
    samples_per_shard: int = option(64, "Most samples in a shard; the shards of a class differ by at most one sample.", min=1)
    encoding: str = option("auto", "Images in shards: files or pixels; auto: pixels if small.", choices=("auto", "original", "pixels"))
    on_error: str = option("stop", "A damaged image stops the build, or is left out and logged.", choices=("stop", "skip"))
    allow_pipe: bool = option(False, "Allow a url that runs a command, such as `pipe:aws s3 cp s3://bucket/set/{} -`.")
    timeout_s: float = option(120, "Seconds to read one shard from http(s) or a `pipe:`, all attempts together.", above=0, max=10**6)
    num_workers: int | None = option(None, "Loading processes of each rank; null: up to 4 for a GPU, none for a CPU.", min=0, max=256)
    cache_gib: float = option(1.0, "Memory of each rank for images that are used again, in GiB.", min=0)

    def check(self) -> None:
        """Raise ValueError for a name that cannot be a folder, or that needs a reader, and for an address that cannot be read."""
        if self.url:
            check_scheme(self.url, self.allow_pipe)
        check_name("data.name", self.name)
        if self.reader_name not in READERS:
            raise ValueError(f"data.name={self.name!r}: choose from {', '.join(KNOWN)}, or set data.reader=folder for your own images")

    @property
    def reader_name(self) -> str:
        return self.reader or self.name

    @property
    def stores_pixels(self) -> bool:
        return self.encoding == "pixels" or (self.encoding == "auto" and self.reader_name in SMALL_IMAGES)
