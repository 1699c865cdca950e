"""Data sets in the formats of other libraries are read as they lie, and what is wrong with them is said with the file's name."""

import importlib.util
import io
import json
import random
import re
import resource
import shutil
import socket
import sys
import tarfile
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dist_vlcl.commands import report
from dist_vlcl.config import compose_config
from dist_vlcl.data.files import suffix_of
from dist_vlcl.data.sets import read_raw
from dist_vlcl.data.settings import DataConfig
from dist_vlcl.data.shards import ShardError, make_shards
from dist_vlcl.dist.world import World
from dist_vlcl.inference import read_trained
from dist_vlcl.train import train
from tests.helpers.mutate import tar_header_mutated
from tests.helpers.ranks import run_ranks
from tests.helpers.shards import png, served
from tests.helpers.tiny_clip import architecture

NAMES = ["grey wolf", "owl", "red fox"]
TRAIN, TEST = 4, 2  # images of each class
RUN = [f"model.name={architecture(2, 2)}", "model.pretrained=random", "orders=dual_hop_odd", "train.epochs=1", "cluster.threads=1"]
RUN += ["run.trackers=[]", "run.progress=false", "run.plots=false", "eval.zero_shot=false", "train.batch_size=8"]


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """Only the loopback may be reached."""
    connect = socket.socket.connect

    def local_only(self, address):
        assert self.family == socket.AF_UNIX or address[0] == "127.0.0.1", address
        return connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", local_only)
    monkeypatch.setenv("no_proxy", "*")


def image(split: str, label: int, number: int, format: str = "PNG") -> bytes:
    stream = io.BytesIO()
    Image.open(io.BytesIO(png(8, split, label, number))).save(stream, format)
    return stream.getvalue()


