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
import logging
import math
import re
import shutil
import tarfile
import tempfile
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import webdataset
from PIL import Image

from dist_vlcl.data.download import read_bytes
from dist_vlcl.data.sets import IMAGE_SUFFIXES, RawSample, RawSet, read_raw
from dist_vlcl.data.settings import DataConfig
from dist_vlcl.data.tasks import rank_slice
from dist_vlcl.masking import masked

FORMAT = 1
SPLITS = ("train", "test")
MAX_PIXELS = 1 << 26  # a decompression bomb has few bytes and billions of pixels
MAX_INDEX_BYTES = 1 << 28
PIXELS = "ppm"  # images stored as pixels: binary PPM, a short header and H x W x 3 bytes, which any viewer opens
PPM_HEADER = re.compile(rb"P6\n([1-9]\d{0,4}) ([1-9]\d{0,4})\n255\n")
SHARD_PATH = re.compile(r"(train|test)/\d{4,}-\d{3,}\.tar")
MEMBER = re.compile(r"((?:.*/)?[^./]+)\.([^/]*)")  # key and suffix: the suffix begins at the first dot of the file's name

Track = Callable[[Sequence[Any]], Iterable[Any]]  # wraps a list of pieces of work, to show progress

log = logging.getLogger(__name__)


class ShardError(RuntimeError):
    """A shard is damaged or holds something that our shards never hold."""


class ShardUnavailableError(ShardError):
    """A shard could not be read now. Another attempt may succeed."""


class StoredSample(NamedTuple):
    key: str
    image: bytes


# Images


def is_ppm(data: bytes) -> bool:
    return data.startswith(b"P6")


def decode(data: bytes, key: str) -> np.ndarray:
    """PNG, JPEG, WebP or our PPM -> RGB pixels, uint8 [H, W, 3]. Raises ShardError for anything else."""
    try:
        if header := PPM_HEADER.match(data):  # 80 times faster than Pillow
            return np.frombuffer(data, np.uint8, offset=header.end()).reshape(int(header[2]), int(header[1]), 3)
        image = Image.open(io.BytesIO(data), formats=("PNG", "JPEG", "WEBP"))
        if image.width * image.height > MAX_PIXELS:
            raise ValueError(f"{image.width} x {image.height} pixels are more than {MAX_PIXELS:,}")
        return np.asarray(image.convert("RGB"))
    except Exception as error:  # Pillow raises many types of errors for damaged bytes
        raise ShardError(f"{key}: no image: {error}") from error


def ppm(pixels: np.ndarray) -> bytes:
    """Pixels, uint8 [H, W, 3] -> PPM, which needs no decoding."""
    return b"P6\n%d %d\n255\n" % (pixels.shape[1], pixels.shape[0]) + pixels.tobytes()


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


@dataclass(frozen=True)
class Index:
    """The classes of a data set, and the shards of each split and class."""

    name: str
    reader: str
    class_names: tuple[str, ...]
    encodings: tuple[str, ...]
    shards: dict[str, tuple[tuple[Shard, ...], ...]]  # split -> class id -> shards
    location: str
    allow_pipe: bool = False
    timeout_s: float = 120  # to read one shard from http(s) or a pipe:, all attempts together

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
        """Read every shard. Raises ShardError that names the shards whose samples or bytes differ from the index."""
        shards = [shard for split in SPLITS for of_class in self.shards[split] for shard in of_class]
        problems = [str(problem) for _, problem in (read_shard(self, shard) for shard in track(shards)) if problem]
        if problems:
            raise ShardError(f"{len(problems)} of {len(shards)} shards are damaged:\n" + "\n".join(problems))

    def _text(self) -> str:
        content = {"format": FORMAT, **asdict(self)}
        del content["location"], content["allow_pipe"], content["timeout_s"]
        return json.dumps(content, indent=1, sort_keys=True)

    @classmethod
    def load(cls, location: str, allow_pipe: bool = False, timeout_s: float = 120) -> "Index":
        """Read index.json below a folder or address. Raises OSError, or ValueError if it is not an index of this format."""
        url = _address(location, "index.json")
        try:
            text = read_bytes(url, allow_pipe, MAX_INDEX_BYTES, timeout_s)
        except OSError as error:
            raise OSError(masked(f"{url}: cannot be read: {error}")) from error
        try:
            content = json.loads(text)
            if content["format"] != FORMAT:
                raise ValueError(f"format {content['format']}, this version reads {FORMAT}")
            names = tuple(content["class_names"])
            shards = {split: tuple(tuple(map(_checked, of_class)) for of_class in content["shards"][split]) for split in SPLITS}
            if any(len(shards[split]) != len(names) for split in SPLITS):
                raise ValueError(f"{len(names)} names, but shards for {[len(shards[split]) for split in SPLITS]} classes")
            encodings = tuple(content["encodings"])
            return cls(content["name"], content["reader"], names, encodings, shards, location, allow_pipe, timeout_s)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(masked(f"{url}: damaged ({type(error).__name__}: {error}); copy it, or build the shards, again")) from error


