import contextlib
import gzip
import hashlib
import io
import json
import multiprocessing
import os
import random
import shutil
import signal
import ssl
import subprocess
import sys
import tarfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import requests

from dist_vlcl.commands import verify
from dist_vlcl.config import TaskConfig
from dist_vlcl.data import download, files
from dist_vlcl.data.files import Found, new_folder
from dist_vlcl.data.settings import DataConfig
from dist_vlcl.data.shards import (
    Index,
    RawSet,
    Shard,
    ShardError,
    ShardUnavailableError,
    build_command,
    decode,
    read_bytes,
    read_shard,
    unique_keys,
    write_shards,
)
from dist_vlcl.dist.world import World
from dist_vlcl.experiment import open_tasks
from tests.helpers import mutate
from tests.helpers.memory import peak_mib
from tests.helpers.shards import Quiet, make_index, png, raw_set, served


def shard_of(tmp_path, members, count=1, path="train/0000-000.tar"):
    """An index of one shard with these members, hash included, as a hostile author would write it."""
    target = tmp_path / path
    target.parent.mkdir(parents=True)
    with tarfile.open(target, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    content = target.read_bytes()
    shard = Shard(path, count, len(content), hashlib.sha256(content).hexdigest())
    return Index("x", "folder", ("a",), ("png",), {"train": ((shard,),), "test": ((),)}, str(tmp_path)), shard


def test_shards_hold_the_original_bytes_of_one_class(tmp_path):
    index = make_index(tmp_path, num_classes=2)
    read = {sample.key: sample.image for shard in index.shards["train"][1] for sample in read_shard(index, shard)}
    assert read == {f"class1/train_{number:02d}": png(32, "train", 1, number) for number in range(7)}
    assert [shard.path for shard in index.shards["train"][1]] == [f"train/0001-00{number}.tar" for number in range(3)]
    assert [shard.count for shard in index.shards["train"][1]] == [3, 2, 2]  # equal to within one


@pytest.mark.parametrize(("pixels", "suffix"), [(False, "png"), (True, "ppm")])
def test_webdataset_reads_our_shards(tmp_path, pixels, suffix):
    import webdataset

    make_index(tmp_path, pixels=pixels)
    samples = list(webdataset.WebDataset(str(tmp_path / "tiny/train/0002-000.tar"), shardshuffle=False).decode("pil"))
    assert [sample["cls"] for sample in samples] == [2, 2, 2] and samples[0][suffix].size == (32, 32)
    assert np.array_equal(np.asarray(samples[1][suffix]), decode(png(32, "train", 2, 1), ""))


def test_shards_of_pixels_hold_the_same_images(tmp_path):
    index = make_index(tmp_path, num_classes=2, pixels=True)
    stored = [sample for shard in index.shards["train"][1] for sample in read_shard(index, shard)]
    assert [sample.image[:13] for sample in stored] == [b"P6\n32 32\n255\n"] * 7
    for number, sample in enumerate(stored):
        assert np.array_equal(decode(sample.image, ""), decode(png(32, "train", 1, number), ""))
    assert Index.load(index.location).encodings == ("ppm",)
    path = tmp_path / "tiny" / index.shards["train"][1][0].path
    path.write_bytes(path.read_bytes().replace(stored[0].image[50:60], b"0123456789"))
    with pytest.raises(ShardError, match=r"1 of 8 shards are damaged:\n.*train/0001-000\.tar.*the bytes differ"):
        index.verify()


@pytest.mark.parametrize(
    "data",
    [
        *(b"P6\n2 2\n255\n" + b"x" * n for n in (0, 11, 13)),
        *(b"P6\n" + size + b"\n255\n" + b"x" * 12 for size in (b"99999 99999", b"-2 -2", b"0 0", b"02 2", b"2  2", b"4 1 1", b"100000 1")),
        *(b"P6\n2 2\n65535\n" + b"x" * 24, b"P6 2 2 255 " + b"x" * 12, b"P3\n2 2\n255\n" + b"1 " * 12, b"P6\n#\n2 2\n255\n" + b"x" * 12),
    ],
)
def test_pixels_that_are_not_as_many_as_they_say_are_refused(data):
    assert decode(b"P6\n2 2\n255\n" + bytes(range(12)), "").tolist() == np.arange(12).reshape(2, 2, 3).tolist()
    with pytest.raises(ShardError, match="apple/1: no image"):
        decode(data, "apple/1")


def test_small_images_are_stored_as_pixels_by_default_and_others_as_they_are():
    by_default = {name: DataConfig(name=name).stores_pixels for name in ("digits", "cifar100", "tiny_imagenet", "imagenet_r")}
    assert by_default == {"digits": True, "cifar100": True, "tiny_imagenet": True, "imagenet_r": False}
    assert DataConfig(name="imagenet_r", encoding="pixels").stores_pixels and not DataConfig(encoding="original").stores_pixels
    assert "data.encoding=pixels" in build_command(DataConfig(name="imagenet_r", encoding="pixels"))


def test_the_index_survives_its_file(tmp_path):
    index = make_index(tmp_path)
    assert Index.load(index.location) == index
    assert (index.count("train"), index.count("test", [0, 3])) == (28, 6)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".tiny.lock", "tiny"]  # nothing else left beside it