def write_tar(path: Path, members: list[tuple[str, bytes]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def benchmark_set(root: Path, splits: tuple[str, ...] = ("train", "test")) -> Path:
    """A set as clip_benchmark's webdataset_builder lays it out, with the classes mixed in every tar."""
    root.mkdir()
    (root / "classnames.txt").write_text("".join(f"{name}\n" for name in NAMES))
    (root / "zeroshot_classification_templates.txt").write_text("a photo of a {c}.\n")
    for split, count in zip(splits, (TRAIN, TEST), strict=False):
        samples = [(number, label) for number in range(count) for label in range(len(NAMES))]
        for tar in range(2):
            members = []
            for place, (number, label) in list(enumerate(samples))[tar::2]:
                members += [(f"s{place:07d}.cls", str(label).encode()), (f"s{place:07d}.webp", image(split, label, number, "WEBP"))]
            write_tar(root / split / f"{tar}.tar", members)
        (root / split / "nshards.txt").write_text("2\n")
    return root


def parquet_set(root: Path) -> Path:
    """A folder as `push_to_hub` lays it out: Parquet files with the features in their metadata."""
    datasets = pytest.importorskip("datasets", reason="needs the extra hf")
    features = datasets.Features({"photo": datasets.Image(), "species": datasets.ClassLabel(names=NAMES), "count": datasets.Value("int64")})
    (root / "data").mkdir(parents=True)
    for split, count in (("train", TRAIN), ("test", TEST)):
        rows = [
            {"photo": {"bytes": image(split, label, number, "JPEG"), "path": None}, "species": label, "count": number}
            for number in range(count)
            for label in range(len(NAMES))
        ]
        datasets.Dataset.from_list(rows, features=features).to_parquet(str(root / f"data/{split}-00000-of-00001.parquet"))
    return root


def food_set(root: Path) -> Path:
    """torchvision's Food101 with three classes."""
    lists: dict[str, dict[str, list[str]]] = {"train": {}, "test": {}}
    for label, name in enumerate(NAMES):
        for split, count in (("train", TRAIN), ("test", TEST)):
            lists[split][name] = [f"{name}/{split}{number}" for number in range(count)]
            for number, path in enumerate(lists[split][name]):
                file = root / f"food-101/images/{path}.jpg"
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(image(split, label, number, "JPEG"))
    (root / "food-101/meta").mkdir()
    for split, of_split in lists.items():
        (root / f"food-101/meta/{split}.json").write_text(json.dumps(of_split))
    return root


@pytest.fixture
def hf_cache(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets", reason="needs the extra hf")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def counts(raw) -> Counter:
    return Counter((sample.split, raw.class_names[sample.class_id]) for sample in raw.samples)


WHOLE = Counter({(split, name): count for split, count in (("train", TRAIN), ("test", TEST)) for name in NAMES})


def pixels(content: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))


def options(kind: str, source: Path, **more) -> DataConfig:
    return DataConfig(name="Food101" if kind == "torchvision" else "mine", reader=kind, source=str(source), **more)


# From the first byte to a report

SOURCES = {"webdataset": benchmark_set, "hf": parquet_set, "torchvision": food_set}


def test_every_source_is_built_trained_and_reported(tmp_path, request, monkeypatch):
    names = {"webdataset": "mine", "torchvision": "Food101"}
    if importlib.util.find_spec("datasets"):
        request.getfixturevalue("hf_cache")
        names["hf"] = "org/mine"
    folders = []
    for kind, name in names.items():
        source = SOURCES[kind](tmp_path / kind)
        places = [f"data.root={tmp_path}/data", f"run.root={tmp_path}/runs"]
        cfg = compose_config([f"data={kind}", f"data.name={name}", f"data.source={source}", "tasks.increment=2", *RUN, *places])
        index = make_shards(cfg.data)
        assert index.class_names == tuple(NAMES) and (index.count("train"), index.count("test")) == (12, 6)
        train(cfg, World.alone())
        folders.append(cfg.run.folder)
    monkeypatch.setattr(sys, "argv", ["report", *map(str, folders), "--out", str(tmp_path / "report")])
    report.main()
    results = (tmp_path / "report/report.md").read_text().split("## What was run")[1].split("##")[0]
    assert all(re.search(rf"^\| {name} Inc2 \| dual hop_odd, mozo \| frozen \| [\d.]+ \(1\)", results, re.M) for name in names.values())


def learned(world: World, options: list[str]) -> tuple[list, dict]:
    """Train on the ranks that call this; return the accuracy's counts and the adapters."""
    cfg = compose_config(options)
    accuracy = train(cfg, world)
    return accuracy.rows, read_trained(cfg.run.folder).adapters


def test_two_ranks_learn_from_sources_what_one_learns(tmp_path):
    """A WebDataset and a set of torchvision, each one task."""
    for kind in ("webdataset", "torchvision"):
        make_shards(options(kind, SOURCES[kind](tmp_path / kind), root=f"{tmp_path}/data"))
    cfg = [*RUN, f"data.root={tmp_path}/data", "data=sets", "tasks.sets=[mine,Food101]"]
    [(rows, adapters)] = run_ranks(learned, 1, [*cfg, f"run.root={tmp_path}/one"])
    ranks = run_ranks(learned, 2, [*cfg, f"run.root={tmp_path}/two"])
    for found, learned_here in ranks:
        assert found == ranks[0][0] and [total for _, total in found[-1]] == [total for _, total in rows[-1]] == [TEST] * 6
        for name, tensor in adapters.items():
            torch.testing.assert_close(learned_here[name], tensor, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("kind", SOURCES)
def test_every_image_has_its_label_and_its_pixels(tmp_path, kind, request):
    if kind == "hf":
        request.getfixturevalue("hf_cache")
    raw = read_raw(options(kind, SOURCES[kind](tmp_path / "source")))
    assert raw.class_names == NAMES and counts(raw) == WHOLE
    format = "WEBP" if kind == "webdataset" else "JPEG"
    sizes = {"train": TRAIN, "test": TEST}
    expected = {(s, k, pixels(image(s, k, n, format)).tobytes()) for s, count in sizes.items() for k in range(3) for n in range(count)}
    assert {(sample.split, sample.class_id, pixels(sample.read()).tobytes()) for sample in raw.samples} == expected
    assert {suffix_of(sample.path) for sample in raw.samples} == {{"webdataset": "webp", "hf": "jpg", "torchvision": "png"}[kind]}


# WebDataset


def test_tars_of_a_web_server_are_the_same_set(tmp_path):
    here = read_raw(options("webdataset", benchmark_set(tmp_path / "set")))
    with served(tmp_path) as address:
        there = read_raw(options("webdataset", f"{address}/set/{{train/{{0..1}},test/{{0..1}}}}.tar", root=str(tmp_path / "data")))
    assert counts(there) == counts(here) == WHOLE
    assert sorted(sample.read() for sample in there.samples) == sorted(sample.read() for sample in here.samples)
    assert list((tmp_path / "data").iterdir()) == []  # the copies are gone


def test_a_set_of_test_images_is_divided(tmp_path):
    raw = read_raw(options("webdataset", benchmark_set(tmp_path / "set", splits=("test",)), test_fraction=0.25))
    assert counts(raw) == {("train", name): 3 for name in NAMES} | {("test", name): 1 for name in NAMES}


def test_folders_of_tars_may_have_capitals(tmp_path):
    source = benchmark_set(tmp_path / "set")
    for split in ("train", "test"):
        (source / split).rename(source / split.capitalize())
    assert counts(read_raw(options("webdataset", source))) == WHOLE


def test_tars_may_lie_deeper_than_their_split(tmp_path):
    """Else the test images would be trained on."""
    source = benchmark_set(tmp_path / "set")
    for split in ("train", "test"):
        for number in range(2):
            (source / split / f"part{number}").mkdir()
            (source / split / f"{number}.tar").rename(source / split / f"part{number}" / "0.tar")
    assert counts(read_raw(options("webdataset", source))) == WHOLE
    assert counts(read_raw(options("webdataset", source.rename(tmp_path / "test")))) == WHOLE  # the set's own folder may be called so
    source = (tmp_path / "test").rename(source)
    (source / "classnames.txt").write_text((source / "classnames.txt").read_text(), encoding="utf-8-sig")
    assert read_raw(options("webdataset", source)).class_names == NAMES  # the byte order mark is no part of the first name


@pytest.mark.parametrize("form", ["{}-00{}.tar", "pets_{}_{}.tar", "{}.{}.tar"])
def test_the_names_of_tars_may_say_their_split(tmp_path, form):
    source = benchmark_set(tmp_path / "set")
    for split in ("train", "test"):
        for tar in sorted((source / split).glob("*.tar")):
            tar.rename(source / form.format(split, tar.stem))
        shutil.rmtree(source / split)
    assert counts(read_raw(options("webdataset", source))) == WHOLE
    next(source.glob("*test*")).rename(source / form.format("val", 0))
    with pytest.raises(ValueError, match="below test/ and val/ would both be test images"):
        read_raw(options("webdataset", source))


def test_tars_named_by_words_of_one_split_are_divided(tmp_path):
    source = benchmark_set(tmp_path / "set")
    for number, tar in enumerate(sorted(source.glob("*/*.tar"))):
        tar.rename(source / f"pets-{('test', 'val')[number % 2]}-{number}.tar")
    shutil.rmtree(source / "train")
    shutil.rmtree(source / "test")
    assert set(counts(read_raw(options("webdataset", source)))) == set(WHOLE)


def test_a_folder_says_the_split_and_not_the_names_of_its_tars(tmp_path):
    source = benchmark_set(tmp_path / "set")
    (source / "test").rename(source / "val")
    for tar in sorted(source.glob("*/*.tar")):
        tar.rename(tar.with_name(f"pets-{'test' if tar.parent.name == 'train' else 'train'}-{tar.name}"))
    assert counts(read_raw(options("webdataset", source))) == WHOLE
    assert set(counts(read_raw(options("webdataset", source / "train")))) == set(WHOLE)  # divided; its names are above it
    shutil.rmtree(source / "val")
    (source / "train").rename(source / "all")
    tars = sorted((source / "all").glob("*.tar"))
    for tar, name in zip(tars, ("test-tubes-0.tar", *(f"flasks-{k}.tar" for k in range(len(tars) - 1))), strict=True):
        tar.rename(tar.with_name(name))
    assert set(counts(read_raw(options("webdataset", source / "all", class_names=str(source / "classnames.txt"))))) == set(WHOLE)


def test_a_path_that_looks_like_a_password_keeps_tars_apart(tmp_path):
    """Messages mask what follows `key=`; with masked names train/0.tar and test/0.tar would be one."""
    assert counts(read_raw(options("webdataset", benchmark_set(tmp_path / "key=v1")))) == WHOLE


def test_more_tars_than_files_that_may_be_open(tmp_path):
    source = benchmark_set(tmp_path / "set")
    for number in range(2, 70):
        shutil.copy(source / "train" / "0.tar", source / "train" / f"{number}.tar")
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (60, limits[1]))
    try:
        assert len(read_raw(options("webdataset", source)).samples) > 70
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_two_folders_of_test_tars_are_refused(tmp_path):
    source = benchmark_set(tmp_path / "set")
    shutil.copytree(source / "test", source / "val")
    with pytest.raises(ValueError, match="images below test/ and val/ would both be test images"):
        read_raw(options("webdataset", source))


def test_class_names_can_be_given(tmp_path):
    source = benchmark_set(tmp_path / "set")
    (tmp_path / "names.txt").write_text("a\nb\nc\n")
    (source / "classnames.txt").unlink()
    assert read_raw(options("webdataset", source, class_names=str(tmp_path / "names.txt"))).class_names == ["a", "b", "c"]


def with_sample(members: list[tuple[str, bytes]]):
    return lambda root: write_tar(root / "train/2.tar", members)


PNG = image("x", 0, 0)
WRONG = {
    "label out of range": (
        with_sample([("a.cls", b"3"), ("a.png", PNG)]),
        r"train/2\.tar/a\.png: its class is '3'; there are 3 class names",
    ),
    "label below zero": (with_sample([("a.cls", b"-1"), ("a.png", PNG)]), r"train/2\.tar/a\.png: its class is '-1'"),
    "label is no number": (with_sample([("a.cls", b"\xff\xfe"), ("a.png", PNG)]), r"train/2\.tar/a\.png: its class is '"),
    "no label": (with_sample([("a.json", b"{}"), ("a.png", PNG)]), r"train/2\.tar: the sample 'a' has a\.json, a\.png; it needs \.cls"),
    "no image": (with_sample([("a.cls", b"1"), ("a.npy", b"")]), r"train/2\.tar: the sample 'a' has a\.cls, a\.npy"),
    "two images": (with_sample([("a.cls", b"1"), ("a.png", PNG), ("a.jpg", PNG)]), r"train/2\.tar: the sample 'a' has"),
    "no tar": (lambda root: (root / "train/2.tar").write_bytes(b"no tar"), r"train/2\.tar': damaged"),
    "cut tar": (lambda root: (root / "train/2.tar").write_bytes((root / "train/1.tar").read_bytes()[:1100]), r"train/2\.tar': damaged"),
    "no names": (lambda root: (root / "classnames.txt").unlink(), r"classnames\.txt: .*data\.class_names=FILE has one name a line"),
    "too few names": (lambda root: (root / "classnames.txt").write_text("a\nb\n"), r"its class is '2'; there are 2 class names"),
    "too many names": (lambda root: (root / "classnames.txt").write_text("a\nb\nc\nd\n"), r"1 of 4 classes have no images \['3'\]"),
    "an empty name": (lambda root: (root / "classnames.txt").write_text("a\n\nc\n"), r"classnames\.txt: line 2 is empty"),
    "binary names": (lambda root: (root / "classnames.txt").write_bytes(b"\xff\xfe\x00"), r"classnames\.txt: 'utf-8' codec"),
}


@pytest.mark.parametrize("damage", WRONG)
def test_a_damaged_set_is_refused_with_the_name_of_the_file(tmp_path, damage):
    change, words = WRONG[damage]
    source = benchmark_set(tmp_path / "set")
    change(source)
    with pytest.raises(ValueError, match=words):
        read_raw(options("webdataset", source))


def test_a_damaged_image_of_a_tar_is_named(tmp_path):
    source = benchmark_set(tmp_path / "set")
    with_sample([("a.cls", b"1"), ("a.png", PNG[:50])])(source)
    with pytest.raises(ShardError, match=r"1 of 19 images cannot be opened:\n.*train/2\.tar/a\.png"):
        make_shards(options("webdataset", source, root=str(tmp_path / "data")))


def test_a_mutated_tar_is_refused_or_holds_the_same_samples(tmp_path):
    source = benchmark_set(tmp_path / "set")
    file, refused = source / "train/0.tar", 0
    whole, right = file.read_bytes(), sorted(sample.read() for sample in read_raw(options("webdataset", source)).samples)
    for seed in range(40):
        file.write_bytes(tar_header_mutated(whole, random.Random(seed)))
        try:
            raw = read_raw(options("webdataset", source))
        except ValueError:
            refused += 1
        else:
            assert sorted(sample.read() for sample in raw.samples) == right, seed
    assert refused > 10


@pytest.mark.parametrize("source", ["", "pipe:cat {0..1}.tar", "s3://bucket/0.tar", "empty"])
def test_other_addresses_are_refused(tmp_path, monkeypatch, source):
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"data\.source=.*reader=webdataset found no tars there; give a folder with \.tar files"):
        read_raw(DataConfig(name="mine", reader="webdataset", source=source))


@pytest.mark.parametrize("quote", ["", "'", '"'])
def test_an_address_with_braces_needs_no_second_quotes(quote):
    pattern = "https://example.org/{train/{0000..0099},test/{0..1}}.tar"
    cfg = compose_config(["data=webdataset", "data.name=mine", f"data.source={quote}{pattern}{quote}"])
    assert cfg.data.source == pattern


# Hugging Face


def test_without_the_package_the_message_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match=r"org/set: could not load it: .*data=hf needs the extra dist-vlcl\[hf\]"):
        read_raw(DataConfig(name="org/set", reader="hf"))


