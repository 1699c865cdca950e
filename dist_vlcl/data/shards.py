"""Class-pure webdataset shards and their index: writing, reading, checking.

    index.json              names, and for every shard its samples, bytes and SHA-256
    train/0003-000.tar      samples of class 3 only: `<key>.cls` (text) and `<key>.png` or `.jpg` (original bytes) or `.ppm` (its pixels)

A task is a choice of classes, so the same shards serve every class order and increment. The index is what makes a truncated shard
visible: webdataset itself reads 9 of 13 samples without a word.
"""

import contextlib
import hashlib
import io
import json
import logging
import math
import os
import re
import shutil
import signal
import ssl
import subprocess
import tarfile
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from http.client import HTTPException, IncompleteRead, InvalidURL
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlparse
from urllib.request import url2pathname

import numpy as np
import webdataset
from PIL import Image
from webdataset.tariterators import group_by_keys

from dist_vlcl.data.order import rank_slice
from dist_vlcl.masking import masked

FORMAT = 1
SPLITS = ("train", "test")
MAX_PIXELS = 1 << 26  # a bomb has a few bytes and billions of pixels
COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
INDEX_BYTES = 1 << 28  # an index.json is not larger
ATTEMPTS = 3  # that each have a part of the time, where a server or command stalls; one that refuses is asked again until the time is over
ASK_LATER = (408, 429)  # a server's words for: it took too long, too many ask
LONGEST_PAUSE_S = 5  # between two attempts
IMAGE_SUFFIXES = ("png", "jpg", "jpeg", "webp")  # of raw images
PIXELS = "ppm"  # of images stored as pixels: binary PPM, a short header and H x W x 3 bytes, which any viewer opens
PPM_HEADER = re.compile(rb"P6\n([1-9]\d{0,4}) ([1-9]\d{0,4})\n255\n")
SHARD_PATH = re.compile(r"(train|test)/\d{4,}-\d{3,}\.tar")

log = logging.getLogger(__name__)


class ShardError(RuntimeError):
    """A shard that is damaged, or that holds what no shard of ours holds."""


class UnreadShard(ShardError):
    """A shard that could not be read: another time it may be."""


class Unread(str):
    """Words about a shard that could not be read, and so may be sound."""

    __slots__ = ()


class RawSample(NamedTuple):
    """One image of a raw set; its bytes are read late, class by class."""

    split: str
    class_id: int
    key: str
    suffix: str
    read: Callable[[], bytes]


class RawSet(NamedTuple):
    class_names: list[str]
    samples: list[RawSample]


class StoredSample(NamedTuple):
    key: str
    image: bytes


def is_ppm(data: bytes) -> bool:
    return data.startswith(b"P6")


def decode(data: bytes, key: str) -> np.ndarray:
    """PNG, JPEG, WebP or our PPM -> RGB pixels, uint8 [H, W, 3]; raises ShardError for anything else."""
    if header := PPM_HEADER.match(data):
        width, height = int(header[1]), int(header[2])
        if len(data) - header.end() != width * height * 3:
            raise ShardError(f"{key}: no image: {width} x {height} pixels need {width * height * 3} bytes, not {len(data) - header.end()}")
        return np.frombuffer(data, np.uint8, offset=header.end()).reshape(height, width, 3)
    try:
        image = Image.open(io.BytesIO(data), formats=("PNG", "JPEG", "WEBP"))
        if image.width * image.height > MAX_PIXELS:
            raise ValueError(f"{image.width} x {image.height} pixels are more than {MAX_PIXELS:,}")
        return np.asarray(image.convert("RGB"))
    except Exception as error:  # PIL raises what it likes on damaged bytes
        raise ShardError(f"{key}: no image: {error}") from error


def ppm(pixels: np.ndarray) -> bytes:
    """Pixels, uint8 [H, W, 3] -> PPM, which needs no decoding."""
    return b"P6\n%d %d\n255\n" % (pixels.shape[1], pixels.shape[0]) + pixels.tobytes()


