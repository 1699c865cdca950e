"""Raw data sets in the formats of other libraries: WebDataset tars, `datasets` of Hugging Face, torchvision.

They give each image the number of its class. A reader returns the images with that number as the name of their folder, and number -> name.
"""

import inspect
import math
import os
import re
import resource
from collections import defaultdict
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from typing import Any
from urllib.parse import urlparse

from braceexpand import braceexpand
from rich.progress import track

from dist_vlcl.data.download import read_bytes
from dist_vlcl.data.files import MEMBER, SPLIT_FOLDERS, Found, ReadFile, check_test_folders, open_source
from dist_vlcl.data.images import IMAGE_SUFFIXES, encoded, upright
from dist_vlcl.data.settings import DataConfig
from dist_vlcl.masking import explained, masked

MAX_TAR_BYTES = 1 << 32
MAX_NAMES_BYTES = 1 << 22


def webdataset(data: DataConfig) -> tuple[list[Found], dict[str, str]]:
    """WebDataset tars in a folder or on a web server: `KEY.cls` is the number of a class; `KEY.png`, .jpg or .webp is the image.

    clip_benchmark publishes sets like this: classnames.txt, train/0.tar, train/1.tar, ..., test/0.tar, ...; train-0.tar is known, too.
    """
    source = data.source or ""
    is_folder = bool(source) and Path(source).is_dir()
    tars = [str(path) for path in sorted(Path(source).glob("**/*.tar"))] if is_folder else list(filter(None, braceexpand(source)))
    if not tars or urlparse(source).scheme not in ("", "http", "https"):
        advice = "give a folder with .tar files, or their paths or http(s) addresses, such as 'https://host/{train/{0..9},test/{0..1}}.tar'"
        raise ValueError(f"data.source={masked(source)!r}: reader=webdataset found no tars there; {advice}")
    folder = PurePosixPath(os.path.commonpath([str(PurePosixPath(tar).parent) for tar in tars]))
    below = {tar: PurePosixPath(tar).parent.relative_to(folder).parts for tar in tars}
    splits = {tar: next(filter(None, (SPLIT_FOLDERS.get(part.lower()) for part in parts)), None) for tar, parts in below.items()}
    is_split = folder.name.lower() in SPLIT_FOLDERS and not any(splits.values())  # the tars of train/ alone, and not of a set called test
    words = {tar: tuple(w for w in re.split("[-_.]", PurePosixPath(tar).stem) if w.lower() in SPLIT_FOLDERS) for tar in tars}
    if not any(splits.values()) and all(words.values()) and len({SPLIT_FOLDERS[word[0].lower()] for word in words.values()}) > 1:
        # train-000.tar and test-000.tar in one folder
        below, splits = words, {tar: SPLIT_FOLDERS[word[0].lower()] for tar, word in words.items()}
    names = _names(data, data.class_names or f"{folder.parent if is_split else folder}/classnames.txt".replace(":/", "://"))
    check_test_folders(data.split_file, (part for parts in below.values() for part in parts))
    resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)  # every tar stays open
    has_split = len(set(splits.values())) > 1  # a set of test images only is divided by test_fraction
    return _labelled([image for tar in track(tars, "tars") for image in _samples(data, tar, splits[tar] if has_split else None)], names)


def _samples(data: DataConfig, tar: str, split: str | None) -> Iterator[Found]:
    files = _downloaded(data, tar) if urlparse(tar).scheme else open_source(Path(tar))
    samples: dict[str, dict[str, str]] = defaultdict(dict)  # key -> suffix -> name in the tar
    for match in filter(None, map(MEMBER.fullmatch, files)):
        samples[match[1]][match[2]] = match[0]
    for key, names in samples.items():
        images = [name for suffix, name in names.items() if suffix.lower() in IMAGE_SUFFIXES]
        if "cls" not in names or len(images) != 1:
            needed = f".cls and one of {', '.join(IMAGE_SUFFIXES)}"
            raise ValueError(f"{masked(tar)}: the sample {key!r} has {', '.join(names.values())}; it needs {needed}")
        yield Found(split, files[names["cls"]]().decode(errors="replace").strip(), f"{tar}/{images[0]}", files[images[0]])


def _downloaded(data: DataConfig, tar: str) -> dict[str, ReadFile]:
    """Return the files of a tar of a web server. The copy on disk goes when this process ends."""
    Path(data.root).mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=data.root) as folder:
        path = Path(folder, PurePosixPath(urlparse(tar).path).name)
        path.write_bytes(read_bytes(tar, limit=MAX_TAR_BYTES, timeout_s=data.timeout_s))
        return open_source(path)  # it stays open after the folder is removed


