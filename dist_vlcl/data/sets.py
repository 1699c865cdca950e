"""The raw sets: each reader lists the images of a data set with split, class id and key."""

import io
import json
import re
import shutil
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from dist_vlcl.data.names import known_classes
from dist_vlcl.data.order import generator
from dist_vlcl.data.settings import DataConfig
from dist_vlcl.data.shards import IMAGE_SUFFIXES, RawSample, RawSet
from dist_vlcl.data.sources import Source, open_source

CIFAR_FOLDER = "cifar-100-python"
TINY_IMAGENET = ("http://cs231n.stanford.edu/tiny-imagenet-200.zip", "90528d7ca1a48142e341f4ef8d21d0de")
IMAGENET_R = ("https://people.eecs.berkeley.edu/~hendrycks/imagenet-r.tar", "a61312130a589d0ca1a8fca1f2bd3337")
SPLIT_FOLDERS = {"train": "train", "test": "test", "val": "test"}
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def read_raw(data: DataConfig) -> RawSet:
    """List the raw set that the options name; every class has training and test images.

    Raises FileNotFoundError or ValueError, naming the option, where the source does not hold what the reader expects.
    """
    raw = READERS[data.reader_name](data)
    _require_both_splits(raw, data)
    return raw


def digits(data: DataConfig) -> RawSet:
    """scikit-learn's 1797 handwritten digits, 8x8, white on black, shown at 32x32."""
    from sklearn.datasets import load_digits

    loaded = load_digits()
    found = [
        Found(None, DIGITS[label], f"{DIGITS[label]}/{number:04d}.png", partial(_digit_png, image))
        for number, (image, label) in enumerate(zip(loaded.images, loaded.target, strict=True))
    ]
    return _raw_set(found, {name: f"handwritten digit {name}" for name in DIGITS}, data)


def cifar100(data: DataConfig) -> RawSet:
    """The official archive, downloaded or given, else images below `<class>/`."""
    source = None if data.source is None else Path(data.source)
    if source is not None and source.name == CIFAR_FOLDER and (source / "train").is_file():
        source = source.parent  # the folder itself that the archive unpacks to
    if source is not None and not _is_official_cifar(source):
        return _known_set(data, source)
    folder = _official_cifar_folder(data, source)
    classes = known_classes("cifar100")
    assert classes is not None  # ships with the package
    found = [image for split in ("train", "test") for image in _official_cifar(folder, split, list(classes))]
    return _raw_set(found, classes, data)


def tiny_imagenet(data: DataConfig) -> RawSet:
    """The official zip (its labelled val split is the test split) or images below `<wnid>/`; class ids as in wnids.txt."""
    return _known_set(data, _source_or_download(data, *TINY_IMAGENET))


def imagenet_r(data: DataConfig) -> RawSet:
    """ImageNet-R has no split of its own: `split_file`, or per class sorted names, seeded, `test_fraction` of them for testing."""
    return _known_set(data, _source_or_download(data, *IMAGENET_R))


def folder(data: DataConfig) -> RawSet:
    """Any images below `<class>/`; names from classnames.json, else the folders' own."""
    if data.source is None:
        raise ValueError("data.source=None: reader=folder needs the folder, .tar or .zip of the images")
    source = Path(data.source)
    found = _find_images(data, source, known=None)
    beside = source / "classnames.json"
    listed = data.class_names or (str(beside) if beside.is_file() else None)
    classes = _class_names_file(listed) if listed else {name: name for name in sorted({image.folder for image in found})}
    return _raw_set(found, classes, data)


READERS: dict[str, Callable[[DataConfig], RawSet]] = {
    "digits": digits,
    "cifar100": cifar100,
    "tiny_imagenet": tiny_imagenet,
    "imagenet_r": imagenet_r,
    "folder": folder,
}


# from found images to a raw set


class Found(NamedTuple):
    """An image of a raw set, before names and splits are settled."""

    split: str | None
    folder: str  # of its class
    path: str
    read: Callable[[], bytes]

    @property
    def short(self) -> str:
        return f"{self.folder}/{PurePosixPath(self.path).name}"


def _known_set(data: DataConfig, source: Path) -> RawSet:
    classes = known_classes(data.reader_name)
    assert classes is not None  # ships with the package
    if data.class_names:
        classes |= {name: text for name, text in _class_names_file(data.class_names).items() if name in classes}
    return _raw_set(_find_images(data, source, known=classes), classes, data)