def hf_table(folder: Path, columns: dict, split: str = "train") -> Path:
    import pyarrow
    import pyarrow.parquet

    folder.mkdir(exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.table(columns), folder / f"{split}.parquet")
    return folder


def test_plain_columns_are_taken_by_name(tmp_path, hf_cache):
    columns = {"img": [{"bytes": image("t", k % 2, k), "path": None} for k in range(10)], "animal": ["owl", "cat"] * 5}
    raw = read_raw(options("hf", hf_table(tmp_path / "t", columns), image_column="img", label_column="animal"))
    assert raw.class_names == ["cat", "owl"]
    assert counts(raw) == {("train", "cat"): 4, ("train", "owl"): 4, ("test", "cat"): 1, ("test", "owl"): 1}


def test_numbers_without_names_are_classes_in_their_order(tmp_path, hf_cache):
    columns = {"img": [{"bytes": image("t", k, k), "path": None} for k in range(48)], "y": [k % 12 for k in range(48)]}
    choice = {"image_column": "img", "label_column": "y"}
    raw = read_raw(options("hf", hf_table(tmp_path / "t", columns, "test"), train_split="test", **choice))
    assert raw.class_names == [str(number) for number in range(12)] and len(raw.samples) == 48  # the only split is divided
    columns["y"][5] = None
    with pytest.raises(ValueError, match="row 5 of split 'train' has no y"):
        read_raw(options("hf", hf_table(tmp_path / "u", columns), **choice))