@dataclass(frozen=True)
class Shard:
    path: str  # relative to the index
    count: int
    bytes: int
    sha256: str

    @property
    def class_id(self) -> int:
        return int(Path(self.path).name.split("-")[0])


@dataclass(frozen=True)
class Index:
    """What there is to read: the classes, and for each split and class its shards."""

    name: str
    reader: str
    class_names: tuple[str, ...]
    encodings: tuple[str, ...]
    shards: dict[str, tuple[tuple[Shard, ...], ...]]  # split -> class id -> shards
    location: str
    allow_pipe: bool = False
    timeout_s: float = 120  # for reading one shard from http(s) or a pipe:, all attempts together

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the content, shard hashes included: equal only if the data are equal."""
        return hashlib.sha256(self._text().encode()).hexdigest()

    def sizes(self, split: str, classes: Iterable[int]) -> dict[int, list[int]]:
        """Class id -> samples in each of its shards."""
        return {class_id: [shard.count for shard in self.shards[split][class_id]] for class_id in classes}

    def count(self, split: str, classes: Iterable[int] | None = None) -> int:
        """Samples of some classes, or of all."""
        classes = range(self.num_classes) if classes is None else classes
        return sum(sum(sizes) for sizes in self.sizes(split, classes).values())

    def url(self, path: str) -> str:
        return self.location.replace("{}", path) if "{}" in self.location else f"{self.location.rstrip('/')}/{path}"

    def verify(self, track: Callable[[Sequence[Any]], Iterable[Any]] = iter) -> None:
        """Read every shard again; raises ShardError that names those whose bytes are not what the index says."""
        shards = [shard for split in SPLITS for of_class in self.shards[split] for shard in of_class]
        problems = [problem for _, problem in (read_shard(self, shard) for shard in track(shards)) if problem]
        if problems:
            raise ShardError(f"{len(problems)} of {len(shards)} shards are damaged:\n" + "\n".join(problems))

    def _text(self) -> str:
        content = {"format": FORMAT, **asdict(self)}
        del content["location"], content["allow_pipe"], content["timeout_s"]
        return json.dumps(content, indent=1, sort_keys=True)

    def save(self, folder: Path) -> None:
        (folder / "index.json").write_text(self._text() + "\n", encoding="utf-8")

    @classmethod
    def load(cls, location: str, allow_pipe: bool = False, timeout_s: float = 120) -> "Index":
        """Read index.json below a folder or address; raises OSError, or ValueError if it is not an index of this format."""
        empty = cls("", "", (), (), {}, location, allow_pipe, timeout_s)
        url = empty.url("index.json")
        try:
            text = read_bytes(url, allow_pipe, INDEX_BYTES, timeout_s)
        except OSError as error:
            raise OSError(masked(f"{url}: cannot be read: {error}")) from error
        try:
            content = json.loads(text)
            version = content["format"]
            fields = _fields(content) if version == FORMAT else {}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(masked(f"{url}: damaged ({type(error).__name__}: {error}); copy it, or build the shards, again")) from error
        if version != FORMAT:
            raise ValueError(masked(f"{url}: format {version}, this version reads {FORMAT}; build the shards again"))
        return replace(empty, **fields)


def _fields(content: dict[str, Any]) -> dict[str, Any]:
    """Return the Index's fields of a json index; raises ValueError, KeyError, TypeError or AttributeError for a damaged one."""
    names = tuple(content["class_names"])
    shards = {split: tuple(tuple(_shard(entry) for entry in of_class) for of_class in content["shards"][split]) for split in SPLITS}
    if wrong := [split for split in SPLITS if len(shards[split]) != len(names)]:
        raise ValueError(f"{len(names)} classes, {len(shards[wrong[0]])} of them in {wrong[0]}")
    encodings = tuple(content["encodings"])
    return {"name": content["name"], "reader": content["reader"], "class_names": names, "encodings": encodings, "shards": shards}


