import contextlib
import gzip
import hashlib
import io
import json
import shutil
import ssl
import subprocess
import sys
import tarfile
import threading
import time
from contextlib import ExitStack
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import requests

from dist_vlcl.commands import verify
from dist_vlcl.data import download, shards
from dist_vlcl.data.settings import DataConfig
from dist_vlcl.data.shards import Index, RawSample, RawSet, Shard, ShardError, build_command, decode, read_bytes, read_shard, write_shards
from dist_vlcl.dist.world import World
from dist_vlcl.experiment import open_tasks
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
    read = {sample.key: sample.image for shard in index.shards["train"][1] for sample in read_shard(index, shard)[0]}
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
    stored = [sample for shard in index.shards["train"][1] for sample in read_shard(index, shard)[0]]
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
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tiny"]  # nothing left beside it


def test_equal_sets_give_equal_bytes(tmp_path):
    one, two, other = make_index(tmp_path / "a"), make_index(tmp_path / "b"), make_index(tmp_path / "c", train=6)
    assert one.fingerprint == two.fingerprint != other.fingerprint
    assert (tmp_path / "a/tiny/index.json").read_bytes() == (tmp_path / "b/tiny/index.json").read_bytes()


def test_shards_are_those_of_version_0_1(tmp_path):
    """Format 1: the same raw set still gives the same bytes and index."""
    index = make_index(tmp_path, num_classes=2, pixels=True)
    assert index.fingerprint == "c7b8e14a1d95707d277c6788cae165fde27716cda3695eb9bbc84355c3faf9b9"


def test_a_failed_write_leaves_nothing(tmp_path):
    def fail():
        raise OSError("disk")

    raw = raw_set(1)
    with pytest.raises(OSError, match="disk"):
        write_shards(RawSet(raw.class_names, [raw.samples[0]._replace(read=fail)]), DataConfig(root=str(tmp_path)))
    assert list(tmp_path.iterdir()) == []


def test_the_slower_of_two_writers_keeps_the_first_ones_folder(tmp_path):
    index = make_index(tmp_path)
    assert make_index(tmp_path).fingerprint == index.fingerprint
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tiny"]


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
    samples, problem = read_shard(index, index.shards["train"][1][0])
    assert "train/0001-000.tar: the index says 3 samples" in str(problem) and f"found {len(samples)} in" in str(problem)


TWO = [("a.cls", b"0"), ("a.png", png(8)), ("b.cls", b"0"), ("b.png", png(8))]


@pytest.mark.parametrize(
    ("members", "damage", "found", "words"),
    [
        ([*TWO[:2], *TWO[:2]], lambda tar: tar, 1, "duplicate file name"),
        (TWO, lambda tar: b"\xa5" * len(tar), 0, "invalid header"),
        (TWO, lambda tar: tar[:148] + b"zzzzzz" + tar[154:], 0, "invalid header"),
        (TWO, lambda tar: tar[: 2048 + 148] + b"zzzzzz" + tar[2048 + 154 :], 1, "found 1"),
        (TWO, lambda tar: tar[:2048], 1, "found 1"),
    ],
    ids=["duplicate key", "garbage", "bad header", "bad header inside", "cut between two samples"],
)
def test_damage_is_noticed_even_where_the_index_has_the_hash_of_the_damaged_shard(tmp_path, members, damage, found, words):
    index, shard = shard_of(tmp_path, members, count=2)
    content = damage((tmp_path / shard.path).read_bytes())
    (tmp_path / shard.path).write_bytes(content)
    samples, problem = read_shard(index, replace(shard, bytes=len(content), sha256=hashlib.sha256(content).hexdigest()))
    assert len(samples) == found and "train/0000-000.tar: the index says 2 samples" in str(problem) and words in str(problem)


@pytest.mark.parametrize("suffix", ["pkl", "pth", "pyd", "png.pkl", "PKL", "json"])
def test_members_other_than_labels_and_images_are_refused(tmp_path, suffix):
    index, shard = shard_of(tmp_path, [("a.cls", b"0"), ("a.png", png(8)), (f"a.{suffix}", b"cos\nsystem\n.")])
    with pytest.raises(ShardError, match=r"train/0000-000\.tar: refused, a\..* is neither a label"):
        read_shard(index, shard)


@pytest.mark.parametrize("name", ["../a", "b/../../a", "/etc/a"])
def test_names_that_lead_out_are_refused(tmp_path, name):
    index, shard = shard_of(tmp_path, [(f"{name}.cls", b"0"), (f"{name}.png", png(8))])
    with pytest.raises(ShardError, match="leads out of the shard"):
        read_shard(index, shard)


def test_a_shard_of_another_class_is_refused(tmp_path):
    index, shard = shard_of(tmp_path, [("a.cls", b"7"), ("a.png", png(8))])
    with pytest.raises(ShardError, match="a is labelled b'7'"):
        read_shard(index, shard)


def test_a_sound_handmade_shard_is_read(tmp_path):
    index, shard = shard_of(tmp_path, [("a.cls", b"0\n"), ("a.PNG", png(8))])
    assert read_shard(index, shard) == ([("a", png(8))], None)