def _raw_set(found: list[Found], classes: Mapping[str, str], data: DataConfig) -> RawSet:
    """Settle class ids (the order of `classes`), splits and names; samples come out sorted, whatever the source."""
    folders = {image.folder for image in found}
    _require_same(folders, classes, data)
    class_ids = {name: class_id for class_id, name in enumerate(classes)}
    split_of = _splits(found, data)
    samples = [
        RawSample(split_of[image.path], class_ids[image.folder], _without_suffix(image.short), _suffix(image.path), image.read)
        for image in sorted(found, key=lambda image: (image.short, image.path))
        if image.path in split_of
    ]
    return RawSet(list(classes.values()), samples)


def _splits(found: list[Found], data: DataConfig) -> dict[str, str]:
    """Path -> split: from the list, else from the source's own folders, else a seeded part of every class."""
    if data.split_file:
        return _listed_splits(found, data.split_file)
    own = {image.path: image.split for image in found if image.split is not None}
    if own and len(own) < len(found):
        stray = next(image.path for image in found if image.split is None)
        raise ValueError(f"data.source={data.source!r}: some images lie below train/, test/ or val/ and some do not, as {stray}")
    return own or _drawn_splits(found, data)


def _drawn_splits(found: list[Found], data: DataConfig) -> dict[str, str]:
    by_class: dict[str, list[Found]] = defaultdict(list)
    for image in found:
        by_class[image.folder].append(image)
    splits: dict[str, str] = {}
    for name, images in by_class.items():
        images.sort(key=lambda image: image.short)
        generator(data.split_seed, "split", name).shuffle(images)
        num_test = max(1, round(len(images) * data.test_fraction))
        splits |= {image.path: "test" if place < num_test else "train" for place, image in enumerate(images)}
    return splits


def _listed_splits(found: list[Found], split_file: str) -> dict[str, str]:
    """A list as RAPF's: a line `train`, lines `<class>/<image>`, a line `test`, lines. Images that are not in it are left out."""
    listed: dict[str, str] = {}
    split = None
    for line in filter(None, map(str.strip, Path(split_file).read_text(encoding="utf-8").splitlines())):
        if line in ("train", "test"):
            split = line
        elif split is None:
            raise ValueError(f"data.split_file={split_file!r}: must begin with a line `train` or `test`, begins with {line!r}")
        else:
            listed[line] = split
    paths = {image.short: image.path for image in found}
    if missing := [name for name in listed if name not in paths]:
        raise ValueError(f"data.split_file={split_file!r}: {len(missing)} of its images are not in the source, such as {missing[0]}")
    return {paths[name]: split for name, split in listed.items()}


def _require_same(folders: set[str], classes: Mapping[str, str], data: DataConfig) -> None:
    missing = [name for name in classes if name not in folders]
    unknown = sorted(folders - set(classes))
    if missing or unknown:
        raise ValueError(
            f"data.source={data.source!r}: {len(missing)} of {len(classes)} classes have no images {missing[:5]}; "
            f"{len(unknown)} folders are no class {unknown[:5]}"
        )


def _require_both_splits(raw: RawSet, data: DataConfig) -> None:
    for split in ("train", "test"):
        present = {sample.class_id for sample in raw.samples if sample.split == split}
        lacking = [name for class_id, name in enumerate(raw.class_names) if class_id not in present]
        if lacking:
            raise ValueError(f"data.source={data.source!r}: {len(lacking)} classes have no {split} images, such as {lacking[0]!r}")


def _class_names_file(path: str) -> dict[str, str]:
    try:
        return {entry["folder"]: entry["name"] for entry in json.loads(Path(path).read_text(encoding="utf-8"))}
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f'data.class_names={path!r}: a json list of {{"folder": ..., "name": ...}} is needed ({error!r})') from None


# finding images


def _find_images(data: DataConfig, source: Path, known: Mapping[str, str] | None) -> list[Found]:
    found = [image for split, part in _parts(data, source) for image in _images_of(split, part, known)]
    if not found:
        raise ValueError(f"data.source={str(source)!r}: no images below <class>/<image> ({', '.join(IMAGE_SUFFIXES)})")
    return found


def _parts(data: DataConfig, source: Path) -> list[tuple[str | None, Source]]:
    """The sources with the split each stands for: two given ones, train.tar beside test.tar, or one that may hold both."""
    if data.test_source:
        return [("train", open_source(source)), ("test", open_source(Path(data.test_source)))]
    for test in ("test", "val"):
        for suffix in (".tar", ".zip"):
            train_file, test_file = source / f"train{suffix}", source / f"{test}{suffix}"
            if train_file.is_file() and test_file.is_file():
                return [("train", open_source(train_file)), ("test", open_source(test_file))]
    return [(None, open_source(source))]