def test_what_is_not_known_about_a_table_is_asked_for(tmp_path, hf_cache):
    source = parquet_set(tmp_path / "set")
    for more, words in [
        ({"image_column": "picture"}, r"data\.image_column='picture': .*choose from photo, species, count"),
        ({"label_column": "x"}, r"data\.label_column='x'"),
        ({"train_split": "training"}, r"no images in split 'training'; choose .* from train \(12 rows\), test \(6 rows\)"),
        ({"test_split": "dev"}, r"no images in split 'dev'"),
        ({"label_column": "count"}, r"2 classes have no test images, such as '2'"),
    ]:
        with pytest.raises(ValueError, match=words):
            read_raw(options("hf", source, **more))
    columns = {"a": [1, 2], "b": [3, 4]}
    with pytest.raises(ValueError, match=r"data\.image_column=None: 0 columns have the type Image; choose from a, b"):
        read_raw(options("hf", hf_table(tmp_path / "t", columns)))


@pytest.mark.parametrize("split", ["train", "test"])
def test_an_empty_split_is_refused(tmp_path, hf_cache, monkeypatch, split):
    import datasets

    loaded = datasets.load_dataset(str(parquet_set(tmp_path / "set")))
    loaded[split] = loaded[split].select([])
    monkeypatch.setattr(datasets, "load_dataset", lambda *_: loaded)
    rows = ", ".join(rf"{name} \({len(part)} rows\)" for name, part in loaded.items())
    with pytest.raises(ValueError, match=rf"no images in split '{split}'; choose data\.train_split and data\.test_split from {rows}"):
        read_raw(options("hf", tmp_path / "set"))