def test_equal_sets_give_equal_bytes(tmp_path):
    one, two, other = make_index(tmp_path / "a"), make_index(tmp_path / "b"), make_index(tmp_path / "c", train=6)
    assert one.fingerprint == two.fingerprint != other.fingerprint
    assert (tmp_path / "a/tiny/index.json").read_bytes() == (tmp_path / "b/tiny/index.json").read_bytes()


def test_shards_are_those_of_version_0_1(tmp_path):
    """Format 1: the same raw set still gives the same bytes and index."""
    index = make_index(tmp_path, num_classes=2, pixels=True)
    assert index.fingerprint == "c7b8e14a1d95707d277c6788cae165fde27716cda3695eb9bbc84355c3faf9b9"


def test_a_failed_write_leaves_nothing_but_its_lock(tmp_path):
    def fail():
        raise OSError("disk")

    raw = raw_set(1)
    with pytest.raises(OSError, match="disk"):
        write_shards(RawSet(raw.class_names, [raw.samples[0]._replace(read=fail)]), DataConfig(root=str(tmp_path)))
    assert [path.name for path in tmp_path.iterdir()] == [".digits.lock"]


def test_the_slower_of_two_writers_fails_and_the_first_ones_folder_stays(tmp_path, recwarn):
    """It waits: nothing is written twice, and its own options are never taken for those of the shards."""
    index = make_index(tmp_path / "a")
    with ThreadPoolExecutor() as pool:
        with new_folder(tmp_path / "b/tiny") as folder:
            slower = pool.submit(make_index, tmp_path / "b", samples_per_shard=2)
            while not recwarn.list:
                time.sleep(0.01)
            assert "waiting for another process" in str(recwarn.list[0].message) and not slower.done()
            shutil.copytree(index.location, folder, dirs_exist_ok=True)
        with pytest.raises(FileExistsError, match="tiny exists already: choose another"):
            slower.result()
    assert Index.load(str(tmp_path / "b/tiny")).fingerprint == index.fingerprint
    assert sorted(path.name for path in (tmp_path / "b").iterdir()) == [".tiny.lock", "tiny"]


def build_and_die(root):
    raw = raw_set()
    last = raw.samples[-1]._replace(read=lambda: os.kill(os.getpid(), signal.SIGKILL))
    write_shards(RawSet(raw.class_names, [*raw.samples[:-1], last]), DataConfig(name="tiny", reader="folder", root=str(root)))


def test_a_killed_build_goes_on_at_the_next_start(tmp_path):
    killed = multiprocessing.get_context("fork").Process(target=build_and_die, args=(tmp_path,))
    killed.start()
    killed.join()
    assert killed.exitcode == -signal.SIGKILL and (tmp_path / ".tiny.part/train").is_dir()
    make_index(tmp_path).verify()
    assert sorted(path.name for path in tmp_path.iterdir()) == [".tiny.lock", "tiny"]


def test_verify_names_the_damaged_shards(tmp_path):
    index = make_index(tmp_path)
    index.verify()
    path = tmp_path / "tiny/test/0001-000.tar"
    path.write_bytes(path.read_bytes().replace(b"IDAT", b"IDAX", 1))
    with pytest.raises(ShardError, match=r"1 of 16 shards are damaged:\n.*test/0001-000\.tar.*the bytes differ"):
        index.verify()


