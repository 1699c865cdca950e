import hashlib
import io
import json
import os
import pickle
import shutil
import tarfile
import zipfile
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from dist_vlcl.commands import build_data
from dist_vlcl.continual.evaluator import count_correct
from dist_vlcl.data import sets
from dist_vlcl.data.loader import Batch
from dist_vlcl.data.names import known_classes, prompt_names
from dist_vlcl.data.sets import read_raw
from dist_vlcl.data.settings import DataConfig
from dist_vlcl.data.shards import Index, ShardError, decode, make_shards, open_index, read_shard
from dist_vlcl.dist.world import World
from dist_vlcl.model.clip import ModelConfig, build_clip
from dist_vlcl.model.moe import MoEConfig
from dist_vlcl.options import validate
from dist_vlcl.reading import UserNote
from tests.helpers.shards import png, served

SHARED = Path(os.environ.get("DIST_VLCL_SHARED", Path(__file__).parents[2].parent / "shared")) / "data"
needs_shared = pytest.mark.skipif(not (SHARED / "cifar100").is_dir(), reason=f"no shared data sets in {SHARED}")


def images_below(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(png(8, name))
    return root


def listed(raw):
    return sorted((sample.split, raw.class_names[sample.class_id], sample.key) for sample in raw.samples)


def test_digits_are_ten_classes_of_1797_images_built_on_the_spot(tmp_path):
    index = open_index(DataConfig(root=str(tmp_path)))
    assert (len(index.class_names), index.class_names[0], index.class_names[9]) == (10, "handwritten digit zero", "handwritten digit nine")
    assert (index.count("train"), index.count("test")) == (1438, 359)
    assert all(34 <= index.count("test", [class_id]) <= 37 for class_id in range(10))


def test_digit_images_are_white_on_black_rgb():
    raw = read_raw(DataConfig())
    image = Image.open(io.BytesIO(raw.samples[0].read()))
    assert (image.size, image.mode) == ((32, 32), "RGB")
    assert np.asarray(image)[0, 0].max() < 20 and np.asarray(image).max() > 230


def test_images_without_a_folder_for_each_class_are_refused(tmp_path):
    source = images_below(tmp_path, *[f"photos/{number}.png" for number in range(10)])
    with pytest.raises(ValueError, match=r"all images are in one folder, \['photos'\]; give one folder for each class"):
        make_shards(DataConfig(name="mine", reader="folder", source=str(source), root=str(tmp_path / "data")))
    assert not (tmp_path / "data").exists()


def test_a_folder_without_a_split_is_split_by_class_and_seed(tmp_path):
    source = images_below(tmp_path, *[f"{name}/{number}.png" for name in ("red_fox", "cat") for number in range(10)])
    config = {"name": "mine", "reader": "folder", "source": str(source), "test_fraction": 0.3}
    raw = read_raw(DataConfig(**config))
    assert raw.class_names == ["cat", "red_fox"]
    assert Counter((sample.split, sample.class_id) for sample in raw.samples) == {
        ("train", 0): 7, ("train", 1): 7, ("test", 0): 3, ("test", 1): 3,
    }  # fmt: skip
    assert listed(read_raw(DataConfig(**config))) == listed(raw) != listed(read_raw(DataConfig(**config, split_seed=1)))


def test_folders_above_the_class_do_not_change_the_split(tmp_path):
    flat = images_below(tmp_path / "flat", *[f"cat/{number}.png" for number in range(10)])
    nested = images_below(tmp_path / "nested", *[f"{'photo' if number % 2 else 'sketch'}/cat/{number}.png" for number in range(10)])
    sets = [read_raw(DataConfig(name="mine", reader="folder", source=str(source))) for source in (flat, nested)]
    assert listed(sets[0]) == listed(sets[1])


def test_train_and_val_folders_and_a_zip_of_them_are_the_same_set(tmp_path):
    names = ["train/dog/1.png", "train/cat/1.png", "val/dog/2.png", "val/cat/2.JPEG"]
    source = images_below(tmp_path / "source", *names)
    (source / "train" / "dog" / "notes.txt").write_text("no image")
    with zipfile.ZipFile(tmp_path / "all.zip", "w") as archive:
        for name in names:
            archive.write(source / name, f"prefix/{name}")
    sources = [source, tmp_path / "all.zip"]
    sets = [listed(read_raw(DataConfig(name="mine", reader="folder", source=str(source)))) for source in sources]
    assert sets[0] == sets[1]
    assert sets[0] == [("test", "cat", "cat/2"), ("test", "dog", "dog/2"), ("train", "cat", "cat/1"), ("train", "dog", "dog/1")]


def test_a_split_list_decides(tmp_path):
    source = images_below(tmp_path / "s", *[f"cat/{number}.png" for number in range(4)])
    split = tmp_path / "split.txt"
    split.write_text("train\ncat/3.png\ntest\ncat/0.png\ncat/1.png\n", encoding="utf-8-sig")  # with the mark of Windows' editors
    raw = read_raw(DataConfig(name="mine", reader="folder", source=str(source), split_file=str(split)))
    assert listed(raw) == [("test", "cat", "cat/0"), ("test", "cat", "cat/1"), ("train", "cat", "cat/3")]
    split.write_text("train\ncat/9.png\n")
    with pytest.raises(ValueError, match=r"data\.split_file.*such as cat/9\.png"):
        read_raw(DataConfig(name="mine", reader="folder", source=str(source), split_file=str(split)))


def test_names_and_class_ids_come_from_the_json(tmp_path):
    source = images_below(tmp_path / "s", *[f"{wnid}/{number}.png" for wnid in ("n1", "n2") for number in range(3)])
    names = tmp_path / "names.json"
    names.write_text(json.dumps([{"folder": "n2", "name": "grey wolf"}, {"folder": "n1", "name": "owl"}]))
    raw = read_raw(DataConfig(name="mine", reader="folder", source=str(source), class_names=str(names)))
    assert raw.class_names == ["grey wolf", "owl"]
    assert {sample.class_id for sample in raw.samples if sample.key.startswith("n2")} == {0}


def test_tiny_imagenets_own_layout(tmp_path):
    wnids = list(known_classes("tiny_imagenet"))
    with zipfile.ZipFile(tmp_path / "tiny.zip", "w") as archive:
        root = "tiny-imagenet-200"
        for number, wnid in enumerate(wnids):
            archive.writestr(f"{root}/train/{wnid}/images/{wnid}_0.JPEG", b"")
            archive.writestr(f"{root}/val/images/val_{number}.JPEG", b"")
        archive.writestr(f"{root}/test/images/test_0.JPEG", b"")
        lines = [f"val_{number}.JPEG\t{wnid}\t0\t0\t62\t62\n" for number, wnid in enumerate(wnids)]
        archive.writestr(f"{root}/val/val_annotations.txt", "".join(lines))
    raw = read_raw(DataConfig(name="tiny_imagenet", source=str(tmp_path / "tiny.zip")))
    assert raw.class_names[:2] == ["Egyptian Mau", "fishing casting reel"]
    by_split = {split: [s for s in raw.samples if s.split == split] for split in ("train", "test")}
    assert len(by_split["train"]) == len(by_split["test"]) == 200
    assert all(sample.key.split("/")[0] == wnids[sample.class_id] for sample in raw.samples)
    assert next(s for s in by_split["test"] if s.key.endswith("val_7")).class_id == 7


def test_imagenet_r_is_split_in_every_class(tmp_path):
    wnids = list(known_classes("imagenet_r"))
    with zipfile.ZipFile(tmp_path / "r.zip", "w") as archive:
        for wnid in wnids:
            for number in range(5):
                archive.writestr(f"imagenet-r/{wnid}/art_{number}.jpg", b"")
    raw = read_raw(DataConfig(name="imagenet_r", source=str(tmp_path / "r.zip")))
    assert raw.class_names[1] == "great_white_shark"
    assert set(Counter((s.split, s.class_id) for s in raw.samples).values()) == {1, 4}


def test_the_official_cifar_files_as_an_archive_and_as_the_folder_that_it_unpacks_to(tmp_path, monkeypatch):
    folder, archive = tmp_path / "cifar-100-python", tmp_path / "mine/cifar-100-python.tar.gz"
    folder.mkdir()
    archive.parent.mkdir()
    pixels = np.arange(200 * 3072, dtype=np.uint32).astype(np.uint8).reshape(200, 3072)
    content = pickle.dumps({"data": pixels, "fine_labels": [label % 100 for label in range(200)]})
    with tarfile.open(archive, "w:gz") as tar:
        for split in ("train", "test"):
            (folder / split).write_bytes(content)
            tar.add(folder / split, f"cifar-100-python/{split}")
    monkeypatch.setattr(sets, "CIFAR_FILES", dict.fromkeys(("train", "test"), hashlib.md5(content).hexdigest()))
    for source in (tmp_path, folder, archive):
        raw = read_raw(DataConfig(name="cifar100", source=str(source)))
        assert (raw.class_names[1], len(raw.samples)) == ("aquarium_fish", 400)
        sample = next(s for s in raw.samples if s.split == "test" and s.key == "baby/00102")
        assert sample.class_id == 2
        image = np.asarray(Image.open(io.BytesIO(sample.read())))
        assert np.array_equal(image, pixels[102].reshape(3, 32, 32).transpose(1, 2, 0))


def test_damaged_official_files_are_refused_by_name_and_nothing_is_downloaded_in_their_place(tmp_path, monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    archive = tmp_path / "mine/cifar-100-python.tar.gz"
    (tmp_path / "unpacked/cifar-100-python").mkdir(parents=True)
    (tmp_path / "unpacked/cifar-100-python/train").write_bytes(b"no pickle")
    archive.parent.mkdir()
    archive.write_bytes(b"no archive")

    def refused(name: str, words: str, source: Path | None = None) -> None:
        with pytest.raises(ValueError, match=words):
            read_raw(DataConfig(name=name, source=source and str(source), root=str(tmp_path / "data")))

    refused("cifar100", r"data\.source='.*mine/cifar-100-python\.tar\.gz': damaged, or not the official files", archive)
    refused("cifar100", r"unpacked/cifar-100-python': damaged, or not the official files: the MD5 of train is", tmp_path / "unpacked")
    assert archive.read_bytes() == b"no archive" and not (tmp_path / "data").exists()
    with served(archive.parent) as address:
        monkeypatch.setitem(sets.ARCHIVES, "tiny_imagenet", (f"{address}/{archive.name}", sets.ARCHIVES["tiny_imagenet"][1]))
        refused("tiny_imagenet", r"/cifar-100-python\.tar\.gz: could not download it")


@pytest.fixture(scope="module")
def as_cifar():
    return read_raw(DataConfig(name="cifar100", source=str(SHARED / "cifar100")))


@needs_shared
def test_the_clip_that_ships_knows_cifar_100_better_than_chance(as_cifar):
    """Zero-shot, five images a class; on all of them it is 12 % (docs/reproduction.md)."""
    names, samples = prompt_names(as_cifar.class_names), [s for s in as_cifar.samples if s.split == "test"][::10]
    images = torch.from_numpy(np.stack([decode(s.read(), s.key) for s in samples])).permute(0, 3, 1, 2)
    labels = torch.tensor([s.class_id for s in samples])
    batch = Batch(images, labels, torch.arange(len(samples)), len(samples), 0, [])
    counts = count_correct(build_clip(ModelConfig(), MoEConfig()), [batch], names, [100], World.alone())
    correct, total = counts[0].sum(0).tolist()
    assert total == 500 and correct >= 50, correct


@needs_shared
def test_the_shared_cifar_tars_are_taken_as_they_lie(as_cifar):
    as_folder = read_raw(DataConfig(name="mine", reader="folder", source=str(SHARED / "cifar100")))
    assert prompt_names(as_folder.class_names) == prompt_names(as_cifar.class_names)  # its classnames.json has spaces already
    assert [(s.split, s.class_id, s.key) for s in as_folder.samples] == [(s.split, s.class_id, s.key) for s in as_cifar.samples]
    assert Counter(sample.split for sample in as_cifar.samples) == {"train": 20000, "test": 5000}
    assert set(Counter((sample.split, sample.class_id) for sample in as_cifar.samples).values()) == {200, 50}
    first = as_cifar.samples[0]
    assert (first.key.split("/")[0], Image.open(io.BytesIO(first.read())).size) == ("apple", (32, 32))


@needs_shared
def test_the_shared_tiny_imagenet_gets_the_official_class_ids():
    raw = read_raw(DataConfig(name="tiny_imagenet", source=str(SHARED / "tiny-imagenet-200")))
    assert Counter(sample.split for sample in raw.samples) == {"train": 16000, "test": 4000}
    assert {sample.key.split("/")[0] for sample in raw.samples if sample.class_id == 0} == {"n02124075"}


def test_a_class_called_train_is_a_class(tmp_path):
    names = [f"{split}/{name}/1.png" for split in ("train", "test") for name in known_classes("cifar100")]
    raw = read_raw(DataConfig(name="cifar100", source=str(images_below(tmp_path, *names))))
    assert Counter(sample.class_id for sample in raw.samples) == dict.fromkeys(range(100), 2)
    assert Counter(sample.split for sample in raw.samples) == {"train": 100, "test": 100}


def test_build_writes_once_and_a_run_opens_it(tmp_path, capsys):
    source = images_below(tmp_path / "s", *[f"{name}/{number}.png" for name in ("dog", "cat") for number in range(5)])
    config = DataConfig(name="mine", reader="folder", source=str(source), root=str(tmp_path / "data"))
    with pytest.raises(FileNotFoundError, match=r"dist-vlcl data data=folder data\.name=mine data\.root=.* data\.source="):
        open_index(config)
    build_data.run(SimpleNamespace(data=config))
    assert "2 classes, 8 training and 2 test images" in " ".join(capsys.readouterr().out.split())
    index = open_index(config)
    index.verify()
    assert (index.location, index.name, index.reader) == (str(tmp_path / "data/mine"), "mine", "folder")
    assert open_index(DataConfig(name="elsewhere", reader="folder", url=index.location)).fingerprint == index.fingerprint
    with pytest.raises(FileExistsError, match="has shards already"):
        make_shards(config)


@pytest.mark.parametrize(
    ("names", "options", "words"),
    [
        (["cat/1.png", "cat/2.png"], {"source": "nowhere"}, "no such file or folder"),
        (["cat/readme.txt"], {}, "no images below"),
        (["cat/1.png"], {}, "1 classes have no train images, such as 'cat'"),
        (["cat/1.png", "train/cat/2.png"], {}, "some images are below train/"),
        (["apple/1.png"], {"name": "cifar100"}, r"99 of 100 classes have no images \['aquarium_fish'"),
        (["cat/1.png"], {"source": None}, "reader=folder needs"),
        (["cat/1.png", "dog/1.GIF"], {}, r"'dog/1.GIF' is not PNG, JPEG or WebP: convert it, or set data\.on_error=skip"),
        (["pets/cat/1.png", "pets/classnames.json"], {}, r"'pets/classnames.json' is not read from there: give it as data\.class_names"),
    ],
)
def test_sources_that_cannot_work_are_refused(tmp_path, names, options, words):
    options = {"name": "mine", "source": str(images_below(tmp_path, *names))} | options
    reader = "folder" if options["name"] == "mine" else None
    with pytest.raises((ValueError, FileNotFoundError), match=words):
        read_raw(DataConfig(reader=reader, **options))


def test_folders_of_one_name_become_one_class_with_a_warning(tmp_path):
    """Classes with folders of their own would silently be mixed: the class is the innermost folder."""
    names = [f"{split}/{kind}/{place}/1.png" for split in ("train", "test") for kind in ("cat", "dog") for place in ("in", "out")]
    config = DataConfig(name="mine", reader="folder", source=str(images_below(tmp_path / "s", *names)))
    with pytest.warns(RuntimeWarning, match=r"2 class names come from several folders.* such as cat/in, dog/in"):
        assert list(read_raw(config).class_names) == ["in", "out"]


def test_files_of_other_formats_are_left_out_with_their_number(tmp_path):
    names = ["cat/1.png", "cat/2.png", "dog/1.png", "dog/2.png", "cat/3.tif", "dog/3.gif"]
    config = DataConfig(name="mine", reader="folder", source=str(images_below(tmp_path / "s", *names)), on_error="skip")
    with pytest.warns(RuntimeWarning, match=r"2 files were left out, such as 'cat/3.tif': they are not PNG, JPEG or WebP"):
        assert len(read_raw(config).samples) == 4


@pytest.mark.parametrize("names", [["val", "test"], ["Valid", "Test"], ["testing", "test"]])
def test_two_folders_of_test_images_are_refused(tmp_path, names):
    """The test images of a set with train/, val/ and test/ would silently be those of both."""
    source = images_below(tmp_path, *[f"{split}/{name}/1.png" for split in ("Train", *names) for name in ("cat", "dog")])
    config = DataConfig(name="mine", reader="folder", source=str(source))
    with pytest.raises(ValueError, match=rf"images below {names[1]}/ and {names[0]}/ would both be test images"):
        read_raw(config)
    (tmp_path / "list.txt").write_text("train\ncat/1.png\ntest\ndog/1.png\n")
    with pytest.raises(ValueError, match=r"'cat/1\.png' stands for 3 images"):  # which of them would be a matter of chance
        read_raw(replace(config, split_file=str(tmp_path / "list.txt")))
    images_below(tmp_path, "Train/cat/2.png", "Train/dog/2.png")
    (tmp_path / "list.txt").write_text("train\ncat/2.png\ntest\ndog/2.png\n")
    with pytest.raises(ValueError, match="1 classes have no train images"):  # the list decides, and here leaves a class without images
        read_raw(replace(config, split_file=str(tmp_path / "list.txt")))
    shutil.rmtree(source / names[1])
    assert listed(read_raw(config))[:3] == [("test", "cat", "cat/1"), ("test", "dog", "dog/1"), ("train", "cat", "cat/1")]


def test_shards_of_another_known_set_are_refused(tmp_path):
    """A sweep over data sets with one data.url would train on one set under all their names."""
    index = open_index(DataConfig(root=str(tmp_path)))
    with pytest.raises(ValueError, match="these are the shards of digits, not of cifar100"):
        open_index(DataConfig(name="cifar100", url=index.location))
    assert open_index(DataConfig(name="mine", reader="folder", url=index.location)).fingerprint == index.fingerprint


def test_digits_are_divided_alike_whatever_the_first_run_asks_for(tmp_path):
    first, usual = (open_index(DataConfig(root=str(tmp_path / name), test_fraction=part)) for name, part in (("a", 0.5), ("b", 0.2)))
    assert first.fingerprint == usual.fingerprint


def test_hidden_folders_hold_no_images(tmp_path):
    """Jupyter makes such folders by itself; as a class it would change the number of every class after it."""
    names = [f"{name}/{number}.png" for name in ("rose", "tulip") for number in range(2)]
    source = images_below(tmp_path, *names, "rose/.ipynb_checkpoints/1-checkpoint.png", ".trash/lily/1.png", ".trash/a.gif")
    assert read_raw(DataConfig(name="mine", reader="folder", source=str(source))).class_names == ["rose", "tulip"]


def test_a_folder_of_images_is_not_taken_for_shards(tmp_path):
    source = images_below(tmp_path / "data/mine", *[f"{name}/{number}.png" for name in ("cat", "dog") for number in range(5)])
    with pytest.raises(FileExistsError, match="holds no shards, perhaps your images: choose another"):
        make_shards(DataConfig(name="mine", reader="folder", source=str(source), root=str(tmp_path / "data")))
    assert (source / "cat/0.png").exists()


def test_names_are_given_for_every_kind_of_set_and_must_be_of_its_folders(tmp_path):
    file = tmp_path / "names.json"
    source = images_below(tmp_path / "s", *[f"{name}/{number}.png" for name in known_classes("cifar100") for number in range(2)])
    config = DataConfig(name="cifar100", source=str(source), class_names=str(file))
    file.write_text(json.dumps([{"folder": "apple", "name": "red apple"}]))
    assert read_raw(config).class_names[:2] == ["red apple", "aquarium_fish"]
    file.write_text(json.dumps([{"folder": "aple", "name": "red apple"}]))
    with pytest.raises(ValueError, match=r"data\.class_names=.*: cifar100 has no folder 'aple'"):
        read_raw(config)
    with pytest.raises(ValueError, match="data=digits has its own images and names"):
        read_raw(DataConfig(class_names=str(file)))
    for option in ("class_names", "split_file"):
        with pytest.raises(ValueError, match=rf"data\.{option}='nowhere\.json'.*No such file"):
            read_raw(DataConfig(name="mine", reader="folder", source=str(source), **{option: "nowhere.json"}))


def test_a_compressed_tar_is_refused(tmp_path):
    with tarfile.open(tmp_path / "x.tar.gz", "w:gz") as tar:
        tar.add(images_below(tmp_path / "s", "cat/1.png"), "s")
    with pytest.raises(ValueError, match=r"not an uncompressed .tar.*unpack it and give the folder"):
        read_raw(DataConfig(name="mine", reader="folder", source=str(tmp_path / "x.tar.gz")))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"name": "cifar"}, r"data\.name='cifar': choose from digits, cifar100.*data\.reader=folder"),
        ({"on_error": "x"}, r"data\.on_error='x': choose from stop, skip"),
        ({"encoding": "raw"}, r"data\.encoding='raw': choose from auto, original, pixels"),
        ({"test_fraction": 1.0}, r"data\.test_fraction=1\.0: give a number of more than 0 and less than 1"),
        ({"samples_per_shard": 0}, r"data\.samples_per_shard=0: give a number of at least 1"),
        (
            {"name": "a/b/c", "reader": "folder"},
            r"data\.name='a/b/c': give a plain folder name of letters, .* or ORG/NAME",
        ),
        ({"name": "../b", "reader": "hf"}, r"data\.name='\.\./b': give a plain folder name"),
        ({"name": "", "reader": "folder"}, r"data\.name='': give a plain folder name"),
        ({"num_workers": -1}, r"data\.num_workers=-1: give a number of at least 0 and at most 256, or null"),
    ],
)
def test_impossible_options_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        validate(DataConfig(**options), "data")