def test_a_set_of_the_hub_is_read_from_the_cache_without_a_network(tmp_path, hf_cache, monkeypatch):
    """The cache of a set of the Hub has the same files as that of a folder, below another name."""
    here = read_raw(options("hf", parquet_set(tmp_path / "mine")))
    [prepared] = [path for path in (tmp_path / "cache/mine").glob("*/*/*") if path.is_dir()]
    (tmp_path / "cache/org___mine/default/0.0.0").mkdir(parents=True)
    prepared.rename(tmp_path / "cache/org___mine/default/0.0.0" / prepared.name)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    there = read_raw(DataConfig(name="org/mine", reader="hf"))
    assert counts(there) == WHOLE and [sample.read() for sample in there.samples] == [sample.read() for sample in here.samples]
    with pytest.raises(ValueError, match=r"org/other: could not load it: .*the cache of datasets"):
        read_raw(DataConfig(name="org/other", reader="hf"))


def test_a_path_in_a_table_opens_no_file(tmp_path, hf_cache):
    secret = tmp_path / "secret.png"
    secret.write_bytes(PNG)
    columns = {"img": [{"bytes": None, "path": str(secret)}] * 10, "animal": ["owl", "cat"] * 5}
    data = options("hf", hf_table(tmp_path / "t", columns), image_column="img", label_column="animal", root=str(tmp_path / "data"))
    with pytest.raises(ShardError, match=r"10 of 10 images cannot be opened:\n'train/\d+\.png': no image"):
        make_shards(data)


