"""The options of the `data` group: what to read, from where, and how."""

from dataclasses import dataclass

from dist_vlcl.options import option

READERS = ("digits", "cifar100", "tiny_imagenet", "imagenet_r", "folder")
SMALL_IMAGES = ("digits", "cifar100", "tiny_imagenet")  # 3 to 12 kB an image as pixels


@dataclass
class DataConfig:
    """Which data set to read and how. `options.validate` checks the values."""

    name: str = option("digits", "Name of the data set; its shards lie in the folder root/name.")
    reader: str | None = option(None, "Format of the raw data set; null takes the reader that has the data set's name.", choices=READERS)
    root: str = option("data", "Folder for shards and downloads, relative to the working directory.")
    url: str | None = option(
        None, "Read shards from this folder or http(s) address instead of root/name; `{}` in it stands for the path of a shard."
    )
    source: str | None = option(None, "The raw data set: a folder, .tar or .zip; null downloads it where the reader can.")
    test_source: str | None = option(None, "The raw test images, where they are not in the same source as the training images.")
    test_fraction: float = option(0.2, "Fraction of each class used for testing, for a source without a split.", above=0, below=1)
    split_file: str | None = option(
        None, "Text file with a line `train`, lines of image paths, a line `test` and more paths; replaces test_fraction."
    )
    split_seed: int = option(0, "Seed of the random split into training, test and held-out images.")
    class_names: str | None = option(
        None, 'JSON file with a list of {"folder": ..., "name": ...}; with reader=folder its order gives the class ids.'
    )
    underscore_names: bool = option(False, "Keep underscores of class names in prompts, as the baseline's code does.")
    samples_per_shard: int = option(64, "Most samples in a shard; the shards of a class differ by at most one sample.", min=1)
    encoding: str = option(
        "auto",
        "How shards store images: the original files, or decoded pixels; auto chooses pixels for data sets of small images.",
        choices=("auto", "original", "pixels"),
    )
    on_error: str = option(
        "stop", "What a damaged shard or image does: stop the run, or skip its samples and report them.", choices=("stop", "skip")
    )
    allow_pipe: bool = option(False, "Allow a url that runs a command, such as `pipe:aws s3 cp s3://bucket/set/{} -`.")
    timeout_s: float = option(
        120, "Seconds to read one shard from an http(s) address or a `pipe:`, all attempts together; other tools have their own.", above=0
    )
    num_workers: int | None = option(
        None, "Loading processes of each rank; null means up to 4 for a GPU and none on a CPU, whose cores the step uses.", min=0
    )
    cache_gib: float = option(1.0, "Memory of each rank for images kept as pixels for later epochs, tasks and evaluations, in GiB.", min=0)

    def check(self) -> None:
        """Raise ValueError for a name that cannot be a folder, or that needs a reader."""
        if self.name in ("", ".", "..") or "/" in self.name:
            raise ValueError(f"data.name={self.name!r}: give a plain folder name")
        if self.reader_name not in READERS:
            raise ValueError(
                f"data.name={self.name!r}: choose from {', '.join(READERS[:-1])}, or set data.reader=folder for your own images"
            )

    @property
    def reader_name(self) -> str:
        return self.reader or self.name

    @property
    def stores_pixels(self) -> bool:
        return self.encoding == "pixels" or (self.encoding == "auto" and self.reader_name in SMALL_IMAGES)
