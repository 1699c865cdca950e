"""What a disk has after a power cut: no more than was waited for with fsync."""

import os
from pathlib import Path

import pytest


class Disk:
    """Follows every fsync below a folder, and can say what would be left of it if the power went now.

    All that lies in the folder when it is first followed is on the disk already.
    """

    def __init__(self, root: Path, patch: pytest.MonkeyPatch) -> None:
        self._root = root
        self._held: dict[int, int] = {}  # inode -> a descriptor, so that no other file gets its number
        self._data: dict[int, bytes] = {}
        self._names: dict[int, dict[str, tuple[int, bool]]] = {}
        self._fsync = os.fsync
        for path in (root, *root.rglob("*")):
            descriptor = os.open(path, os.O_RDONLY)
            self._note(descriptor)
            os.close(descriptor)
        patch.setattr(os, "fsync", self._synced)

    def left(self, target: Path, unsynced_names: bool) -> Path:
        """Copy to `target` what is left. Of data that nobody waited for, nothing: such a file is empty.

        unsynced_names: whether all changes of names that nobody waited for have reached it, or none; a file system may do either.
        """
        self._copy(self._root.stat().st_ino, self._root if unsynced_names else None, target)
        return target

    def _copy(self, inode: int, now: Path | None, target: Path) -> None:
        target.mkdir()
        for name, (child, is_folder) in (_names_in(now) if now else self._names.get(inode, {})).items():
            if is_folder:
                self._copy(child, now / name if now else None, target / name)
            else:
                (target / name).write_bytes(self._data.get(child, b""))

    def _synced(self, descriptor: int) -> None:
        self._fsync(descriptor)
        self._note(descriptor)

    def _note(self, descriptor: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        if path != self._root and self._root not in path.parents:
            return
        inode = os.fstat(descriptor).st_ino
        if inode not in self._held:
            self._held[inode] = os.dup(descriptor)
        if path.is_dir():
            self._names[inode] = _names_in(path)
        else:
            self._data[inode] = path.read_bytes()

    def close(self) -> None:
        """Let go of the files."""
        for descriptor in self._held.values():
            os.close(descriptor)
        self._held.clear()


def _names_in(folder: Path) -> dict[str, tuple[int, bool]]:
    return {entry.name: (entry.inode(), entry.is_dir()) for entry in os.scandir(folder)}