@pytest.mark.parametrize("place", [0, 5])
def test_a_row_without_an_image_is_named_or_left_out(tmp_path, hf_cache, place):
    images = [{"bytes": image("t", k % 2, k), "path": None} for k in range(40)]
    images[place] = None
    columns = {"img": images, "animal": ["owl", "cat"] * 20}
    data = options("hf", hf_table(tmp_path / "t", columns), image_column="img", label_column="animal", root=str(tmp_path / "data"))
    with pytest.raises(ShardError, match=rf"1 of 40 images cannot be opened:\n'train/000000{place}\.png': no image"):
        make_shards(data)
    index = make_shards(replace(data, on_error="skip"))
    assert index.count("train") + index.count("test") == 39


def test_a_label_without_a_name_is_refused(tmp_path, hf_cache):
    source = parquet_set(tmp_path / "set")
    (tmp_path / "names.txt").write_text("a\nb\n")
    with pytest.raises(ValueError, match=r"train/0000002\.jpg: its class is '2'; there are 2 class names"):
        read_raw(options("hf", source, class_names=str(tmp_path / "names.txt")))


@pytest.mark.parametrize("content", [b"", b"PAR1", None])
def test_a_damaged_table_is_one_message(tmp_path, hf_cache, content):
    source = parquet_set(tmp_path / "set")
    file = next(source.rglob("train*"))
    file.write_bytes(file.read_bytes()[:-50] if content is None else content)
    with pytest.raises(ValueError, match=r"set: could not load it: .*data\.source=FOLDER"):
        read_raw(options("hf", source))
    with pytest.raises(ValueError, match=r"nowhere: could not load it"):
        read_raw(options("hf", tmp_path / "nowhere"))


