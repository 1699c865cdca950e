"""Sources that may be damaged or hostile: every image that they hold is found, or the source is refused."""

import io
import os
import random
import tarfile
import zipfile
from pathlib import Path

import pytest

from dist_vlcl.data import files
from dist_vlcl.data.files import open_source
from tests.helpers import mutate
from tests.helpers.memory import peak_mib
from tests.helpers.shards import png

IMAGES = {f"{name}/{number}.png": png(8, name, number) for name in ("cat", "dog") for number in range(3)}


def tar_of(images: dict[str, bytes], *members: tarfile.TarInfo, **options) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", **options) as tar:
        for name, content in images.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
        for member in members:
            tar.addfile(member)
    return stream.getvalue()


def zip_of(images: dict[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", method) as archive:
        for name, content in images.items():
            archive.writestr(name, content)
    return stream.getvalue()


def read_all(path: Path) -> dict[str, bytes]:
    return {name: read() for name, read in open_source(path).items()}


@pytest.mark.parametrize("options", [{"format": f} for f in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)])
def test_sound_archives_of_every_format_are_read(tmp_path, options):
    images = {**IMAGES, "é" * 40 + "/1.png": b"", "x" * 90 + "/" + "y" * 90 + ".png": b"a long name"}
    (tmp_path / "x.tar").write_bytes(tar_of(images, **options))
    (tmp_path / "x.zip").write_bytes(zip_of(images))
    assert read_all(tmp_path / "x.tar") == read_all(tmp_path / "x.zip") == images


def test_a_flipped_bit_in_a_header_of_a_tar_loses_no_image_in_silence(tmp_path):
    """tarfile takes a header with a wrong checksum for the end, and returns the images before it."""
    whole, path, refused = tar_of(IMAGES), tmp_path / "x.tar", 0
    headers = [at for at in range(0, len(whole), 512) if whole[at + 257 : at + 262] == b"ustar"]
    assert len(headers) == 6
    for at in headers:
        for byte in (*range(0, 10), 100, 124, 130, 135, 148, 153, 156, 257, 345, 500):
            path.write_bytes(mutate.flip_bit(whole, 8 * (at + byte) + byte % 8))
            try:
                assert read_all(path) == IMAGES
            except ValueError as error:
                assert "x.tar': damaged, or not an uncompressed .tar" in str(error)
                refused += 1
    assert refused > 100


@pytest.mark.parametrize("make", [tar_of, zip_of])
def test_a_cut_archive_is_refused(tmp_path, make):
    whole = make(IMAGES)
    end = len(whole.rstrip(b"\0")) + 1023 if make is tar_of else len(whole) - 1
    for length in (0, 1, 512, 700, 1024, 1536, len(whole) // 2, end - 512, end):
        (tmp_path / "x").write_bytes(whole[:length])
        with pytest.raises(ValueError, match="get the archive again, or unpack it"):
            read_all(tmp_path / "x")


@pytest.mark.parametrize("make", [tar_of, zip_of])
def test_mutated_archives_are_read_whole_or_refused(tmp_path, make):
    """Flipped bits in headers, cuts, swapped and zeroed blocks. The content of a tar's files has no checksum."""
    whole, path = make(IMAGES), tmp_path / "x"
    for seed in range(150):
        path.write_bytes(mutate.mutated(whole, random.Random(seed)))
        try:
            found = read_all(path)
        except (ValueError, FileNotFoundError):
            continue
        assert set(found) == set(IMAGES) if make is tar_of else found == IMAGES, seed


def link(name: str, target: str, kind: bytes = tarfile.SYMTYPE) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


@pytest.mark.parametrize(
    "member", [link("cat/9.png", "/etc/passwd"), link("cat/9.png", "cat/0.png", tarfile.LNKTYPE), link("p", "", tarfile.FIFOTYPE)]
)
def test_a_tar_with_anything_but_files_and_folders_is_refused(tmp_path, member):
    (tmp_path / "x.tar").write_bytes(tar_of(IMAGES, member))
    with pytest.raises(ValueError, match=f"the member {member.name!r} is no regular file"):
        open_source(tmp_path / "x.tar")


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_a_name_that_comes_twice_is_refused(tmp_path):
    (tmp_path / "x.tar").write_bytes(tar_of(IMAGES, tarfile.TarInfo("cat/0.png")))
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.writestr("cat/0.png", b"one")
        archive.writestr("cat/0.png", b"other")
    for path in (tmp_path / "x.tar", tmp_path / "x.zip"):
        with pytest.raises(ValueError, match=r"1 names come more than once, such as 'cat/0\.png'"):
            open_source(path)


def test_a_tar_with_a_file_without_a_name_is_refused(tmp_path):
    """Found by tools/fuzz.py, input 1667."""
    (tmp_path / "x.tar").write_bytes(tar_of(IMAGES, tarfile.TarInfo("")))
    with pytest.raises(ValueError, match="a file has no name"):
        open_source(tmp_path / "x.tar")


@pytest.mark.parametrize("target", ["../outside/1.png", "/etc/passwd", "../outside", "nowhere.png", ".."])
def test_a_link_that_leads_out_of_a_folder_is_refused(tmp_path, target):
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside/1.png").write_bytes(png(8))
    (tmp_path / "s/cat").mkdir(parents=True)
    (tmp_path / "s/cat/0.png").write_bytes(png(8))
    (tmp_path / "s/again.png").symlink_to("cat/0.png")
    assert sorted(read_all(tmp_path / "s")) == ["again.png", "cat/0.png"]  # a link within the source is a file like others
    (tmp_path / "again").symlink_to("s")
    assert sorted(read_all(tmp_path / "again")) == ["again.png", "cat/0.png"]  # so is a link to the source itself
    (tmp_path / "s/link").symlink_to(target)
    with pytest.raises(ValueError, match=r"the link '.*s/link' leads to a folder, out of the source or nowhere"):
        open_source(tmp_path / "s")


def test_a_name_that_is_not_utf_8_is_refused_with_the_source(tmp_path):
    (tmp_path / "x.tar").write_bytes(tar_of({"\udcff/1.png": b""}))
    with pytest.raises(ValueError, match=r"x\.tar': 'utf-8' codec can't encode"):
        open_source(tmp_path / "x.tar")


def test_a_pipe_among_the_images_of_a_folder_is_refused(tmp_path):
    (tmp_path / "cat").mkdir()
    os.mkfifo(tmp_path / "cat/1.png")
    with pytest.raises(ValueError, match=r"cat/1\.png' is neither a file nor a folder"):
        open_source(tmp_path)


def test_a_folder_that_cannot_be_listed_is_not_left_out(tmp_path, monkeypatch):
    """os.walk passes over it in silence."""
    (tmp_path / "s/cat").mkdir(parents=True)
    scandir = os.scandir

    def refuse(path):
        if Path(path).name == "cat":
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(ValueError, match=r"Permission denied: '.*s/cat'"):
        open_source(tmp_path / "s")


def test_a_small_zip_that_unpacks_to_gigabytes_takes_no_memory(tmp_path):
    path = tmp_path / "bomb.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive, archive.open("cat/1.png", "w") as file:
        for _ in range(12):
            file.write(bytes(1 << 24))
    (tmp_path / "s").mkdir()
    with open(tmp_path / "s/hole.png", "wb") as file:
        file.truncate(3 << 30)

    def refused():
        for source, name in ((path, "cat/1.png"), (tmp_path / "s", "hole.png")):
            with pytest.raises(ValueError, match=f"{name}' has more than 67,108,864 bytes"):
                open_source(source)[name]()

    assert peak_mib(refused) < 2.5 * files.MAX_FILE_BYTES / (1 << 20)


def test_a_zip_at_the_end_of_a_tar_does_not_hide_the_tar(tmp_path):
    (tmp_path / "x.tar").write_bytes(tar_of({**IMAGES, "other.zip": zip_of({"dog/9.png": b""})}))
    assert set(open_source(tmp_path / "x.tar")) == {*IMAGES, "other.zip"}


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_a_damaged_member_of_a_zip_names_the_archive_and_itself(tmp_path, method):
    path = tmp_path / "all.zip"
    with zipfile.ZipFile(path, "w", method) as archive:
        archive.writestr("cat/1.png", bytes(range(256)) * 8)
    content = bytearray(path.read_bytes())
    content[60:80] = b"\xff" * 20
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"all\.zip: damaged at 'cat/1\.png'"):
        open_source(path)["cat/1.png"]()