@pytest.mark.parametrize("kept", [0, 100, 512, 1024, 2000, 9000, -1024 * 9])
def test_any_truncation_is_noticed(tmp_path, kept):
    index = make_index(tmp_path)
    path = tmp_path / "tiny/train/0001-000.tar"
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ShardError, match=rf"train/0001-000\.tar: .*; the index says \d+ bytes, found {path.stat().st_size}$"):
        read_shard(index, index.shards["train"][1][0])


TWO = [("a.cls", b"0"), ("a.png", png(8)), ("b.cls", b"0"), ("b.png", png(8))]


@pytest.mark.parametrize(
    ("members", "damage", "words"),
    [
        ([*TWO[:2], *TWO], lambda tar: tar, "comes twice"),
        ([*TWO, ("b.PNG", b"")], lambda tar: tar, "comes twice"),
        (TWO, lambda tar: b"\xa5" * len(tar), "invalid header"),
        (TWO, lambda tar: tar[:148] + b"zzzzzz" + tar[154:], "invalid header"),
        (TWO, lambda tar: tar[: 2048 + 148] + b"zzzzzz" + tar[2048 + 154 :], "invalid header at byte 2,048"),
        (TWO, lambda tar: tar[: 2048 + 3] + b"z" + tar[2048 + 4 :], "invalid header at byte 2,048"),
        (TWO, lambda tar: tar[:2048], "the end is missing"),
        (TWO, lambda tar: tar[: 4096 + 512], "the end is missing"),
        (TWO, lambda tar: tar[:2048] + bytes(1024) + tar[2048:], "invalid header at byte 2,048"),
        (TWO[:2], lambda tar: tar, "the index says 2 samples, found 1 labels and 1 images"),
        (TWO[:3], lambda tar: tar, "found 2 labels and 1 images"),
        ([*TWO[1:], ("c.png", b"")], lambda tar: tar, "found 1 labels and 3 images"),
    ],
)
def test_damage_is_noticed_even_where_the_index_has_the_hash_of_the_damaged_shard(tmp_path, members, damage, words):
    index, shard = shard_of(tmp_path, members, count=2)
    content = damage((tmp_path / shard.path).read_bytes())
    (tmp_path / shard.path).write_bytes(content)
    with pytest.raises(ShardError, match=rf"train/0000-000\.tar: refused: .*{words}"):
        read_shard(index, replace(shard, bytes=len(content), sha256=hashlib.sha256(content).hexdigest()))


@pytest.mark.parametrize("suffix", ["pkl", "pth", "pyd", "png.pkl", "PKL", "json"])
def test_members_other_than_labels_and_images_are_refused(tmp_path, suffix):
    index, shard = shard_of(tmp_path, [("a.cls", b"0"), ("a.png", png(8)), (f"a.{suffix}", b"cos\nsystem\n.")])
    with pytest.raises(ShardError, match=r"train/0000-000\.tar: refused: 'a\..*' is neither a label"):
        read_shard(index, shard)


@pytest.mark.parametrize("name", ["../a", "b/../../a", "/etc/a"])
def test_names_that_lead_out_are_refused(tmp_path, name):
    index, shard = shard_of(tmp_path, [(f"{name}.cls", b"0"), (f"{name}.png", png(8))])
    with pytest.raises(ShardError, match="leads out of the shard"):
        read_shard(index, shard)


def test_a_shard_of_another_class_is_refused(tmp_path):
    index, shard = shard_of(tmp_path, [("a.cls", b"7"), ("a.png", png(8))])
    with pytest.raises(ShardError, match="a is labelled b'7', not 0"):
        read_shard(index, shard)


def test_an_image_that_cannot_be_opened_is_found_by_verify(tmp_path):
    """A set from elsewhere, or of version 0.1, whose build did not open the images."""
    index, _ = shard_of(tmp_path, [("a.cls", b"0"), ("a.png", b"GIF89a" + bytes(100))])
    with pytest.raises(ShardError, match=r"1 of 1 shards are damaged:\ntrain/0000-000\.tar: a: no image"):
        index.verify()


def test_a_sound_handmade_shard_is_read(tmp_path):
    index, shard = shard_of(tmp_path, [("a.cls", b"0\n"), ("a.PNG", png(8))])
    assert read_shard(index, shard) == [("a", png(8))]


