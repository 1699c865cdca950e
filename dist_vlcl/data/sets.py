"""Raw data sets: each reader lists the images of a data set with split, class id and key. Sources are folders, .tar or .zip files."""

import hashlib
import pickle
import tarfile
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from functools import partial
from itertools import groupby, product
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple, cast
from urllib.error import URLError

from filelock import FileLock
from PIL import Image

from dist_vlcl.data.files import SPLIT_FOLDERS, Found, ReadFile, check_test_folders, open_source, suffix_of
from dist_vlcl.data.images import IMAGE_SUFFIXES, encoded
from dist_vlcl.data.labelled import hf, torchvision, webdataset
from dist_vlcl.data.names import known_classes
from dist_vlcl.data.settings import DataConfig
from dist_vlcl.data.tasks import generator
from dist_vlcl.masking import explained
from dist_vlcl.reading import parse_json, warn

CIFAR_FOLDER = "cifar-100-python"
CIFAR_FILES = {"train": "16019d7e3df5f24257cddd939b257f8d", "test": "f0ef6b0ae62326f3e7ffdfab6717acfc"}  # MD5
MAX_CIFAR_BYTES = 1 << 28
ARCHIVES = {  # address and MD5
    "cifar100": ("https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz", "eb9058c3a382ffc7106e4002c42a8d85"),
    "tiny_imagenet": ("http://cs231n.stanford.edu/tiny-imagenet-200.zip", "90528d7ca1a48142e341f4ef8d21d0de"),
    "imagenet_r": ("https://people.eecs.berkeley.edu/~hendrycks/imagenet-r.tar", "a61312130a589d0ca1a8fca1f2bd3337"),
}
OTHER_IMAGES = ("gif", "bmp", "tif", "tiff", "jfif", "jpe", "jp2", "heic", "heif", "avif", "ppm", "pgm")
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


class RawSet(NamedTuple):
    class_names: list[str]
    samples: list[Found]


def read_raw(data: DataConfig) -> RawSet:
    """List the raw data set that the options name. The samples are sorted, so that the kind of source does not matter.

    Raises FileNotFoundError or ValueError, naming the option, if the source does not hold what the reader expects. Every class needs
    training and test images.
    """
    found, classes = _READERS[data.reader_name](data)
    folders = {image.folder for image in found}
    options = ("source", "class_names", "split_file")
    given = ", ".join(f"data.{name}={getattr(data, name)!r}" for name in options if getattr(data, name) or name == "source")
    missing, unknown = [name for name in classes if name not in folders], sorted(folders - set(classes))
    if missing or unknown:
        problem = f"{len(missing)} of {len(classes)} classes have no images {missing[:5]}"
        raise ValueError(f"{given}: {problem}; {len(unknown)} folders are not classes {unknown[:5]}")
    class_ids = {name: class_id for class_id, name in enumerate(classes)}
    split_of = _splits(found, data)
    used = sorted((image for image in found if image.path in split_of), key=lambda image: (image.short, image.path))
    samples = [image._replace(split=split_of[image.path], class_id=class_ids[image.folder]) for image in used]
    for split in ("train", "test"):
        present = {sample.class_id for sample in samples if sample.split == split}
        if empty := [name for class_id, name in enumerate(classes.values()) if class_id not in present]:
            raise ValueError(f"{given}: {len(empty)} classes have no {split} images, such as {empty[0]!r}")
    return RawSet(list(classes.values()), samples)


# Readers


def digits(data: DataConfig) -> tuple[list[Found], dict[str, str]]:
    """scikit-learn's 1797 handwritten digits: 8x8 pixels, white on black, enlarged to 32x32."""
    if data.source or data.class_names:
        raise ValueError("data=digits has its own images and names: leave out data.source and data.class_names, or use data=folder")
    with explained("data=digits: scikit-learn is not installed", "pip install 'dist-vlcl[digits]'", ModuleNotFoundError):
        from sklearn.datasets import load_digits
    loaded = load_digits()
    named = enumerate(zip(loaded.images, (DIGITS[label] for label in loaded.target), strict=True))
    found = [Found(None, name, f"{name}/{number:04d}.png", partial(_digit_png, image)) for number, (image, name) in named]
    return found, {name: f"handwritten digit {name}" for name in DIGITS}


def cifar100(data: DataConfig) -> tuple[list[Found], dict[str, str]]:
    """The official archive, downloaded or given, the folder that it unpacks to, or images below `<class>/`."""
    downloads, classes = Path(data.root) / "downloads", _known_classes(data)
    source = Path(data.source) if data.source else downloads if (downloads / CIFAR_FOLDER).is_dir() else _download(data)
    unpacked = source if source.name == CIFAR_FOLDER else source / CIFAR_FOLDER
    if (unpacked / "train").is_file():
        source = unpacked
    elif source.name != f"{CIFAR_FOLDER}.tar.gz" or not source.exists():
        return known_images(data, source)
    return list(_official_cifar(source, list(classes))), classes


