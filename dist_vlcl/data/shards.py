"""Class-pure shards in webdataset's format and their index: write, open, read, verify.

    `index.json`            Class names; for every shard its number of samples, bytes and SHA-256.
    `train/0003-000.tar`    Samples of class 3 only.

A sample is a label `<key>.cls` (text) and an image: `<key>.png` or `.jpg` (the original file) or `<key>.ppm` (pixels).
A task is a choice of classes, so the same shards serve every class order and task size.

webdataset writes the shards and can read them. We read them ourselves, because webdataset does not notice a truncated shard: it returned
9 of 13 samples without an error.
"""

import hashlib
import io
import json
import math
import os
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import webdataset

from dist_vlcl.data.download import read_bytes
from dist_vlcl.data.files import END_BYTES, MEMBER, Found, new_folder, suffix_of, tar_members
from dist_vlcl.data.images import IMAGE_SUFFIXES, PIXELS, open_image, ppm
from dist_vlcl.data.sets import RawSet, read_raw
from dist_vlcl.data.settings import KNOWN, DataConfig
from dist_vlcl.data.tasks import rank_slice
from dist_vlcl.masking import explained, masked
from dist_vlcl.reading import MAX_BYTES, warn

FORMAT = 1
SPLITS = ("train", "test")
MAX_INDEX_BYTES = 1 << 28
MIN_SAMPLE_BYTES = 4 * 512  # in a tar: header and content of the label and of the image
CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]")  # in a name: what terminals obey and what UTF-8 cannot hold
MAX_THREADS = 8
OF_THE_BUILD = ("test_fraction", "split_seed", "split_file", "class_names")  # options that count when shards are written

Track = Callable[[Sequence[Any]], Iterable[Any]]  # wraps a list of pieces of work, to show progress


class ShardError(RuntimeError):
    """A shard is damaged or holds something that our shards never hold."""


class ShardUnavailableError(ShardError):
    """A shard could not be read now. Another attempt may succeed."""


class StoredSample(NamedTuple):
    key: str
    image: bytes


def decode(data: bytes, key: str) -> np.ndarray:
    """Image -> RGB pixels, uint8 [H, W, 3]. Raises ShardError that names the image if it cannot be opened."""
    with explained(key, to=ShardError):
        return open_image(data)


# The index


@dataclass(frozen=True)
class Shard:
    path: str  # relative to the index
    count: int  # samples
    bytes: int
    sha256: str

    @property
    def class_id(self) -> int:
        return int(Path(self.path).name.split("-")[0])

    def check(self, path: str) -> None:
        """Raise ValueError if the entry is not one of the shard at `path`."""
        # an index from elsewhere must not name a file outside its folder or a command for the shell of a `pipe:`
        if self.path != path:
            raise ValueError(f"names {self.path!r} in the place of {path}")
        are_whole = type(self.count) is type(self.bytes) is int
        if not are_whole or not 0 < MIN_SAMPLE_BYTES * self.count <= self.bytes - END_BYTES <= MAX_BYTES:
            raise ValueError(f"{path}: {self.count!r} samples in {self.bytes!r} bytes; both must be whole numbers that a shard can have")
        if not re.fullmatch("[0-9a-f]{64}", self.sha256):
            raise ValueError(f"{path}: {self.sha256!r} is no SHA-256")


