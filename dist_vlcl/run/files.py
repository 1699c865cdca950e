"""Files that survive an interruption: durable writes, and files with one sealed JSON object per line."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dist_vlcl.reading import read_lines, seal, to_line


def write_durably(path: Path, data: bytes) -> None:
    """Write `data` to a new file and wait until the disk has it. An OSError names the file."""
    with open(path, "xb", buffering=0) as file, _naming(path):
        _write_all(file, data)
        os.fsync(file.fileno())


def sync_folder(path: Path) -> None:
    """Wait until the disk has the names in a folder; the fsync of a file does not cover its name."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_folder(path: Path) -> None:
    """Create a folder with its missing parents, and wait until the disk has their names."""
    if not path.is_dir():
        make_folder(path.parent)
        path.mkdir(exist_ok=True)
        sync_folder(path.parent)


def replace_file(path: Path, content: str | bytes, check: Callable[[Path], object] | None = None) -> None:
    """Write a file so that a reader sees the old content or the new content, never a part of it. `check` reads it before it is seen."""
    aside = path.with_name(path.name + ".tmp")
    aside.unlink(missing_ok=True)  # of a killed process; a link must not be followed
    try:
        write_durably(aside, content.encode() if isinstance(content, str) else content)
        if check:
            check(aside)
        os.replace(aside, path)
    except (OSError, RuntimeError):
        aside.unlink(missing_ok=True)  # a full disk gets its space back
        raise
    sync_folder(path.parent)


class JsonLines:
    """An append-only file with one sealed JSON object per line.

    The operating system has a line when `append` returns: it survives kill -9. The disk has it after `sync`: it survives a power cut.
    """

    def __init__(self, path: Path, form: Any, keep: Callable[[dict[str, Any]], bool]) -> None:
        """Open the file; first remove the records that `keep` refuses, and lines that are damaged or cut off."""
        self.kept = [record for record in read_lines(path, form) if keep(record)]
        replace_file(path, "".join(map(to_line, self.kept)))
        self._file = open(path, "ab", buffering=0)  # noqa: SIM115, it stays open as long as the run

    def append(self, record: dict[str, Any]) -> None:
        """Write one line. Raises OSError on a full disk."""
        with _naming(self._file.name):
            _write_all(self._file, to_line(seal(record)).encode())

    def sync(self) -> None:
        """Wait until the disk has every line. Raises OSError if it cannot take them."""
        with _naming(self._file.name):
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file. A second call does nothing."""
        self._file.close()


@contextmanager
def _naming(path: object) -> Iterator[None]:
    """Add the file's name to an OSError of a write, which has none."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


def _write_all(file: Any, data: bytes) -> None:
    while data:  # a raw write may take only a part; the next one then raises the reason
        data = data[file.write(data) :]