def _address(location: str, path: str) -> str:
    return location.replace("{}", path) if "{}" in location else f"{location.rstrip('/')}/{path}"


def _checked(entry: dict[str, Any]) -> Shard:
    shard = Shard(**entry)
    # an index from elsewhere must not name a file outside its folder or a command for the shell of a `pipe:`
    if not SHARD_PATH.fullmatch(shard.path):
        raise ShardError(f"index.json names {shard.path!r}: the path of a shard has the form train/0003-000.tar")
    if not type(shard.count) is type(shard.bytes) is int:
        raise TypeError(f"{shard.path}: count and bytes must be whole numbers")
    return shard


def open_index(data: DataConfig) -> Index:
    """Return the index of the data set that the options name. The shards of `digits` are built here if they are missing.

    Raises FileNotFoundError with the command that builds the shards of another data set.
    """
    if data.url:
        return Index.load(data.url, data.allow_pipe, data.timeout_s)
    folder = Path(data.root) / data.name
    if not (folder / "index.json").exists():
        if data.reader_name != "digits":
            raise FileNotFoundError(f"{folder}/index.json is missing; build the shards first:\n  {build_command(data)}")
        make_shards(data)
    return Index.load(str(folder))


def build_command(data: DataConfig) -> str:
    """Return the command that builds these shards."""
    defaults = asdict(DataConfig(name=data.reader_name, reader=data.reader))
    changed = [f"data.{name}={value}" for name, value in asdict(data).items() if value != defaults[name]]
    source = ["data.source=FOLDER_OR_TAR"] if data.reader_name == "folder" and data.source is None else []
    return " ".join(["python -m dist_vlcl.commands.build_data", f"data={data.reader_name}", *changed, *source])


# Writing


def make_shards(data: DataConfig, track: Track = iter) -> Index:
    """Write the shards of the data set that the options name.

    Raises FileExistsError if there are shards already, since they are not compared with the source, and ValueError for a single class.
    """
    folder = Path(data.root) / data.name
    if (folder / "index.json").exists():
        raise FileExistsError(f"{folder} has shards already: remove it to build them again, or choose another data.root")
    raw = read_raw(data)
    if len(raw.class_names) < 2:
        raise ValueError(f"data.source={data.source!r}: all images are in one folder, {raw.class_names}; give one folder for each class")
    return write_shards(raw, data, track)


def write_shards(raw: RawSet, data: DataConfig, track: Track = iter) -> Index:
    """Write the shards and index of a raw data set into the folder root/name, which appears complete or not at all.

    Equal images give equal bytes. If another process finishes first, its folder stays.
    """
    folder = Path(data.root) / data.name
    folder.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    by_class: dict[tuple[str, int], list[RawSample]] = defaultdict(list)
    for sample in raw.samples:
        by_class[sample.split, sample.class_id].append(sample)
    classes = range(len(raw.class_names))
    work = [(split, class_id) for split in SPLITS for class_id in classes]
    encodings = (PIXELS,) if data.stores_pixels else tuple(sorted({sample.suffix for sample in raw.samples}))
    try:
        written = {(split, number): _write_class(aside, split, number, by_class[split, number], data) for split, number in track(work)}
        shards = {split: tuple(written[split, class_id] for class_id in classes) for split in SPLITS}
        index = Index(data.name, data.reader_name, tuple(raw.class_names), encodings, shards, str(folder))
        (aside / "index.json").write_text(index._text() + "\n", encoding="utf-8")
        aside.chmod(0o755)  # mkdtemp allows only the owner
        try:
            aside.rename(folder)
        except OSError:
            if not (folder / "index.json").exists():
                raise FileExistsError(f"{folder} exists and holds no index.json: remove it, or choose another data.root") from None
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return index


