"""Raw images in a folder, a .tar or a .zip, behind the same two calls. Nothing is ever unpacked."""

import tarfile
import zipfile
import zlib
from pathlib import Path
from typing import Protocol


class Source(Protocol):
    def names(self) -> list[str]:
        """Paths of the files, sorted, with `/`."""
        ...

    def read(self, name: str) -> bytes: ...


class FolderSource:
    def __init__(self, path: Path) -> None:
        self.path = path

    def names(self) -> list[str]:
        return sorted(file.relative_to(self.path).as_posix() for file in self.path.rglob("*") if file.is_file())

    def read(self, name: str) -> bytes:
        return (self.path / name).read_bytes()


class TarSource:
    def __init__(self, path: Path) -> None:
        self.tar = tarfile.open(path, "r:")  # noqa: SIM115 - open as long as its samples are read
        self.members = {member.name: member for member in self.tar if member.isreg()}

    def names(self) -> list[str]:
        return sorted(self.members)

    def read(self, name: str) -> bytes:
        file = self.tar.extractfile(self.members[name])
        assert file is not None  # only regular files are listed
        return file.read()


class ZipSource:
    def __init__(self, path: Path) -> None:
        self.path, self.zip = path, zipfile.ZipFile(path)

    def names(self) -> list[str]:
        return sorted(name for name in self.zip.namelist() if not name.endswith("/"))

    def read(self, name: str) -> bytes:
        try:
            return self.zip.read(name)
        except (zipfile.BadZipFile, zlib.error, EOFError) as error:
            raise ValueError(f"{self.path}: damaged at {name!r} ({error}); get it again") from error


def open_source(path: Path) -> Source:
    """Raises FileNotFoundError, or ValueError for what cannot be read in any order, such as a compressed tar."""
    if path.is_dir():
        return FolderSource(path)
    if not path.exists():
        raise FileNotFoundError(f"data.source={str(path)!r}: no such file or folder")
    if zipfile.is_zipfile(path):
        return ZipSource(path)
    try:
        return TarSource(path)
    except tarfile.ReadError:
        raise ValueError(f"data.source={str(path)!r}: neither a folder, a .zip nor an uncompressed .tar; unpack it first") from None