@dataclass(frozen=True)
class Index:
    """The classes of a data set, and the shards of each split and class. Raises ValueError for a content that no data set has."""

    name: str
    reader: str
    class_names: tuple[str, ...]
    encodings: tuple[str, ...]
    shards: dict[str, tuple[tuple[Shard, ...], ...]]  # split -> class id -> shards
    location: str
    allow_pipe: bool = False
    timeout_s: float = DataConfig.timeout_s  # to read one shard from http(s) or a pipe:, all attempts together

    def __post_init__(self) -> None:
        texts = (self.name, self.reader, *self.class_names, *self.encodings)
        if wrong := [text for text in texts if not isinstance(text, str) or CONTROL.search(text)]:
            raise ValueError(f"{wrong[0]!r} is not a name: give text without control characters")

    def check_shards(self) -> None:
        """Raise ValueError for a list of shards that no data set has."""
        for split in SPLITS:
            if len(self.shards[split]) != len(self.class_names):
                raise ValueError(f"{len(self.class_names)} names, but {split} shards for {len(self.shards[split])} classes")
            for class_id, of_class in enumerate(self.shards[split]):
                for number, shard in enumerate(of_class):
                    shard.check(shard_path(split, class_id, number))

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the content, including the shards' hashes: equal only if the data are equal."""
        return hashlib.sha256(self._text().encode()).hexdigest()

    def sizes(self, split: str, classes: Iterable[int]) -> dict[int, list[int]]:
        """Return class id -> number of samples in each of its shards."""
        return {class_id: [shard.count for shard in self.shards[split][class_id]] for class_id in classes}

    def count(self, split: str, classes: Iterable[int] | None = None) -> int:
        """Return the number of samples of some classes, or of all."""
        classes = range(len(self.class_names)) if classes is None else classes
        return sum(sum(sizes) for sizes in self.sizes(split, classes).values())

    def verify(self, track: Track = iter) -> None:
        """Read every shard and open every image. Raises ShardError that names the shards that are not as they were written."""
        shards = [shard for split in SPLITS for of_class in self.shards[split] for shard in of_class]
        if problems := list(filter(None, _in_threads(self._problem, shards, track))):
            raise ShardError(f"{len(problems)} of {len(shards)} shards are damaged:\n" + "\n".join(problems))

    def _problem(self, shard: Shard) -> str | None:
        try:
            for key, image in read_shard(self, shard):
                decode(image, f"{shard.path}: {key}")
        except ShardError as error:
            return str(error)
        return None

    def _text(self) -> str:
        content = {"format": FORMAT, **asdict(self)}
        del content["location"], content["allow_pipe"], content["timeout_s"]
        return json.dumps(content, indent=1, sort_keys=True)

    def save(self, folder: Path) -> None:
        """Write index.json, with its fingerprint as its digest."""
        content = {**json.loads(self._text()), "digest": self.fingerprint}
        (folder / "index.json").write_text(json.dumps(content, indent=1, sort_keys=True) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, location: str, allow_pipe: bool = False, timeout_s: float = DataConfig.timeout_s) -> "Index":
        """Read index.json below a folder or address. Raises OSError, or ValueError for another format or content than was written."""
        url = _address(location, "index.json")
        with explained(f"{url}: cannot be read", kinds=OSError, to=OSError):
            text = read_bytes(url, allow_pipe, MAX_INDEX_BYTES, timeout_s=timeout_s)
        kinds = (ValueError, KeyError, TypeError, AttributeError, RecursionError)
        with explained(f"{url}: damaged", "copy it, or build the shards, again", kinds):
            content = json.loads(text)
            if content["format"] != FORMAT:
                raise ValueError(f"format {content['format']}, this version reads {FORMAT}")
            digest = content.pop("digest", None)  # no digest before version 0.2
            shards = {split: tuple(tuple(Shard(**e) for e in of_class) for of_class in content["shards"][split]) for split in SPLITS}
            names, encodings = tuple(content["class_names"]), tuple(content["encodings"])
            index = cls(content["name"], content["reader"], names, encodings, shards, location, allow_pipe, timeout_s)
            index.check_shards()
            if json.loads(index._text()) != content or digest not in (None, index.fingerprint):
                raise ValueError("the content is not the one that was written")
            return index


def _address(location: str, path: str) -> str:
    return location.replace("{}", path) if "{}" in location else f"{location.rstrip('/')}/{path}"


def shard_path(split: str, class_id: int, number: int) -> str:
    return f"{split}/{class_id:04d}-{number:03d}.tar"


def open_index(data: DataConfig) -> Index:
    """Return the index of the data set that the options name. The shards of `digits` are built here if they are missing.

    Raises FileNotFoundError with the command that builds the shards of another data set.
    """
    if data.url:
        index = Index.load(data.url, data.allow_pipe, data.timeout_s)
        if index.reader != data.reader_name and {index.reader, data.reader_name} <= {*KNOWN}:
            raise ValueError(f"data.url={masked(data.url)!r}: these are the shards of {index.reader}, not of {data.reader_name}")
        return index
    folder = Path(data.root) / data.name
    if not (folder / "index.json").exists():
        if data.reader_name != "digits":
            raise FileNotFoundError(f"{folder}/index.json is missing; build the shards first:\n  {build_command(data)}")
        with suppress(FileExistsError):  # another process has built them
            make_shards(replace(data, **{name: getattr(DataConfig, name) for name in OF_THE_BUILD}))  # the same for all later runs
    return Index.load(str(folder))