def _write_class(folder: Path, split: str, class_id: int, samples: Sequence[RawSample], data: DataConfig) -> tuple[Shard, ...]:
    """Write the shards of one class. They have equal sizes, so that each window of train_order mixes the classes in equal parts."""
    (folder / split).mkdir(exist_ok=True)
    num_shards, keys, written = math.ceil(len(samples) / data.samples_per_shard), unique_keys(samples), []
    for number in range(num_shards):
        path, members = f"{split}/{class_id:04d}-{number:03d}.tar", rank_slice(len(samples), number, num_shards)
        stream = io.BytesIO()
        with webdataset.TarWriter(stream, encoder=False, user="", group="", mtime=0) as tar:
            for sample in (samples[place] for place in members):
                image, suffix = sample.read(), sample.suffix
                if data.stores_pixels:
                    image, suffix = ppm(decode(image, sample.key)), PIXELS
                tar.write({"__key__": next(keys), "cls": str(class_id).encode(), suffix: image})
        content = stream.getvalue()
        (folder / path).write_bytes(content)
        written.append(Shard(path, len(members), len(content), hashlib.sha256(content).hexdigest()))
    return tuple(written)


def unique_keys(samples: Sequence[RawSample]) -> Iterator[str]:
    """Yield each sample's key without what tar or webdataset cannot hold: dots, special characters, great length, repetition."""
    seen: Counter[str] = Counter()
    for sample in samples:
        key = re.sub(r"[^A-Za-z0-9_/-]+", "_", sample.key)[-80:].strip("_/") or "sample"
        seen[key] += 1
        yield key if seen[key] == 1 else f"{key}--{seen[key]}"


# Reading


def read_shard(index: Index, shard: Shard) -> tuple[list[StoredSample], ShardError | None]:
    """Return the samples of a shard that can be read, and what is wrong with it (None for a sound shard).

    Raises ShardError for members that our shards never hold: only text labels and images are ever opened.
    """
    url = _address(index.location, shard.path)
    try:
        content = read_bytes(url, index.allow_pipe, shard.bytes + 1, index.timeout_s)
    except OSError as error:
        return [], ShardUnavailableError(masked(f"{url}: cannot be read: {error}"))
    samples, damage = _parse(content, shard)
    if hashlib.sha256(content).hexdigest() == shard.sha256 and len(samples) == shard.count:
        return samples, None
    return samples, ShardError(
        f"{masked(url)}: the index says {shard.count} samples in {shard.bytes} bytes, found {len(samples)} in {len(content)}, "
        f"{'the bytes differ' if len(content) == shard.bytes else 'another length'}{damage}"
    )


def _parse(content: bytes, shard: Shard) -> tuple[list[StoredSample], str]:
    """Return the complete samples before the first damage, and a description of the damage.

    Raises ShardError for a member that would need more memory than the shard has bytes.
    """
    found: dict[str, dict[str, bytes]] = defaultdict(dict)  # key -> suffix -> content
    damage = ""
    try:
        # Mode `r:` never decompresses: a compressed tar is damage.
        for member in tarfile.open(fileobj=io.BytesIO(content), mode="r:"):  # noqa: SIM115 - a buffer
            if member.size > max(len(content), shard.bytes) or member.sparse is not None:
                raise ShardError(f"{shard.path}: refused, the member {member.name!r} claims {member.size:,} bytes")
            match, end = MEMBER.fullmatch(member.name), member.offset_data + member.size
            if not match or not member.isreg():
                continue  # like webdataset, which ignores folders and names without a suffix
            if end > len(content):
                raise tarfile.ReadError("unexpected end of data")
            key, suffix = match[1], match[2].lower()
            if suffix in found[key]:
                raise ValueError(f"{member.name}: duplicate file name")
            found[key][suffix] = content[member.offset_data : end]
    except ShardError:
        raise
    except Exception as error:  # tarfile raises many types of errors for damaged bytes
        damage = f" ({type(error).__name__}: {error})"
    return [StoredSample(key, image) for key, files in found.items() for image in _images(key, files, shard)], damage


def _images(key: str, files: dict[str, bytes], shard: Shard) -> list[bytes]:
    """Return the image of a sample; nothing if damage has cut the sample in two, which the count shows."""
    if key.startswith("/") or ".." in key.split("/"):
        raise ShardError(f"{shard.path}: refused, the name {key!r} leads out of the shard")
    allowed = (PIXELS, *IMAGE_SUFFIXES)
    if foreign := [suffix for suffix in files if suffix not in ("cls", *allowed)]:
        raise ShardError(f"{shard.path}: refused, {key}.{foreign[0]} is neither a label (.cls) nor an image ({', '.join(allowed)})")
    images = [data for suffix, data in files.items() if suffix != "cls"]
    if len(images) != 1 or "cls" not in files:
        return []
    if files["cls"].strip() != str(shard.class_id).encode():
        raise ShardError(f"{shard.path}: refused, {key} is labelled {files['cls'][:20]!r}")
    return images