def _shard(entry: dict[str, Any]) -> Shard:
    shard = Shard(**entry)
    # an index from elsewhere must not lead out of its folder, nor into the shell of a `pipe:`
    if not SHARD_PATH.fullmatch(shard.path):
        raise ShardError(f"index.json names {shard.path!r}: a shard is called train/0003-000.tar")
    if not type(shard.count) is type(shard.bytes) is int:
        raise TypeError(f"{shard.path}: samples and bytes are whole numbers")
    return shard


# writing


def write_shards(
    raw: RawSet,
    folder: Path,
    *,
    name: str,
    reader: str,
    samples_per_shard: int = 64,
    pixels: bool = False,
    track: Callable[[Sequence[Any]], Iterable[Any]] = iter,
) -> Index:
    """Write a raw set's shards and index into `folder`, which appears complete or not at all.

    Equal images give equal bytes. `pixels` stores them decoded. `track` wraps the list of pieces of work, for a progress bar. If another
    process finishes first, its folder stays.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        index = _write(_as_pixels(raw) if pixels else raw, aside, name, reader, samples_per_shard, track)
        aside.chmod(0o755)  # mkdtemp's folders are for their owner alone
        _move_into_place(aside, folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return replace(index, location=str(folder))


def _as_pixels(raw: RawSet) -> RawSet:
    def pixels_of(sample: RawSample) -> bytes:
        return ppm(decode(sample.read(), sample.key))

    return raw._replace(samples=[sample._replace(suffix=PIXELS, read=partial(pixels_of, sample)) for sample in raw.samples])


def _write(raw: RawSet, folder: Path, name: str, reader: str, samples_per_shard: int, track: Callable[..., Iterable[Any]]) -> Index:
    groups: dict[tuple[str, int], list[RawSample]] = {(split, c): [] for split in SPLITS for c in range(len(raw.class_names))}
    for sample in raw.samples:
        groups[sample.split, sample.class_id].append(sample)
    for split in SPLITS:
        (folder / split).mkdir()
    written = {}
    for (split, class_id), samples in track(list(groups.items())):
        # shards of equal size, so that the windows of train_order mix the classes in equal parts
        num_shards = -(-len(samples) // samples_per_shard)
        chunks = [[samples[place] for place in rank_slice(len(samples), number, num_shards)] for number in range(num_shards)]
        keys = unique_keys(samples)
        written[split, class_id] = tuple(
            _write_shard(folder, f"{split}/{class_id:04d}-{number:03d}.tar", chunk, keys) for number, chunk in enumerate(chunks)
        )
    shards = {split: tuple(written[split, class_id] for class_id in range(len(raw.class_names))) for split in SPLITS}
    encodings = tuple(sorted({sample.suffix for sample in raw.samples}))
    index = Index(name, reader, tuple(raw.class_names), encodings, shards, str(folder))
    index.save(folder)
    return index


def _write_shard(folder: Path, path: str, samples: Sequence[RawSample], keys: Iterator[str]) -> Shard:
    with (
        (folder / path).open("wb") as stream,
        webdataset.TarWriter(stream, encoder=False, user="", group="", mtime=0) as tar,
    ):
        for sample in samples:
            tar.write({"__key__": next(keys), "cls": str(sample.class_id).encode(), sample.suffix: sample.read()})
    content = (folder / path).read_bytes()
    return Shard(path, len(samples), len(content), hashlib.sha256(content).hexdigest())


def unique_keys(samples: Sequence[RawSample]) -> Iterator[str]:
    """Each sample's key without what tar or webdataset would trip over: dots, odd characters, length, repetition."""
    seen: dict[str, int] = {}
    for sample in samples:
        key = re.sub(r"[^A-Za-z0-9_/-]+", "_", sample.key)[-80:].strip("_/") or "sample"
        seen[key] = seen.get(key, 0) + 1
        yield key if seen[key] == 1 else f"{key}--{seen[key]}"