def open_sets(data: DataConfig, names: Sequence[str]) -> tuple[Index, list[int]]:
    """Return several data sets below data.root or data.url as one index, and the number of classes of each.

    The classes of each set follow those of the set before. Without names: the one data set of the options. Raises as `open_index` does.
    """
    if not names:
        return open_index(data), []
    class_names: list[str] = []
    shards: dict[str, tuple[tuple[Shard, ...], ...]] = dict.fromkeys(SPLITS, ())
    sizes = []
    for name in names:
        url = data.url and _address(data.url, f"{name}/{{}}" if "{}" in data.url else name)
        index = open_index(replace(data, name=name, url=url, reader=None if name in KNOWN else "folder"))
        for split, by_class in index.shards.items():
            shards[split] += tuple(tuple(replace(shard, path=f"{name}/{shard.path}") for shard in of_class) for of_class in by_class)
        class_names += index.class_names
        sizes.append(len(index.class_names))
    return Index(data.name, data.reader_name, tuple(class_names), (), shards, data.url or data.root, data.allow_pipe, data.timeout_s), sizes


def build_command(data: DataConfig) -> str:
    """Return the command that builds these shards."""
    defaults = asdict(DataConfig(name=data.reader_name, reader=data.reader))
    changed = [f"data.{name}={value}" for name, value in asdict(data).items() if value != defaults[name]]
    source = ["data.source=FOLDER_OR_TAR"] if data.reader_name == "folder" and data.source is None else []
    return " ".join(["dist-vlcl data", f"data={data.reader_name}", *changed, *source])


# Writing


def make_shards(data: DataConfig, track: Track = iter) -> Index:
    """Write the shards of the data set that the options name.

    Raises FileExistsError if there are shards already, since they are not compared with the source, and ValueError for a single class.
    """
    folder = Path(data.root) / data.name
    if (folder / "index.json").exists():
        raise FileExistsError(f"{folder} has shards already: remove it to build them again, or choose another data.root")
    if folder.exists():
        raise FileExistsError(f"{folder} exists and holds no shards, perhaps your images: choose another data.name or data.root")
    raw = read_raw(data)
    if len(raw.class_names) < 2:
        raise ValueError(f"data.source={data.source!r}: all images are in one folder, {raw.class_names}; give one folder for each class")
    return write_shards(raw, data, track)


def write_shards(raw: RawSet, data: DataConfig, track: Track = iter) -> Index:
    """Write the shards and index of a raw data set into the folder root/name, which appears complete or not at all.

    Equal images give equal bytes. Raises ShardError that names the images that cannot be opened; with data.on_error=skip they are left out.
    Raises FileExistsError if the folder exists.
    """
    by_class: dict[tuple[str | None, int], list[Found]] = defaultdict(list)
    for sample in raw.samples:
        by_class[sample.split, sample.class_id].append(sample)
    work = [(split, class_id, by_class[split, class_id]) for split in SPLITS for class_id in range(len(raw.class_names))]
    encodings = (PIXELS,) if data.stores_pixels else tuple(sorted({suffix_of(sample.path) for sample in raw.samples}))
    target, names = Path(data.root) / data.name, tuple(raw.class_names)
    index = Index(data.name, data.reader_name, names, encodings, {split: ((),) * len(names) for split in SPLITS}, str(target))
    with new_folder(target) as folder:
        written = list(_in_threads(partial(_write_class, folder, data), work, track))
        if bad := [problem for _, problems in written for problem in problems]:
            message = f"{len(bad)} of {len(raw.samples)} images cannot be opened:\n" + "\n".join(bad[:20])
            if data.on_error == "stop":
                raise ShardError(f"{message}\nReplace or remove them, or set data.on_error=skip to leave them out")
            warn(f"left out: {message}")
        for (split, class_id, samples), (shards, _) in zip(work, written, strict=True):
            if samples and not shards:
                raise ShardError(f"class {raw.class_names[class_id]!r} has no {split} image that can be opened")
        found, count = [shards for shards, _ in written], len(names)
        index = replace(index, shards={split: tuple(found[k * count : (k + 1) * count]) for k, split in enumerate(SPLITS)})
        index.save(folder)
    return index


def _in_threads(function: Callable[[Any], Any], work: Sequence[Any], track: Track) -> Iterator[Any]:
    """Yield function(item) for every item, in order. Pillow and hashlib let several threads work at once."""
    with ThreadPoolExecutor(min(MAX_THREADS, len(os.sched_getaffinity(0)))) as pool:
        for _, result in zip(track(work), pool.map(function, work), strict=True):
            yield result