@pytest.fixture
def edited(tmp_path):
    """A function that edits the index of a tiny set: with a new digest, as a hostile author would, or without."""
    folder = Path(make_index(tmp_path).location)
    whole = (folder / "index.json").read_text()

    def edit(change, new_digest=True) -> str:
        content = json.loads(whole)
        change(content)
        if new_digest:
            del content["digest"]
            content["digest"] = hashlib.sha256(json.dumps(content, indent=1, sort_keys=True).encode()).hexdigest()
        (folder / "index.json").write_text(json.dumps(content))
        return str(folder)

    return edit


@pytest.mark.parametrize(
    "path", ["../x.tar", "train/0000-000.tar;rm", "/train/0000-000.tar", "pipe:ls", "train/0001-000.tar", "train/0000-001.tar", None, 7]
)
def test_an_index_names_no_other_file_than_its_own_shards(edited, path):
    location = edited(lambda content: content["shards"]["train"][0][0].update(path=path))
    with pytest.raises(ValueError, match=r"index\.json: damaged: names .* in the place of train/0000-000\.tar"):
        Index.load(location)


@pytest.mark.parametrize(
    "change",
    [
        {"count": 0}, {"count": -3}, {"count": 10**9}, {"count": 3.0}, {"count": "3"}, {"count": True}, {"count": None},
        {"bytes": 0}, {"bytes": 1 << 62}, {"bytes": 10240.0}, {"count": 10**9, "bytes": 10**13},
        {"sha256": "0" * 63}, {"sha256": "G" * 64}, {"sha256": None}, {"other": 1},
    ],
    ids=str,
)  # fmt: skip
def test_an_entry_is_one_that_a_shard_can_have(edited, change):
    location = edited(lambda content: content["shards"]["train"][0][0].update(change))
    with pytest.raises(ValueError, match=r"index\.json: damaged"):
        Index.load(location)


def swap(a, b):
    a[:], b[:] = b[:], a[:]


def swap_with_paths(a, b):
    """The shards of two classes, under names that fit."""
    swap(a, b)
    for one, other in zip(a, b, strict=True):
        one["path"], other["path"] = other["path"], one["path"]


EDITS = {
    "two classes swapped": lambda c: swap(c["shards"]["train"][0], c["shards"]["train"][1]),
    "two shards swapped": lambda c: c["shards"]["train"][0].reverse(),
    "splits swapped": lambda c: swap(c["shards"]["train"], c["shards"]["test"]),
    "a shard twice": lambda c: c["shards"]["train"][0].append(c["shards"]["train"][0][0]),
    "a shard lost": lambda c: c["shards"]["train"][0].pop(0),
    "a class lost": lambda c: c["class_names"].pop(),
    "a name that is none": lambda c: c["class_names"].__setitem__(0, 7),
    "a name that commands the terminal": lambda c: c["class_names"].__setitem__(0, "\x1b[2J"),
    "names as one text": lambda c: c.update(class_names="abcd"),
    "more than an index has": lambda c: c.update(more=1),
    "another split": lambda c: c["shards"].update(val=[]),
}
QUIET_EDITS = {
    "names swapped": lambda c: c["class_names"].reverse(),
    "another reader": lambda c: c.update(reader="cifar100"),
    "another encoding": lambda c: c.update(encodings=["ppm"]),
    "the last shard lost": lambda c: c["shards"]["train"][0].pop(),
}
SHARD_EDITS = {
    "classes swapped with their paths": lambda c: swap_with_paths(c["shards"]["train"][0], c["shards"]["train"][1]),
    "another count": lambda c: c["shards"]["train"][0][0].update(count=2),
    "another size": lambda c: c["shards"]["train"][0][0].update(bytes=9728),
    "another digest": lambda c: c["shards"]["train"][0][0].update(sha256="0" * 64),
}


@pytest.mark.parametrize("edit", EDITS)
def test_an_index_that_contradicts_itself_is_refused_even_with_a_right_digest(edited, edit):
    with pytest.raises(ValueError, match=r"index\.json: damaged"):
        Index.load(edited(EDITS[edit]))


@pytest.mark.parametrize("edit", [*QUIET_EDITS, *SHARD_EDITS])
def test_an_edit_that_contradicts_nothing_is_refused_by_the_digest(edited, edit):
    with pytest.raises(ValueError, match=r"index\.json: damaged"):
        Index.load(edited({**QUIET_EDITS, **SHARD_EDITS}[edit], new_digest=False))


@pytest.mark.parametrize("edit", SHARD_EDITS)
def test_verify_finds_an_index_that_does_not_fit_its_shards(edited, edit):
    index = Index.load(edited(SHARD_EDITS[edit]))
    with pytest.raises(ShardError, match=r"[1-6] of 16 shards are damaged:\n.*train/0000-000"):
        index.verify()