def _move_into_place(aside: Path, folder: Path) -> None:
    try:
        aside.rename(folder)
    except OSError:
        if not (folder / "index.json").exists():
            raise FileExistsError(f"{folder} exists and holds no index.json: remove it, or choose another data.root") from None


# reading


def read_shard(index: Index, shard: Shard) -> tuple[list[StoredSample], str]:
    """The shard's samples, as many as can be read, and in words what is wrong with it ("" for a sound one; Unread where a try may help).

    Raises ShardError for members that a shard of ours never has: nothing but text labels and images is ever opened.
    """
    try:
        content = read_bytes(index.url(shard.path), index.allow_pipe, shard.bytes + 1, index.timeout_s)
    except OSError as error:
        return [], Unread(masked(f"{index.url(shard.path)}: cannot be read: {error}"))
    samples, error_text = _parse(content, shard)
    sound = hashlib.sha256(content).hexdigest() == shard.sha256 and len(samples) == shard.count
    if sound:
        return samples, ""
    problem = (
        f"{masked(index.url(shard.path))}: the index says {shard.count} samples in {shard.bytes} bytes, "
        f"found {len(samples)} in {len(content)}, {'the bytes differ' if len(content) == shard.bytes else 'another length'}{error_text}"
    )
    return samples, problem


def _parse(content: bytes, shard: Shard) -> tuple[list[StoredSample], str]:
    for magic, name in COMPRESSED.items():
        if content.startswith(magic):
            raise ShardError(f"{shard.path}: refused, it is compressed ({name}); a shard is a plain tar")
    samples: list[StoredSample] = []
    try:
        for sample in group_by_keys(_members(content, shard)):
            if stored := _stored(sample, shard):
                samples.append(stored)
    except ShardError:
        raise
    except Exception as error:  # tarfile raises what it likes on damaged bytes
        return samples, f" ({type(error).__name__}: {error.args[0] if error.args else ''})"  # webdataset adds arguments
    return samples, ""


def _members(content: bytes, shard: Shard) -> Iterator[dict[str, Any]]:
    """What webdataset's tar_file_expander gives for an uncompressed tar, in half the time: no pipe, no guess at compression.

    Raises ShardError for a member that would be larger in memory than the shard's bytes.
    """
    for member in tarfile.open(fileobj=io.BytesIO(content), mode="r:"):  # noqa: SIM115 - a buffer
        if member.size > max(len(content), shard.bytes) or member.sparse is not None:
            raise ShardError(f"{shard.path}: refused, the member {member.name!r} claims {member.size:,} bytes")
        if member.isreg():
            end = member.offset_data + member.size
            if end > len(content):
                raise tarfile.ReadError("unexpected end of data")
            yield {"fname": member.name, "data": content[member.offset_data : end], "__url__": ""}


def _stored(sample: dict[str, Any], shard: Shard) -> StoredSample | None:
    key = sample["__key__"]
    if key.startswith("/") or ".." in key.split("/"):
        raise ShardError(f"{shard.path}: refused, the name {key!r} leads out of the shard")
    suffixes = [suffix for suffix in sample if not suffix.startswith("__")]
    if foreign := [suffix for suffix in suffixes if suffix not in ("cls", PIXELS, *IMAGE_SUFFIXES)]:
        allowed = ", ".join((PIXELS, *IMAGE_SUFFIXES))
        raise ShardError(f"{shard.path}: refused, the member {key}.{foreign[0]} is neither a label (.cls) nor an image ({allowed})")
    images = [sample[suffix] for suffix in suffixes if suffix != "cls"]
    if len(images) != 1 or "cls" not in suffixes:
        return None  # cut in two by damage: the count tells
    if sample["cls"].strip() != str(shard.class_id).encode():
        raise ShardError(f"{shard.path}: refused, {key} is labelled {sample['cls'][:20]!r}")
    return StoredSample(key, images[0])