# torchvision


def test_a_set_without_a_split_is_divided_and_names_can_be_given(tmp_path):
    for name in ("Forest", "River"):
        for number in range(5):
            file = tmp_path / f"eurosat/2750/{name}/{name}_{number}.jpg"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(image("t", 0, number, "JPEG"))
    raw = read_raw(DataConfig(name="EuroSAT", reader="torchvision", source=str(tmp_path)))
    assert counts(raw) == {("train", "Forest"): 4, ("train", "River"): 4, ("test", "Forest"): 1, ("test", "River"): 1}
    (tmp_path / "names.txt").write_text("forest\nriver\n")
    named = DataConfig(name="EuroSAT", reader="torchvision", source=str(tmp_path), class_names=str(tmp_path / "names.txt"))
    assert read_raw(named).class_names == ["forest", "river"]


def test_images_are_stored_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for number in range(2):
            Image.new("RGB", (40, 20)).save(tmp_path / name / f"{number}.jpg", exif=exif)
    raw = read_raw(DataConfig(name="ImageFolder", reader="torchvision", source=str(tmp_path)))
    assert [pixels(sample.read()).shape for sample in raw.samples] == [(40, 20, 3)] * 4


def test_a_set_with_train_and_test_parts(tmp_path):
    raw_folder = tmp_path / "MNIST/raw"
    raw_folder.mkdir(parents=True)
    labels = np.arange(20, dtype=np.uint8) % 10
    for part in ("train", "t10k"):
        images = np.repeat(labels * 20, 28 * 28).reshape(20, 28, 28)
        (raw_folder / f"{part}-images-idx3-ubyte").write_bytes(bytes.fromhex("0000080300000014" + "0000001c" * 2) + images.tobytes())
        (raw_folder / f"{part}-labels-idx1-ubyte").write_bytes(bytes.fromhex("0000080100000014") + labels.tobytes())
    raw = read_raw(DataConfig(name="MNIST", reader="torchvision", source=str(tmp_path)))
    assert len(raw.class_names) == 10 and set(counts(raw).values()) == {2}
    assert all(pixels(sample.read())[0, 0, 0] == sample.class_id * 20 for sample in raw.samples)


@pytest.mark.parametrize(
    ("name", "more", "words"),
    [
        ("Flowers", {}, r"data\.name='Flowers': torchvision cannot open it .*no attribute 'Flowers'"),
        ("wrap_dataset_for_transforms_v2", {}, r"torchvision cannot open it"),
        ("Food101", {"train_split": "trainval"}, r"data\.name='Food101': torchvision cannot open it in '.*': .*trainval"),
        ("CocoCaptions", {}, r"data\.name='CocoCaptions': torchvision cannot open it"),
    ],
)
def test_what_torchvision_cannot_open_is_refused(tmp_path, name, more, words):
    with pytest.raises(ValueError, match=words):
        read_raw(DataConfig(name=name, reader="torchvision", source=str(food_set(tmp_path / "food")), **more))


def test_a_missing_image_of_torchvision_is_named(tmp_path):
    source = food_set(tmp_path / "food")
    (source / "food-101/images/owl/train1.jpg").unlink()
    with pytest.raises(ValueError, match=r"torchvision cannot open it .*owl/train1\.jpg"):
        read_raw(options("torchvision", source))