@pytest.mark.parametrize("path", ["../x.tar", "train/0000-000.tar;rm", "/train/0000-000.tar", "pipe:ls"])
def test_an_index_cannot_lead_out_of_its_folder(tmp_path, path):
    index = make_index(tmp_path)
    content = json.loads((tmp_path / "tiny/index.json").read_text())
    content["shards"]["train"][0][0]["path"] = path
    (tmp_path / "tiny/index.json").write_text(json.dumps(content))
    with pytest.raises(ShardError, match="the path of a shard has the form"):
        Index.load(index.location)


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
        cfg = SimpleNamespace(data=DataConfig(name="tiny", reader="folder", root=str(tmp_path)))
        with pytest.raises(ValueError, match=r"tiny/index\.json: damaged \(.*build the shards, again"):
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
        read_bytes("pipe:cat /nonexistent", allow_pipe=True)


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
        _, problem = read_shard(remote, remote.shards["train"][0][0])
        assert "train/0000-000.tar: cannot be read: 404 Client Error" in str(problem)


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
        samples, problem = read_shard(remote, index.shards["train"][0][0])
    assert len(answers) >= 2 and (len(answers) == 3 or not found)
    assert (len(samples), problem is None) == ((3, True) if found else (0, False))
    assert found or "train/0000-000.tar: cannot be read" in str(problem)


def test_a_server_that_dies_and_comes_back_costs_nothing_but_time(tmp_path, monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    index = make_index(tmp_path)
    with served(tmp_path / "tiny") as address:
        port = int(address.rsplit(":", 1)[1])
        assert read_shard(replace(index, location=address), index.shards["train"][0][0])[1] is None
    with pytest.raises(OSError):
        read_bytes(f"{address}/index.json", timeout_s=0.3)  # it is gone

    def come_back():
        time.sleep(1.5)
        stack.enter_context(served(tmp_path / "tiny", port=port))

    with ExitStack() as stack:
        back = threading.Thread(target=come_back)
        back.start()
        samples, problem = read_shard(replace(index, location=address, timeout_s=60), index.shards["train"][0][0])
        back.join()
    assert (len(samples), problem) == (3, None)


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
        _, problem = read_shard(replace(index, location=address, timeout_s=1.5), shard)
    assert "cannot be read: only" in str(problem) and time.monotonic() - started < 60  # not for ever
    started = time.monotonic()
    piped = replace(index, location="pipe:sleep 100 | cat; : {}", allow_pipe=True, timeout_s=1.5)
    assert "the command took longer" in str(read_shard(piped, shard)[1]) and time.monotonic() - started < 60  # not for ever


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
    with served(tmp_path, Endless) as address:
        _, problem = read_shard(replace(index, location=address), index.shards["train"][0][0])
    assert "the index says 3 samples" in str(problem) and len(sent) < 64


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


def test_a_log_of_failed_attempts_holds_no_secret(caplog):
    with pytest.raises(OSError), caplog.at_level("WARNING"):
        read_bytes("http://127.0.0.1:1/shard?token=abcdef", timeout_s=1)
    assert "attempt 1 failed" in caplog.text and "abcdef" not in caplog.text


def test_a_cut_index_gives_a_clear_error(tmp_path, monkeypatch):
    class Cut(Quiet):
        def do_GET(self):
            self.send_response(200)
            self.send_header("Content-Length", "10240")
            self.end_headers()
            self.wfile.write(b"{" * 100)

    monkeypatch.setenv("no_proxy", "*")
    with served(tmp_path, Cut) as address:
        cfg = SimpleNamespace(data=DataConfig(url=address, timeout_s=0.5))
        with pytest.raises(OSError, match=r"/index\.json: cannot be read: .*IncompleteRead.* 10140 more expected"):
            open_tasks(cfg, World.alone())


@pytest.mark.parametrize("address", ["http://127.0.0.1:port/a", "http:///a", "https://[::1/a"])
def test_an_impossible_address_is_not_tried_again(no_second_attempt, address):
    with pytest.raises((OSError, ValueError)):
        read_bytes(address)


def test_other_kinds_of_addresses_are_refused():
    with pytest.raises(ValueError, match=r"data\.url='gs://bucket/shard': give a folder, an http\(s\) address or a `pipe:` command"):
        read_bytes("gs://bucket/shard", allow_pipe=True)


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
    monkeypatch.setattr(shards.tarfile, "open", lambda *args, **options: opened.append(1) or whole(*args, **options))
    index = make_index(tmp_path)
    opened.clear()
    assert read_shard(index, index.shards["train"][0][0])[1] is None and len(opened) == 1


@pytest.mark.parametrize("kind", ["header", "sparse", "gzip"])
def test_a_small_shard_that_would_be_large_in_memory_is_refused(tmp_path, kind):
    index, shard = shard_of(tmp_path, [])
    content = bomb_of(kind)
    (tmp_path / shard.path).write_bytes(content)
    shard = replace(shard, bytes=len(content), sha256=hashlib.sha256(content).hexdigest())

    def read():
        if kind == "gzip":
            samples, problem = read_shard(index, shard)
            assert samples == [] and "found 0 in" in str(problem)
        else:
            with pytest.raises(ShardError, match=r"refused, the member 'a.png' claims 10,737,418,240 bytes"):
                read_shard(index, shard)

    assert peak_mib(read) < 100


def test_keys_survive_dots_spaces_length_and_repetition(tmp_path):
    names = ["a b/x.y.z", "a b/x.y z", "../up", "é" * 300, "l" * 300, ".hidden"]
    raw = RawSet(["one"], [RawSample("train", 0, name, "png", lambda: png(8)) for name in names])
    index = write_shards(raw, DataConfig(encoding="original", root=str(tmp_path)))
    samples, problem = read_shard(index, index.shards["train"][0][0])
    assert problem is None
    assert [sample.key for sample in samples] == ["a_b/x_y_z", "a_b/x_y_z--2", "up", "sample", "l" * 80, "hidden"]


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