def read_bytes(url: str, allow_pipe: bool = False, limit: int | None = None, timeout_s: float = 120) -> bytes:
    """The whole of a local file, an http(s) address, or, if allowed, the output of a command or a tool (pipe:, gs:, ...).

    Never more than `limit` bytes. From an http(s) address or a `pipe:` within `timeout_s`, or OSError.
    """
    parts = urlparse(url)
    if parts.scheme in ("http", "https"):
        return _patiently(lambda patience_s: _download(url, limit, patience_s), url, timeout_s)
    if parts.scheme in ("", "file"):
        with open(url2pathname(parts.path) if parts.scheme else url, "rb") as file:
            return file.read(-1 if limit is None else limit)
    if not allow_pipe:
        raise ValueError(f"data.url={masked(url)!r}: reading this runs a command; allow it with data.allow_pipe=true")
    if parts.scheme == "pipe":
        return _patiently(lambda patience_s: _output(url.removeprefix("pipe:"), limit, patience_s), url, timeout_s, refusals=ATTEMPTS)
    with webdataset.gopen(url) as stream:
        return stream.read(-1 if limit is None else limit)


def _patiently(read: Callable[[float], bytes], url: str, timeout_s: float, refusals: float = math.inf) -> bytes:
    """Return what `read(seconds that this attempt may take)` returns, trying again with pauses until the time is over; or OSError."""
    deadline, attempt, pause_s = time.monotonic() + timeout_s, 0, 0.25
    while True:
        attempt += 1
        try:
            return read(max(0.1, min(timeout_s / ATTEMPTS, deadline - time.monotonic())))
        except (OSError, HTTPException) as error:
            left_s = deadline - time.monotonic()
            is_final = isinstance(error, InvalidURL)
            is_final |= isinstance(error, urllib.error.HTTPError) and error.code < 500 and error.code not in ASK_LATER
            is_final |= isinstance(getattr(error, "reason", None), ssl.SSLCertVerificationError)  # which no waiting mends
            if is_final or attempt >= refusals or left_s <= 0:
                if isinstance(error, OSError):
                    raise
                raise OSError(str(error)) from error
            log.warning("%s: attempt %d failed: %s", masked(url), attempt, error)
        pause_s = min(2 * pause_s, LONGEST_PAUSE_S)
        time.sleep(min(pause_s, left_s))


def _download(url: str, limit: int | None, patience_s: float) -> bytes:
    """urllib rather than webdataset's `curl --retry 30`: a cut transfer is an error here, and one that trickles has a time limit."""
    deadline, pieces, size = time.monotonic() + patience_s, [], 0
    with urllib.request.urlopen(url, timeout=patience_s) as response, contextlib.suppress(TimeoutError):
        socket = response.fp.raw._sock  # urllib has no other way to it, whose time-out starts anew with every read
        while (left_s := deadline - time.monotonic()) > 0:
            socket.settimeout(left_s)
            piece = response.read1(1 << 16)
            pieces.append(piece)
            size += len(piece)
            if limit is not None and size >= limit:
                return b"".join(pieces)[:limit]
            if not piece and response.length:
                raise IncompleteRead(b"", response.length)
            if not piece:
                return b"".join(pieces)
    raise TimeoutError(f"only {size:,} bytes in {patience_s:.0f} s")


def _output(command: str, limit: int | None, patience_s: float) -> bytes:
    """The output of a shell command, which data.allow_pipe=true has allowed; OSError if it fails or takes longer."""
    process = subprocess.Popen(command, shell=True, stdout=subprocess.PIPE, start_new_session=True)
    try:
        output, _ = process.communicate(timeout=patience_s)
    except subprocess.TimeoutExpired:
        raise TimeoutError(f"the command took longer than {patience_s:.0f} s") from None
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)  # with what it has started, which holds the pipe open
            process.wait()
    if process.returncode:
        raise OSError(f"the command ended with status {process.returncode}")
    return output[:limit]