def test_the_config_files_are_options():
    from omegaconf import OmegaConf

    folder = Path(__file__).parents[2] / "configs/data"
    files = sorted(folder.glob("*.yaml"))
    names = ["cifar100", "digits", "folder", "hf", "imagenet_r", "sets", "tiny_imagenet", "torchvision", "webdataset"]
    assert [file.stem for file in files] == names
    for file in files:
        values = OmegaConf.load(file)
        merged = OmegaConf.merge(OmegaConf.structured(DataConfig), values.data, {"name": file.stem})
        assert OmegaConf.to_object(merged).reader_name == {"sets": "folder"}.get(file.stem, file.stem)


def build_of(tmp_path, broken: dict[str, bytes], **options) -> Index:
    """Build a set of two classes of five images, where the named files hold something else."""
    source = images_below(
        tmp_path / "s", *[f"{split}/{name}/{k}.png" for split in ("train", "test") for name in ("cat", "dog") for k in (0, 1)]
    )
    for name, content in broken.items():
        (source / name).write_bytes(content)
    return make_shards(DataConfig(name="mine", reader="folder", source=str(source), root=str(tmp_path / "data"), **options))


@pytest.mark.parametrize("encoding", ["original", "pixels"])
@pytest.mark.parametrize(
    "content", [b"", png(8, "cut")[:60], b"GIF89a" + bytes(99), b"P6\n9999 9999\n255\n", bytes(99)], ids=lambda c: c[:6].hex()
)
def test_the_build_opens_every_image_and_names_the_bad_ones(tmp_path, content, encoding):
    with pytest.raises(ShardError, match=r"1 of 8 images cannot be opened:\n'train/cat/1\.png': no image.*\n.*data\.on_error=skip"):
        build_of(tmp_path, {"train/cat/1.png": content}, encoding=encoding)
    assert not (tmp_path / "data/mine").exists()