def test_a_pipe_in_place_of_the_index_or_a_shard_does_not_hang(tmp_path):
    index = make_index(tmp_path)
    for name, error in (("train/0000-000.tar", ShardError), ("index.json", OSError)):
        path = Path(index.location, name)
        path.unlink()
        os.mkfifo(path)
        with pytest.raises(error, match="not a regular file"):
            Index.load(index.location).verify()


def test_a_mutated_index_is_refused_or_says_the_same(tmp_path):
    file = Path(make_index(tmp_path).location) / "index.json"
    whole = file.read_bytes()
    index, refused = Index.load(str(file.parent)), 0
    without_digest = {name: value for name, value in json.loads(whole).items() if name != "digest"}
    for seed in range(400):
        file.write_bytes(mutate.json_text_mutated(whole, random.Random(seed)))
        try:
            loaded = Index.load(str(file.parent))
        except ValueError:
            refused += 1
        else:
            assert loaded == index and {n: v for n, v in json.loads(file.read_bytes()).items() if n != "digest"} == without_digest, seed
    assert refused > 300


def test_a_mutated_shard_is_refused_or_holds_the_same_images(tmp_path):
    """The index has the digest of the mutated shard, as a hostile author would write it, with the checksums mended."""
    index, shard = shard_of(tmp_path, TWO, count=2)
    whole, right = (tmp_path / shard.path).read_bytes(), read_shard(index, shard)
    for seed in range(300):
        content = mutate.tar_header_mutated(whole, random.Random(seed))
        (tmp_path / shard.path).write_bytes(content)
        try:
            samples = read_shard(index, replace(shard, sha256=hashlib.sha256(content).hexdigest()))
        except ShardError as error:
            assert "train/0000-000.tar: refused" in str(error)
        else:
            assert [sample.image for sample in samples] == [sample.image for sample in right], seed


def test_an_index_of_version_0_1_has_no_digest(edited):
    assert Index.load(edited(lambda content: content.pop("digest"), new_digest=False)).count("train") == 28


def test_an_index_of_another_format_is_refused(tmp_path):
    make_index(tmp_path)
    file = tmp_path / "tiny/index.json"
    file.write_text(file.read_text().replace('"format": 1', '"format": 2'))
    with pytest.raises(ValueError, match="format 2, this version reads 1"):
        Index.load(str(tmp_path / "tiny"))


def damaged_indices(content: dict) -> list[object]:
    no_test = {**content["shards"], "test": []}
    without = {**content["shards"]["train"][0][0]}
    del without["sha256"]
    entry = {**content["shards"], "train": [[{**content["shards"]["train"][0][0], "count": "3"}], *content["shards"]["train"][1:]]}
    lacking = {**content["shards"], "train": [[without], *content["shards"]["train"][1:]]}
    shards_of = [{**content, "shards": shards} for shards in ({"train": []}, no_test, lacking, entry, [], None)]
    return [{"format": 1}, [], None, {}, "index", *shards_of, {**content, "class_names": None}]