def known_images(data: DataConfig, source: Path | None = None) -> tuple[list[Found], dict[str, str]]:
    """Images of a data set with a list of class names, which `class_names` can change: the official archive, or images below `<wnid>/`.

    Tiny-ImageNet's labelled val split is the test split. ImageNet-R has no split: `split_file` gives it, or `test_fraction` of each class
    is drawn. ImageNet-R's class names and their order are RAPF's, an open choice: the paper does not state its own.
    """
    classes = _known_classes(data)
    return _find_images(data, source or (Path(data.source) if data.source else _download(data)), classes), classes


def folder(data: DataConfig) -> tuple[list[Found], dict[str, str]]:
    """Any images below `<class>/`. Names come from `class_names` or classnames.json, otherwise from the folders."""
    if data.source is None:
        raise ValueError("data.source=None: reader=folder needs the folder, .tar or .zip of the images")
    found, beside = _find_images(data, Path(data.source)), Path(data.source) / "classnames.json"
    if data.class_names or beside.is_file():
        return found, _read_class_names(data.class_names or str(beside))
    return found, {name: name for name in sorted({image.folder for image in found})}


_READERS = {reader.__name__: reader for reader in (digits, cifar100, folder, webdataset, hf, torchvision)}
_READERS |= {"tiny_imagenet": known_images, "imagenet_r": known_images}


# Splits and names


def _splits(found: list[Found], data: DataConfig) -> dict[str, str]:
    """Return path -> split: from `split_file`, otherwise from the source's folders, otherwise a random part of every class."""
    if data.split_file:
        return _listed_splits(found, data.split_file)
    own = {image.path: image.split for image in found if image.split is not None}
    if own and len(own) < len(found):
        stray = next(image.path for image in found if image.split is None)
        raise ValueError(f"data.source={data.source!r}: some images are below train/, test/ or val/ and some are not, such as {stray}")
    return own or _drawn_splits(found, data)


def _drawn_splits(found: list[Found], data: DataConfig) -> dict[str, str]:
    splits: dict[str, str] = {}
    for name, of_class in groupby(sorted(found, key=lambda image: image.short), key=lambda image: image.folder):
        images = list(of_class)
        generator(data.split_seed, "split", name).shuffle(images)
        num_test = max(1, round(len(images) * data.test_fraction))
        splits |= {image.path: "test" if place < num_test else "train" for place, image in enumerate(images)}
    return splits


def _listed_splits(found: list[Found], split_file: str) -> dict[str, str]:
    """Read a list like RAPF's: a line `train`, lines `<class>/<image>`, a line `test`, more lines. Other images are not used."""
    listed: dict[str, str] = {}
    split = None
    with explained(f"data.split_file={split_file!r}", kinds=(OSError, ValueError)):
        text = Path(split_file).read_text(encoding="utf-8-sig")
    for line in filter(None, map(str.strip, text.splitlines())):
        if line in ("train", "test"):
            split = line
        elif split is None:
            raise ValueError(f"data.split_file={split_file!r}: the first line must be `train` or `test`, not {line!r}")
        elif listed.setdefault(line, split) != split:
            raise ValueError(f"data.split_file={split_file!r}: lists {line!r} for training and for testing")
    counts, paths = Counter(image.short for image in found), {image.short: image.path for image in found}
    if many := [name for name in listed if counts[name] > 1]:
        raise ValueError(f"data.split_file={split_file!r}: {many[0]!r} stands for {counts[many[0]]} images; give each another name")
    if missing := [name for name in listed if name not in paths]:
        raise ValueError(f"data.split_file={split_file!r}: {len(missing)} of its images are not in the source, such as {missing[0]}")
    return {paths[name]: split for name, split in listed.items()}


def _known_classes(data: DataConfig) -> dict[str, str]:
    """Return raw folder -> class name, of a data set that has a list; `class_names` can change some of the names."""
    classes, own_names = known_classes(data.reader_name), _read_class_names(data.class_names) if data.class_names else {}
    if unknown := [name for name in own_names if name not in classes]:
        raise ValueError(f"data.class_names={data.class_names!r}: {data.reader_name} has no folder {unknown[0]!r}; one is {min(classes)!r}")
    return classes | own_names


def _read_class_names(path: str) -> dict[str, str]:
    advice = f'data.class_names={path!r}: give a JSON list of {{"folder": ..., "name": ...}}, each folder once'
    with explained(advice, kinds=(OSError, ValueError)):
        entries = parse_json(Path(path).read_bytes(), [{"folder": str, "name": str}])
        if repeated := [folder for folder, count in Counter(entry["folder"] for entry in entries).items() if count > 1]:
            raise ValueError(f"{repeated[0]!r} comes more than once")
    return {entry["folder"]: entry["name"] for entry in entries}


# Find images in sources


def _find_images(data: DataConfig, source: Path, known: Mapping[str, str] | None = None) -> list[Found]:
    found = [image for split, path in _parts(source) for image in _images_of(data, split, open_source(path), known)]
    if not found:
        raise ValueError(f"data.source={str(source)!r}: no images below <class>/<image> ({', '.join(IMAGE_SUFFIXES)})")
    return found