def test_the_build_leaves_bad_images_out_if_it_may(tmp_path):
    with pytest.warns(UserNote, match=r"left out: 2 of 8 images cannot be opened(.|\n)*'test/dog/0\.png': no image"):
        index = build_of(tmp_path, {"train/cat/1.png": b"", "test/dog/0.png": b"x"}, on_error="skip", samples_per_shard=1)
    index.verify()
    assert (index.sizes("train", [0, 1]), index.sizes("test", [0, 1])) == ({0: [1], 1: [1, 1]}, {0: [1, 1], 1: [1]})
    assert [key for shard in index.shards["test"][1] for key, _ in read_shard(index, shard)] == ["dog/1"]


def test_the_build_refuses_a_class_whose_images_are_all_bad(tmp_path):
    with pytest.raises(ShardError, match="class 'cat' has no train image that can be opened"):
        build_of(tmp_path, {"train/cat/0.png": b"", "train/cat/1.png": b""}, on_error="skip")


def test_a_name_that_commands_the_terminal_is_refused_before_the_work(tmp_path):
    source = images_below(tmp_path / "s", *[f"{name}/{number}.png" for name in ("\x1b[2Jcat", "dog") for number in range(4)])
    with pytest.raises(ValueError, match=r"'\\x1b\[2Jcat' is not a name"):
        make_shards(DataConfig(name="mine", reader="folder", source=str(source), root=str(tmp_path / "data")))