def _write_class(folder: Path, data: DataConfig, of_class: tuple[str, int, Sequence[Found]]) -> tuple[tuple[Shard, ...], list[str]]:
    """Write the shards of one class; return them, and what is wrong with the images that were left out.

    The shards have equal sizes before that, so that each window of train_order mixes the classes in equal parts.
    """
    split, class_id, samples = of_class
    (folder / split).mkdir(exist_ok=True)
    num_shards, keys = math.ceil(len(samples) / data.samples_per_shard), unique_keys(samples)
    written: list[Shard] = []
    problems: list[str] = []
    for number in range(num_shards):
        count, stream = 0, io.BytesIO()
        with webdataset.TarWriter(stream, encoder=False, user="", group="", mtime=0) as tar:
            for sample, key in zip((samples[place] for place in rank_slice(len(samples), number, num_shards)), keys, strict=False):
                try:
                    image, suffix = sample.read(), suffix_of(sample.path)
                    pixels = decode(image, repr(sample.path))
                except (ValueError, ShardError) as error:
                    problems.append(str(error))
                    continue
                if data.stores_pixels:
                    image, suffix = ppm(pixels), PIXELS
                tar.write({"__key__": key, "cls": str(class_id).encode(), suffix: image})
                count += 1
        if count:
            content, path = stream.getvalue(), shard_path(split, class_id, len(written))
            (folder / path).write_bytes(content)
            written.append(Shard(path, count, len(content), hashlib.sha256(content).hexdigest()))
    return tuple(written), problems


def unique_keys(samples: Sequence[Found]) -> Iterator[str]:
    """Yield each sample's key without what tar or webdataset cannot hold: dots, special characters, great length, repetition."""
    given: set[str] = set()
    repetitions: Counter[str] = Counter()
    for sample in samples:
        unique = key = re.sub(r"[^A-Za-z0-9_/-]+", "_", sample.key)[-80:].strip("_/") or "sample"
        while unique in given:
            repetitions[key] += 1
            unique = f"{key}--{repetitions[key] + 1}"
        given.add(unique)
        yield unique


# Reading


def read_shard(index: Index, shard: Shard) -> list[StoredSample]:
    """Return the samples of a shard.

    Raises ShardError if its bytes are not those that the index says, or if it holds what our shards never hold: only text labels and
    images are ever opened.
    """
    url = _address(index.location, shard.path)
    try:
        content = read_bytes(url, index.allow_pipe, shard.bytes + 1, timeout_s=index.timeout_s)
    except OSError as error:  # `from None`: the traceback of a loading process would show a secret of the address
        raise ShardUnavailableError(masked(f"{url}: cannot be read: {error}")) from None
    if hashlib.sha256(content).hexdigest() != shard.sha256:
        sizes = f"the index says {shard.bytes} bytes, found {'more' if len(content) > shard.bytes else len(content)}"
        raise ShardError(f"{masked(url)}: the bytes differ from those that were written; {sizes}")
    with explained(f"{url}: refused", to=ShardError):
        return _parse(content, shard)


def _parse(content: bytes, shard: Shard) -> list[StoredSample]:
    """Return the samples of a shard. Raises ValueError for anything but labels of its class and images, and for another number of them."""
    labels: dict[str, bytes] = {}
    images: dict[str, bytes] = {}
    for member in tar_members(io.BytesIO(content)):
        match = MEMBER.fullmatch(member.name)
        key, suffix = (match[1], match[2].lower()) if match else (member.name, "")
        if key.startswith("/") or ".." in key.split("/"):
            raise ValueError(f"the name {member.name!r} leads out of the shard")
        if suffix not in ("cls", PIXELS, *IMAGE_SUFFIXES):
            raise ValueError(f"{member.name!r} is neither a label (.cls) nor an image ({', '.join((PIXELS, *IMAGE_SUFFIXES))})")
        files = labels if suffix == "cls" else images
        if key in files:
            raise ValueError(f"{member.name!r} comes twice")
        files[key] = content[member.offset_data : member.offset_data + member.size]
    if wrong := [key for key, label in labels.items() if label.strip() != str(shard.class_id).encode()]:
        raise ValueError(f"{wrong[0]} is labelled {labels[wrong[0]][:20]!r}, not {shard.class_id}")
    if labels.keys() != images.keys() or len(images) != shard.count:
        raise ValueError(f"the index says {shard.count} samples, found {len(labels)} labels and {len(images)} images")
    return [StoredSample(key, image) for key, image in images.items()]