def _parts(source: Path) -> list[tuple[str | None, Path]]:
    """Return sources and their splits: train.tar beside test.tar, or one source that may hold both."""
    for test, suffix in product(("test", "val"), (".tar", ".zip")):
        train_file, test_file = source / f"train{suffix}", source / f"{test}{suffix}"
        if train_file.is_file() and test_file.is_file():
            return [("train", train_file), ("test", test_file)]
    return [(None, source)]


def _images_of(data: DataConfig, split: str | None, files: Mapping[str, ReadFile], known: Mapping[str, str] | None) -> Iterator[Found]:
    annotated, splits, left_out = _annotations(files), set(), []
    homes: dict[str, set[str]] = defaultdict(set)  # class folder -> where it lies
    for name in sorted(files):
        *parents, file = PurePosixPath(name).parts
        if any(part.startswith(".") or part == "__MACOSX" for part in (*parents, file)):
            continue
        if known is None and file == "classnames.json" and not data.class_names and not Path(data.source or "", file).is_file():
            raise ValueError(f"{name!r} is not read from there: give it as data.class_names=FILE, or put it into the folder data.source")
        if suffix_of(file) in OTHER_IMAGES and data.on_error == "stop":
            raise ValueError(f"{name!r} is not PNG, JPEG or WebP: convert it, or set data.on_error=skip to leave out files like this")
        if suffix_of(file) not in IMAGE_SUFFIXES:
            left_out += [name] * (suffix_of(file) in OTHER_IMAGES)
            continue
        # the class is the innermost folder, or the innermost one with a known name
        places = [place for place, part in enumerate(parents) if known is None or part in known]
        if not places and name not in annotated:
            continue
        above = parents if name in annotated else parents[: places[-1]]  # not the class folder: CIFAR-100 has a class called train
        own = next((part for part in above if part.lower() in SPLIT_FOLDERS), "")
        splits.add(own)
        if known is None:
            homes[parents[places[-1]]].add("/".join(part for part in above if part.lower() not in SPLIT_FOLDERS))
        path = f"{split}:{name}" if split else name
        yield Found(split or SPLIT_FOLDERS.get(own.lower()), annotated.get(name) or parents[places[-1]], path, files[name])
    check_test_folders(data.split_file, () if split else splits)
    if left_out:
        warn(f"{len(left_out)} files were left out, such as {left_out[0]!r}: they are not PNG, JPEG or WebP")
    if several := [folder for folder, above in homes.items() if len(above) > 1]:
        shown = ", ".join(f"{above}/{several[0]}".strip("/") for above in sorted(homes[several[0]])[:3])
        warn(f"{len(several)} class names come from several folders, whose images become one class, such as {shown}")


def _annotations(files: Mapping[str, ReadFile]) -> dict[str, str]:
    """Return image -> class folder from Tiny-ImageNet's val_annotations.txt; empty without that file."""
    annotated = {}
    for name in files:
        path = PurePosixPath(name)
        for line in files[name]().decode(errors="replace").splitlines() if path.name == "val_annotations.txt" else ():
            image, tab, rest = line.partition("\t")
            if not tab:
                raise ValueError(f"{name}: {line!r} is not an image, a tab and a class; get the data set again")
            annotated[(path.parent / "images" / image).as_posix()] = rest.partition("\t")[0]
    return annotated


# Downloads and special formats


def _download(data: DataConfig) -> Path:
    """Return the official archive. torchvision downloads it again if it is incomplete."""
    from torchvision.datasets.utils import download_url

    (url, md5), downloads = ARCHIVES[data.reader_name], Path(data.root) / "downloads"
    advice = "get the official archive, perhaps on another machine, and add data.source=PATH"
    with FileLock(downloads / ".lock"), explained(f"{url}: could not download it", advice, (RuntimeError, URLError)):
        download_url(url, downloads, md5=md5)
    return downloads / PurePosixPath(url).name


def _official_cifar(source: Path, class_names: list[str]) -> Iterator[Found]:
    """Yield the images of the official archive, or of the folder that it unpacks to."""
    for split, md5 in CIFAR_FILES.items():
        # tarfile raises many types of errors for damaged bytes
        with explained(f"data.source={str(source)!r}: damaged, or not the official files", "get them again", Exception):
            if source.is_dir():
                content = (source / split).read_bytes()
            else:
                with tarfile.open(source) as tar, cast(Any, tar.extractfile(f"{CIFAR_FOLDER}/{split}")) as file:
                    content = file.read(MAX_CIFAR_BYTES)
            if (found := hashlib.md5(content).hexdigest()) != md5:  # opening another pickle could run code
                raise ValueError(f"the MD5 of {split} is {found}, not {md5}")
        batch = pickle.loads(content, encoding="latin1")
        images = batch["data"].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
        for number, (pixels, label) in enumerate(zip(images, batch["fine_labels"], strict=True)):
            yield Found(split, class_names[label], f"{split}/{class_names[label]}/{number:05d}.png", partial(encoded, pixels))


def _digit_png(values: Any) -> bytes:
    """Values 0..16 [8, 8] -> RGB PNG 32x32."""
    grey = Image.fromarray((values * (255 / 16)).round().astype("uint8")).resize((32, 32), Image.Resampling.BICUBIC)
    return encoded(grey.convert("RGB"))