def test_lists_that_contradict_themselves_are_refused(tmp_path):
    source = images_below(tmp_path / "s", *[f"cat/{number}.png" for number in range(4)])
    split = tmp_path / "split.txt"
    split.write_text("train\ncat/3.png\ntest\ncat/3.png\n")
    with pytest.raises(ValueError, match=r"data\.split_file.*lists 'cat/3\.png' for training and for testing"):
        read_raw(DataConfig(name="mine", reader="folder", source=str(source), split_file=str(split)))
    (source / "val_annotations.txt").write_text("1.png cat")
    with pytest.raises(ValueError, match=r"val_annotations\.txt: '1\.png cat' is not an image, a tab and a class"):
        read_raw(DataConfig(name="mine", reader="folder", source=str(source)))


def test_a_list_of_names_that_does_not_fit_the_folders_is_named(tmp_path):
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "1.png").write_bytes(png(8, 1))
    (tmp_path / "names.json").write_text(json.dumps([{"folder": "cat", "name": "Cat"}]))
    with pytest.raises(ValueError, match=r"data\.class_names=.*names\.json'.*1 folders are not classes \['dog'\]"):
        read_raw(DataConfig(name="mine", reader="folder", source=str(tmp_path), class_names=str(tmp_path / "names.json")))


def test_a_damaged_split_file_is_named(tmp_path):
    (tmp_path / "cat").mkdir()
    (tmp_path / "cat/1.png").write_bytes(png(8, 1))
    (tmp_path / "split.txt").write_text("train\ncat/1.png\ntest\n")
    with pytest.raises(ValueError, match=r"data\.split_file=.*split\.txt': 1 classes have no test images"):
        read_raw(DataConfig(name="mine", reader="folder", source=str(tmp_path), split_file=str(tmp_path / "split.txt")))
    (tmp_path / "split.txt").write_bytes(b"train\n\xff")
    with pytest.raises(ValueError, match=r"data\.split_file.*split\.txt'.*codec"):
        read_raw(DataConfig(name="mine", reader="folder", source=str(tmp_path), split_file=str(tmp_path / "split.txt")))


@pytest.mark.parametrize("names", [[("cat", "Cat"), ("cat", "Dog")], [("cat", None)], [("cat", 5)], [(1, "Cat")]])
def test_a_list_of_names_with_a_folder_twice_or_without_a_text_is_refused(tmp_path, names):
    (tmp_path / "cat").mkdir()
    (tmp_path / "cat/1.png").write_bytes(png(8, 1))
    file = tmp_path / "names.json"
    file.write_text(json.dumps([{"folder": folder, "name": name} for folder, name in names]))
    with pytest.raises(ValueError, match=r"data\.class_names=.*names\.json"):
        read_raw(DataConfig(name="mine", reader="folder", source=str(tmp_path), class_names=str(file)))