def test_a_damaged_index_is_one_message_that_names_it(tmp_path):
    folder = Path(make_index(tmp_path).location)
    file = folder / "index.json"
    whole = file.read_text()
    texts = ["", whole[: len(whole) // 2], "\xff", *map(json.dumps, damaged_indices(json.loads(whole)))]
    for text in texts:
        file.write_text(text, encoding="latin-1")
        cfg = SimpleNamespace(data=DataConfig(name="tiny", reader="folder", root=str(tmp_path)), tasks=TaskConfig())
        with pytest.raises(ValueError, match=r"tiny/index\.json: damaged: .*build the shards, again"):
            open_tasks(cfg, World.alone())


def test_commands_run_only_if_allowed(tmp_path):
    index = make_index(tmp_path)
    location = f"pipe:cat {tmp_path}/tiny/{{}}"
    with pytest.raises(ValueError, match=r"data\.allow_pipe=true"):
        Index.load(location)
    piped = Index.load(location, allow_pipe=True)
    assert piped.fingerprint == index.fingerprint
    piped.verify()
    with pytest.raises(OSError):
        read_bytes("pipe:cat /nonexistent", allow_pipe=True, timeout_s=120)


@pytest.fixture
def no_second_attempt(monkeypatch):
    monkeypatch.setattr(download.log, "warning", lambda *_: pytest.fail("tried again"))


def test_shards_are_read_over_http(tmp_path, monkeypatch, no_second_attempt):
    monkeypatch.setenv("no_proxy", "*")
    index = make_index(tmp_path)
    with served(tmp_path) as address:
        remote = Index.load(f"{address}/tiny")
        assert remote == replace(index, location=f"{address}/tiny")
        remote.verify()
        (tmp_path / "tiny/train/0000-000.tar").unlink()
        with pytest.raises(ShardError, match=r"train/0000-000\.tar: cannot be read: 404 Client Error"):
            read_shard(remote, remote.shards["train"][0][0])


@pytest.mark.skipif(not shutil.which("openssl"), reason="no openssl command here, which makes the server's certificate")
def test_shards_are_read_over_https_from_a_server_that_is_known(tmp_path, monkeypatch, no_second_attempt):
    monkeypatch.setenv("no_proxy", "*")
    index, key, certificate = make_index(tmp_path), str(tmp_path / "key.pem"), str(tmp_path / "certificate.pem")
    subject = ["-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1"]
    files = ["-keyout", key, "-out", certificate]
    subprocess.run(["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", *files, *subject], check=True, capture_output=True)
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(certificate, key)
    with served(tmp_path, tls=tls) as address:
        with pytest.raises(OSError, match="CERTIFICATE_VERIFY_FAILED"):
            Index.load(f"{address}/tiny", timeout_s=30)
        monkeypatch.setenv("SSL_CERT_FILE", certificate)
        monkeypatch.delenv("REQUESTS_CA_BUNDLE", raising=False)  # these two go before it
        monkeypatch.delenv("CURL_CA_BUNDLE", raising=False)
        remote = Index.load(f"{address}/tiny", timeout_s=30)
        remote.verify()
    assert remote == replace(index, location=f"{address}/tiny", timeout_s=30)


@pytest.mark.parametrize(("bad_answers", "found"), [(2, True), (99, False)])
@pytest.mark.parametrize("failure", ["cut", "503", "429"])
def test_a_failed_transfer_is_tried_again_then_named(tmp_path, monkeypatch, failure, bad_answers, found):
    answers = []

    class Unsteady(Quiet):
        def do_GET(self):
            answers.append(self.path)
            if len(answers) > bad_answers:
                return super().do_GET()
            if failure != "cut":
                return self.send_error(int(failure))
            self.send_response(200)
            self.send_header("Content-Length", "10240")
            self.end_headers()
            self.wfile.write(b"x" * 100)

    monkeypatch.setenv("no_proxy", "*")
    index = make_index(tmp_path)
    with served(tmp_path / "tiny", Unsteady) as address:
        remote = replace(index, location=address, timeout_s=30 if found else 1)
        if found:
            assert len(read_shard(remote, index.shards["train"][0][0])) == 3 == len(answers)
        else:
            with pytest.raises(ShardUnavailableError, match=r"train/0000-000\.tar: cannot be read"):
                read_shard(remote, index.shards["train"][0][0])
    assert len(answers) >= 2


def test_a_server_that_dies_and_comes_back_costs_nothing_but_time(tmp_path, monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    index = make_index(tmp_path)
    with served(tmp_path / "tiny") as address:
        port = int(address.rsplit(":", 1)[1])
        assert len(read_shard(replace(index, location=address), index.shards["train"][0][0])) == 3
    with pytest.raises(OSError):
        read_bytes(f"{address}/index.json", timeout_s=0.3)  # it is gone

    def come_back():
        time.sleep(1.5)
        stack.enter_context(served(tmp_path / "tiny", port=port))

    with ExitStack() as stack:
        back = threading.Thread(target=come_back)
        back.start()
        samples = read_shard(replace(index, location=address, timeout_s=60), index.shards["train"][0][0])
        back.join()
    assert len(samples) == 3


class Stalling(Quiet):
    """Sends a byte now and then, for ever: no read of the socket ever times out."""

    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        with contextlib.suppress(OSError):
            while True:
                self.wfile.write(b"x")
                time.sleep(0.05)


def test_a_server_or_command_that_trickles_or_stalls_ends_in_time(tmp_path, monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    index = make_index(tmp_path)
    shard = index.shards["train"][0][0]
    with served(tmp_path, Stalling) as address:
        started = time.monotonic()
        with pytest.raises(ShardUnavailableError, match="cannot be read: only"):
            read_shard(replace(index, location=address, timeout_s=1.5), shard)
    piped = replace(index, location="pipe:sleep 100 | cat; : {}", allow_pipe=True, timeout_s=1.5)
    with pytest.raises(ShardUnavailableError, match="the command took longer"):
        read_shard(piped, shard)
    assert time.monotonic() - started < 60  # not for ever


def test_no_more_is_read_than_a_shard_has(tmp_path, monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    sent = []

    class Endless(Quiet):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()
            with contextlib.suppress(OSError):
                while True:
                    sent.append(self.wfile.write(b"x" * (1 << 20)))

    index = make_index(tmp_path)
    with served(tmp_path, Endless) as address, pytest.raises(ShardError, match=r"the index says (\d+) bytes"):
        read_shard(replace(index, location=address), index.shards["train"][0][0])
    assert len(sent) < 64


@pytest.mark.parametrize("answer", ["refused", "silent"])
def test_a_server_is_asked_until_the_time_is_over_and_not_longer(monkeypatch, answer):
    """A clock that we wind: pauses stay short, and no attempt begins that could end after the time."""
    now, pauses, begun = [0.0], [], []

    def wind(seconds):
        now[0] += seconds

    def get(self, url, timeout, **_):
        begun.append(now[0])
        if answer == "silent":
            wind(timeout)  # for the connection
            wind(timeout)  # for the headers
            raise requests.ReadTimeout("timed out")
        raise requests.ConnectionError("refused")

    clock = SimpleNamespace(monotonic=lambda: now[0], sleep=lambda seconds: (pauses.append(seconds), wind(seconds)))
    monkeypatch.setattr(download, "time", clock)
    monkeypatch.setattr(requests.Session, "get", get)
    with pytest.raises(OSError):
        read_bytes("http://host/shard", timeout_s=120)
    assert 90 < begun[-1] <= now[0] <= 120 and max(pauses) <= 5
    assert max(b - a for a, b in pairwise(begun)) <= (5 if answer == "refused" else 5 + 24)


def test_every_failed_attempt_is_told_and_tells_no_secret(caplog):
    for _ in range(2):
        with pytest.raises(OSError), caplog.at_level("WARNING"):
            read_bytes("http://127.0.0.1:1/shard?token=abcdef", timeout_s=1)
    assert caplog.text.count("attempt 1 failed") == 2 and "abcdef" not in caplog.text


def test_a_cut_index_gives_a_clear_error(tmp_path, monkeypatch):
    class Cut(Quiet):
        def do_GET(self):
            self.send_response(200)
            self.send_header("Content-Length", "10240")
            self.end_headers()
            self.wfile.write(b"{" * 100)

    monkeypatch.setenv("no_proxy", "*")
    with served(tmp_path, Cut) as address:
        cfg = SimpleNamespace(tasks=TaskConfig(), data=DataConfig(url=address, timeout_s=0.5))
        with pytest.raises(OSError, match=r"/index\.json: cannot be read: .*(IncompleteRead.* 10140 more expected|timed out)"):
            open_tasks(cfg, World.alone())


@pytest.mark.parametrize(
    ("of", "to", "is_followed"),
    [
        ("http://host/a", "/b", True),
        ("http://host/a", "https://host/b", True),
        ("http://host/a", "http://169.254.169.254/secret", False),
        ("http://host/a", "//other/b", False),
        ("http://host/a", "http://host:8080/b", False),
        ("https://host/a", "http://host/b", False),
        ("http://host/a", "file:///etc/passwd", False),
    ],
)
def test_a_redirect_stays_on_its_host(monkeypatch, no_second_attempt, of, to, is_followed):
    asked = []

    def send(self, request, **_):
        asked.append(request.url)
        response = requests.Response()
        response.url, response.request, response.raw = request.url, request, io.BytesIO(b"")
        response.raw.read1 = lambda size: b""
        response.status_code = 302 if len(asked) == 1 else 200
        response.headers["Location"] = to
        return response

    monkeypatch.setattr(requests.adapters.HTTPAdapter, "send", send)
    if is_followed:
        assert read_bytes(of, timeout_s=5) == b"" and len(asked) == 2
    else:
        with pytest.raises(OSError, match=r"redirects to .*; give that address as data\.url"):
            read_bytes(of, timeout_s=5)
        assert asked == [of]


@pytest.mark.parametrize("address", ["http://127.0.0.1:port/a", "http:///a", "https://[::1/a"])
def test_an_impossible_address_is_not_tried_again(no_second_attempt, address):
    with pytest.raises((OSError, ValueError)):
        read_bytes(address, timeout_s=120)


def test_other_kinds_of_addresses_are_refused():
    with pytest.raises(ValueError, match=r"data\.url='gs://bucket/shard': give a folder, an http\(s\) address or a `pipe:` command"):
        read_bytes("gs://bucket/shard", allow_pipe=True, timeout_s=120)


def bomb_of(kind: str) -> bytes:
    """A small file that would need much memory: 10 GB by a member's header or by a hole in a sparse member, or 200 MB compressed."""
    if kind == "gzip":
        return gzip.compress(b"\0" * (200 << 20), 1)
    info = tarfile.TarInfo("a.png")
    info.size = 10 << 30
    if kind == "header":
        return info.tobuf(tarfile.USTAR_FORMAT if info.size < 8 << 30 else tarfile.GNU_FORMAT) + b"x" * 10240
    info.size, info.type = 512, tarfile.GNUTYPE_SPARSE
    header = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    header[386:410] = b"00000000000\0" + b"00000001000\0"  # 512 bytes of data at 0, then a hole
    header[483:495] = b"120000000000"  # 10 GB in all
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header) + b"x" * 512 + b"\0" * 1024


def test_a_shard_is_parsed_once(tmp_path, monkeypatch):
    opened, whole = [], tarfile.open
    index = make_index(tmp_path)
    monkeypatch.setattr(files.tarfile, "open", lambda *args, **options: opened.append(1) or whole(*args, **options))
    assert len(read_shard(index, index.shards["train"][0][0])) == 3 and len(opened) == 1


@pytest.mark.parametrize("kind", ["header", "sparse", "gzip"])
def test_a_small_shard_that_would_be_large_in_memory_is_refused(tmp_path, kind):
    index, shard = shard_of(tmp_path, [])
    content = bomb_of(kind)
    (tmp_path / shard.path).write_bytes(content)
    shard = replace(shard, bytes=len(content), sha256=hashlib.sha256(content).hexdigest())

    def read():
        words = "not an uncompressed .tar" if kind == "gzip" else "the member 'a.png' claims 10,737,418,240 bytes"
        with pytest.raises(ShardError, match=f"refused: .*{words}"):
            read_shard(index, shard)

    assert peak_mib(read) < 100


def test_keys_survive_dots_spaces_length_and_repetition(tmp_path):
    names = ["a b/x.y.z", "a b/x.y z", "../up", "é" * 300, "l" * 300, ".hidden"]
    raw = RawSet(["one"], [Found("train", name.rpartition("/")[0], f"{name}.png", lambda: png(8), 0) for name in names])
    index = write_shards(raw, DataConfig(encoding="original", root=str(tmp_path)))
    samples = read_shard(index, index.shards["train"][0][0])
    assert [sample.key for sample in samples] == ["a_b/x_y_z", "a_b/x_y_z--2", "up", "sample", "l" * 80, "hidden"]


def test_a_key_that_looks_like_a_repetition_is_given_once():
    samples = [Found("train", "a", f"a/{name}", bytes) for name in ("x--2.png", "x.jpg", "x.png", "x.webp")]
    assert list(unique_keys(samples)) == ["a/x--2", "a/x", "a/x--3", "a/x--4"]


def test_the_verify_command_reports_damaged_shards_by_its_exit_status(tmp_path, monkeypatch, capsys):
    def run_verify(*options: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["verify", "data=folder", "data.name=tiny", f"data.root={tmp_path}", *options])
        try:
            verify.main()
        except SystemExit as end:
            return end.code, " ".join(capsys.readouterr().err.split())
        return 0, " ".join(capsys.readouterr().out.split())

    make_index(tmp_path)
    status, output = run_verify()
    assert status == 0 and "every shard as it was written" in output
    path = tmp_path / "tiny/train/0000-000.tar"
    path.write_bytes(path.read_bytes()[:1000])
    status, output = run_verify()
    assert status == 1 and output.startswith("error: 1 of 16 shards are damaged")
    status, output = run_verify("data.name=other")
    assert status == 2 and "build the shards first" in output and "Traceback" not in output
