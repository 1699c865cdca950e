"""The options of the `data` group: what to read, from where, and how."""

from dataclasses import dataclass

READERS = ("digits", "cifar100", "tiny_imagenet", "imagenet_r", "folder")
ON_ERROR = ("stop", "skip")
ENCODINGS = ("auto", "original", "pixels")
SMALL_IMAGES = ("digits", "cifar100", "tiny_imagenet")  # 3 to 12 kB an image as pixels


@dataclass
class DataConfig:
    """What to read and how; raises ValueError, naming the option, for a value that cannot work."""

    name: str = "digits"  # the shards lie in root/name
    reader: str | None = None  # one of READERS; None: the one called `name`
    root: str = "data"  # relative to the working directory
    url: str | None = None  # read shards below this path or http(s) address instead of root/name; `{}` stands for the shard's path
    source: str | None = None  # the raw set: a folder, a .tar or a .zip; None: download, where the reader can
    test_source: str | None = None  # the raw test images, where they lie apart
    test_fraction: float = 0.2  # for a source without a split of its own
    split_file: str | None = None  # a list `train`, paths, `test`, paths; goes before test_fraction
    split_seed: int = 0
    class_names: str | None = None  # json list of {"folder", "name"}; for reader=folder it also gives the class ids
    underscore_names: bool = False  # leave `aquarium_fish` as it is in prompts: the baseline's defect Q7, to reproduce it
    samples_per_shard: int = 64  # at most; the shards of a class are equal to within one sample
    encoding: str = "auto"  # of images in shards: original (PNG, JPEG), or pixels: no decoding; auto: pixels for sets of small images
    on_error: str = "stop"  # a damaged shard or image: stop the run, or skip the samples and report them
    allow_pipe: bool = False  # let `url` run a command, as in `pipe:aws s3 cp s3://bucket/set/{} -`
    timeout_s: float = 120  # for reading one shard from http(s) or a `pipe:`, all attempts together; other tools (gs:, hf:) have their own
    num_workers: int | None = None  # processes that load, of each rank; null: 4 for a GPU, none on CPUs, which are busy with the step
    cache_gib: float = 1.0  # of each rank: images kept as pixels in memory, over epochs, tasks and evaluations

    def __post_init__(self) -> None:
        _require(self.reader_name in READERS, "reader", self.reader_name, f"choose from {', '.join(READERS)}")
        _require(self.on_error in ON_ERROR, "on_error", self.on_error, f"choose from {', '.join(ON_ERROR)}")
        _require(self.name not in ("", ".", "..") and "/" not in self.name, "name", self.name, "give a plain folder name")
        _require(0 < self.test_fraction < 1, "test_fraction", self.test_fraction, "between 0 and 1, both excluded")
        _require(self.samples_per_shard >= 1, "samples_per_shard", self.samples_per_shard, "1 or more")
        _require(self.timeout_s > 0, "timeout_s", self.timeout_s, "a positive number of seconds")
        _require(self.encoding in ENCODINGS, "encoding", self.encoding, f"choose from {', '.join(ENCODINGS)}")
        _require(self.num_workers is None or self.num_workers >= 0, "num_workers", self.num_workers, "0 or more, or null")
        _require(self.cache_gib >= 0, "cache_gib", self.cache_gib, "0 or more")

    @property
    def reader_name(self) -> str:
        return self.reader or self.name

    @property
    def stores_pixels(self) -> bool:
        return self.encoding == "pixels" or (self.encoding == "auto" and self.reader_name in SMALL_IMAGES)


def _require(good: bool, option: str, value: object, allowed: str) -> None:
    if not good:
        raise ValueError(f"data.{option}={value!r}: {allowed}")