def hf(data: DataConfig) -> tuple[list[Found], dict[str, str]]:
    """A data set of Hugging Face's `datasets`: from the Hub, from the cache, or from a folder of Parquet files."""
    source = data.source or data.name
    advice = "data=hf needs the extra dist-vlcl[hf] and, without a network, the cache of datasets or data.source=FOLDER of Parquet files"
    with explained(f"{source}: could not load it", advice, Exception):  # it raises errors of many types
        import datasets

        try:
            loaded = datasets.load_dataset(str(Path(source).resolve(strict=True)) if data.source else source, data.subset)
        except Exception as error:  # the library's own text only says that something failed
            raise error.__cause__ or error from None
    test = data.test_split or next((name for name in ("test", "valid", "validation") if name in loaded and name != data.train_split), None)
    splits = {data.train_split: "train", test: "test"} if test else {data.train_split: None}
    rows = ", ".join(f"{name} ({len(part)} rows)" for name, part in loaded.items())
    if absent := [name for name in splits if name not in loaded or not len(loaded[name])]:
        raise ValueError(f"data=hf: no images in split {absent[0]!r}; choose data.train_split and data.test_split from {rows}")
    features, found = loaded[data.train_split].features, []
    image_column = _column("image_column", data.image_column, features, datasets.Image)
    label_column = _column("label_column", data.label_column, features, datasets.ClassLabel)
    for name, split in splits.items():
        part = loaded[name].cast_column(image_column, datasets.Image(decode=False))
        suffix = {b"\xff\xd8": "jpg", b"RI": "webp"}.get(_bytes_of(part, 0, image_column)[:2], "png")  # by the first bytes of a file
        for row, label in enumerate(part[label_column]):
            if label is None:
                raise ValueError(f"data=hf: row {row} of split {name!r} has no {label_column}")
            found.append(Found(split, str(label), f"{name}/{row:07d}.{suffix}", partial(_bytes_of, part, row, image_column)))
    names = _names(data, data.class_names) or getattr(features[label_column], "names", None)
    labels = sorted({image.folder for image in found}, key=lambda text: (int(text) if text.isdecimal() else math.inf, text))
    return _labelled(found, names) if names else (found, {label: label for label in labels})


def _column(option: str, given: str | None, features: Any, kind: type) -> str:
    names = [given] if given else [name for name, feature in features.items() if isinstance(feature, kind)]
    if len(names) != 1 or names[0] not in features:
        raise ValueError(f"data.{option}={given!r}: {len(names)} columns have the type {kind.__name__}; choose from {', '.join(features)}")
    return names[0]


def _bytes_of(part: Any, row: int, column: str) -> bytes:
    return (part[row][column] or {}).get("bytes") or b""  # the path beside it is not followed: it could name any file of this machine


def torchvision(data: DataConfig) -> tuple[list[Found], dict[str, str]]:
    """A classification data set of torchvision, which downloads it unless its root folder `data.source` has it. Stored as PNG."""
    root, found = data.source or str(Path(data.root, "downloads", data.name)), []
    advice = "data.source=FOLDER is its root folder; data.train_split and data.test_split are its names of the splits"
    # it raises errors of many types
    with explained(f"data.name={data.name!r}: torchvision cannot open it in {root!r}", advice, Exception):
        import torchvision.datasets

        kind = getattr(torchvision.datasets, data.name)
        known = inspect.signature(kind).parameters
        options: dict[str | None, dict[str, Any]] = {None: {}}
        if "train" in known:
            options = {"train": {"train": True}, "test": {"train": False}}
        elif "split" in known:
            options = {"train": {"split": data.train_split}, "test": {"split": data.test_split or "test"}}
        for split, selection in options.items():
            images = kind(root, **selection, **({"download": True} if "download" in known else {}))
            for number in track(range(len(images)), f"{split or 'all'} labels"):
                path = f"{split or 'all'}/{number:07d}.png"
                found.append(Found(split, str(images[number][1]), path, partial(_png_of, images, number)))
    return _labelled(found, _names(data, data.class_names) or getattr(images, "classes", getattr(images, "categories", ())))


def _png_of(images: Any, number: int) -> bytes:
    return encoded(upright(images[number][0]))


def _names(data: DataConfig, address: str | None) -> list[str]:
    """Return the class names of a text file, one a line; [] if no file is given."""
    with explained(address, "data.class_names=FILE has one name a line, in the order of the numbers", (OSError, ValueError)):
        text = read_bytes(address, limit=MAX_NAMES_BYTES, timeout_s=data.timeout_s).decode("utf-8-sig") if address else ""
        names = [line.strip() for line in text.strip().splitlines()]
        if "" in names:
            raise ValueError(f"line {names.index('') + 1} is empty")
    return names


def _labelled(found: list[Found], names: Sequence[str]) -> tuple[list[Found], dict[str, str]]:
    """Return the images, and class number -> name. Raises ValueError that names an image whose class has no name."""
    classes = {str(number): name for number, name in enumerate(names)}
    if wrong := next((image for image in found if image.folder not in classes), None):
        known = f"there are {len(names)} class names, so give a number from 0 to {len(names) - 1}, or data.class_names=FILE"
        raise ValueError(f"{wrong.path}: its class is {wrong.folder[:20]!r}; {known}")
    return found, classes
