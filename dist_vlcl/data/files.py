"""Open folders and archives that may be damaged or hostile, and write folders that appear complete or not at all."""

import io
import os
import re
import shutil
import tarfile
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path, PurePosixPath
from typing import IO, Any, NamedTuple

from filelock import FileLock, Timeout

from dist_vlcl.masking import explained
from dist_vlcl.reading import warn

MAX_FILE_BYTES = 1 << 26  # of one file of a source: a small archive can unpack to any size
SPLIT_FOLDERS = {"train": "train", "training": "train"} | dict.fromkeys(("test", "testing", "val", "valid", "validation"), "test")
MEMBER = re.compile(r"((?:.*/)?[^./]+)\.([^/]*)")  # of a WebDataset tar: key and suffix, from the first dot of the file's name
END_BYTES = 1024  # a tar ends in two blocks of zeros

ReadFile = Callable[[], bytes]
Listed = Iterator[tuple[str, Callable[[], Any]]]  # path, and a function that opens the file


class Found(NamedTuple):
    """An image of a source. `read` returns the bytes of its file."""

    split: str | None  # None if the source does not say it, and `read_raw` has not chosen it yet
    folder: str  # of its class
    path: str  # in the source
    read: ReadFile
    class_id: int = -1  # `read_raw` gives it

    @property
    def short(self) -> str:
        return f"{self.folder}/{PurePosixPath(self.path).name}"

    @property
    def key(self) -> str:
        return re.sub(r"\.[^./]+$", "", self.short)


def check_test_folders(split_file: str | None, folders: Iterable[str]) -> None:
    """Raise ValueError for two folders of test images, such as val/ and test/, unless data.split_file says what to test."""
    if not split_file and len(tests := sorted({name for name in folders if SPLIT_FOLDERS.get(name.lower()) == "test"})) > 1:
        raise ValueError(f"images below {tests[0]}/ and {tests[1]}/ would both be test images: remove one of them, or move it into train/")


def suffix_of(path: str) -> str:
    """Return a path's suffix in small letters, without its dot."""
    return PurePosixPath(path).suffix.lower().lstrip(".")


def open_source(source: Path) -> dict[str, ReadFile]:
    """Return path -> function that reads the file, for every file of a folder, .tar or .zip. Nothing is unpacked.

    Raises FileNotFoundError if there is no source. Raises ValueError for a damaged archive, a compressed tar, two files of one name, and a
    link that leads out of the source. The functions raise ValueError, naming the file, if it is damaged or larger than MAX_FILE_BYTES.
    Several threads can call them.
    """
    if not source.exists():
        raise FileNotFoundError(f"data.source={str(source)!r}: no such file or folder")
    advice = "copy what it names in its place" if source.is_dir() else "get the archive again, or unpack it and give the folder"
    with explained(f"data.source={str(source)!r}", advice, Exception):  # zipfile raises many types of errors for damaged bytes
        files = list(_list_folder(source) if source.is_dir() else _list_archive(source))
        "".join(name for name, _ in files).encode()  # raises for a name that is not UTF-8
        if not all(PurePosixPath(name).parts for name, _ in files):
            raise ValueError("a file has no name")
        if repeated := [name for name, count in Counter(name for name, _ in files).items() if count > 1]:
            raise ValueError(f"{len(repeated)} names come more than once, such as {repeated[0]!r}")
    return {name: partial(_read, source, name, open_file) for name, open_file in files}


def _read(source: Path, name: str, open_file: Callable[[], Any]) -> bytes:
    with explained(f"{source}: damaged at {name!r}", "get it again", Exception), open_file() as file:
        content = file.read(MAX_FILE_BYTES + 1)
    if len(content) > MAX_FILE_BYTES:
        raise ValueError(f"{source}: {name!r} has more than {MAX_FILE_BYTES:,} bytes, the most that a file may have")
    return content


def _list_folder(source: Path) -> Listed:
    root = source.resolve()
    for parent, folders, names in os.walk(source, onerror=_fail):
        for path in (Path(parent, name) for name in (*folders, *names)):
            if path.is_symlink() and not (path.is_file() and path.resolve().is_relative_to(root)):
                raise ValueError(f"the link {str(path)!r} leads to a folder, out of the source or nowhere")
            if path.is_file():
                yield path.relative_to(source).as_posix(), partial(path.open, "rb")
            elif not path.is_dir():
                raise ValueError(f"{str(path)!r} is neither a file nor a folder")


def _fail(error: OSError) -> None:
    raise error


def _list_archive(source: Path) -> Listed:
    file = source.open("rb")  # it stays open while its images are read
    if file.read(2) == b"PK":
        archive = zipfile.ZipFile(file)
        return ((info.filename, partial(archive.open, info)) for info in archive.infolist() if not info.is_dir())
    return ((member.name, partial(_open_member, file, member)) for member in tar_members(file))


def _open_member(file: IO[bytes], member: tarfile.TarInfo) -> IO[bytes]:
    return io.BytesIO(os.pread(file.fileno(), min(member.size, MAX_FILE_BYTES + 1), member.offset_data))  # threads share the file


def tar_members(file: IO[bytes]) -> Iterator[tarfile.TarInfo]:
    """Yield the regular files of an uncompressed tar.

    Raises ValueError for damage that tarfile takes for the end: a wrong checksum of a header, or a file that is cut. Raises it for links,
    devices and sparse files too, and for a member that claims more bytes than there are.
    """
    length = file.seek(0, os.SEEK_END)
    file.seek(0)
    with explained("damaged, or not an uncompressed .tar", kinds=Exception):  # tarfile raises many types of errors for damaged bytes
        tar = tarfile.open(fileobj=file, mode="r:")  # noqa: SIM115 - mode `r:` never decompresses; the caller closes the file
        for member in tar:
            if not 0 <= member.size <= length - member.offset_data:
                raise tarfile.ReadError(f"the member {member.name!r} claims {member.size:,} bytes")
            if member.sparse is not None or not (member.isreg() or member.isdir()):
                raise tarfile.ReadError(f"the member {member.name!r} is no regular file; write the archive with links followed")
            if member.isreg():
                yield member
        file.seek(tar.offset)
        if length - tar.offset < END_BYTES or any(part.strip(b"\0") for part in iter(partial(file.read, 1 << 20), b"")):
            raise tarfile.ReadError(f"invalid header at byte {tar.offset:,}, or the end is missing")


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """Give an empty folder that becomes `target` at the end of the block, or is removed after an error.

    One process at a time writes a target; the others wait. What a killed process has left is removed. Raises FileExistsError if the target
    exists.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    aside = target.parent / f".{target.name}.part"
    lock = FileLock(target.parent / f".{target.name}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        warn(f"waiting for another process that writes {target}")
        lock.acquire()
    try:
        if target.exists():
            raise FileExistsError(f"{target} exists already: choose another data.name or data.root")
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir()
        yield aside
        aside.rename(target)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
        lock.release()