def _images_of(split: str | None, source: Source, known: Mapping[str, str] | None) -> Iterable[Found]:
    names = source.names()
    annotated = _annotations(source, names)
    for name in names:
        *parents, file = PurePosixPath(name).parts
        if file.startswith(".") or _suffix(file) not in IMAGE_SUFFIXES or "__MACOSX" in parents:
            continue
        place = len(parents) if name in annotated else _class_place(parents, known)
        if place is None:
            continue
        # only above the class folder: CIFAR-100 has a class called train
        own_split = next((SPLIT_FOLDERS[part] for part in parents[:place] if part in SPLIT_FOLDERS), None)
        yield Found(split or own_split, annotated.get(name) or parents[place], f"{split}:{name}", partial(source.read, name))


def _class_place(parents: list[str], known: Mapping[str, str] | None) -> int | None:
    """Which of the folders above an image is its class; None if none is."""
    places = [place for place, part in enumerate(parents) if known is None or part in known]
    return places[-1] if places else None


def _annotations(source: Source, names: list[str]) -> dict[str, str]:
    """Image -> class folder from Tiny-ImageNet's val_annotations.txt; empty without one."""
    files = [name for name in names if PurePosixPath(name).name == "val_annotations.txt"]
    annotated = {}
    for file in files:
        for line in source.read(file).decode().splitlines():
            image, wnid, *_ = line.split("\t")
            annotated[(PurePosixPath(file).parent / "images" / image).as_posix()] = wnid
    return annotated


def _suffix(name: str) -> str:
    return PurePosixPath(name).suffix.lower().lstrip(".")


def _without_suffix(name: str) -> str:
    return re.sub(r"\.[^./]+$", "", name)


# download, and formats of their own


def _source_or_download(data: DataConfig, url: str, md5: str) -> Path:
    if data.source is not None:
        return Path(data.source)
    from torchvision.datasets.utils import download_url

    downloads = Path(data.root) / "downloads"
    try:
        download_url(url, downloads, md5=md5)
    except RuntimeError as error:
        raise ValueError(f"{url}: what came is not the official archive ({error}); try again, or give data.source=PATH") from error
    return downloads / PurePosixPath(url).name


def _is_official_cifar(source: Path) -> bool:
    return source.name == f"{CIFAR_FOLDER}.tar.gz" or (source / CIFAR_FOLDER).is_dir()


def _official_cifar_folder(data: DataConfig, source: Path | None) -> Path:
    """The folder torchvision looks in; an archive is copied there, because its own folder may be read-only."""
    if source is not None and source.is_dir():
        return source
    downloads = Path(data.root) / "downloads"
    if source is not None:
        _require_official_cifar(source)
    downloads.mkdir(parents=True, exist_ok=True)
    if source is not None and source.resolve().parent != downloads.resolve():
        shutil.copy(source, downloads)
    return downloads


def _require_official_cifar(archive: Path) -> None:
    """Raise ValueError for another file of the name, which torchvision would take for a failed download."""
    from torchvision.datasets import CIFAR100
    from torchvision.datasets.utils import calculate_md5

    if (found := calculate_md5(archive)) != CIFAR100.tgz_md5:
        raise ValueError(f"data.source={str(archive)!r}: damaged, or not the official archive: its MD5 is {found}, not {CIFAR100.tgz_md5}")


def _official_cifar(folder: Path, split: str, class_names: list[str]) -> Iterable[Found]:
    from torchvision.datasets import CIFAR100

    # `download` also unpacks an archive that lies there; torchvision compares MD5 before it opens a pickle
    try:
        images = CIFAR100(str(folder), train=split == "train", download=not (folder / CIFAR_FOLDER).is_dir())
    except RuntimeError as error:
        raise ValueError(f"{folder / CIFAR_FOLDER}: damaged, or not the official files ({error}); remove it and get them again") from error
    for number, (image, label) in enumerate(zip(images.data, images.targets, strict=True)):
        name = class_names[label]
        yield Found(split, name, f"{split}/{name}/{number:05d}.png", partial(_png, image))


def _digit_png(image: Any) -> bytes:
    """Values 0..16 [8, 8] -> RGB PNG 32x32."""
    from PIL import Image

    large = Image.fromarray((image * (255 / 16)).round().astype("uint8")).resize((32, 32), Image.Resampling.BICUBIC)
    return _encode(large.convert("RGB"))


def _png(array: Any) -> bytes:
    """uint8 [H, W, 3] -> PNG."""
    from PIL import Image

    return _encode(Image.fromarray(array))


def _encode(image: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, format="PNG")
    return stream.getvalue()
