"""Files of one JSON object a line that grow with a run and shrink back when it resumes from earlier."""

import json
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dist_vlcl.run.files import replace_file

PATIENCE = 3  # writes in a row that may fail before the run stops


class JsonLines:
    """An append-only file whose every line is with the system before `append` returns, and on the disk after `sync`.

    On a full disk lines wait, and go out with the next that can be written; the third failure in a row is raised.
    """

    def __init__(self, path: Path, keep: Callable[[dict[str, Any]], bool]) -> None:
        """Open the file, first removing what `keep` refuses and lines that an interruption has cut off."""
        self.kept = [record for record in read_lines(path) if keep(record)]
        replace_file(path, "".join(map(line_of, self.kept)))
        self._file = open(path, "ab", buffering=0)  # noqa: SIM115, it stays open as long as the run
        self._waiting, self._failures = b"", 0
        self._size, self._unsynced = path.stat().st_size, bytearray()  # what the disk is known to have, and what was written since

    def append(self, record: dict[str, Any]) -> None:
        """Write one line."""
        self._waiting += line_of(record).encode()
        try:
            self._write()
        except OSError as error:
            self._failures += 1
            if self._failures >= PATIENCE:
                raise
            warnings.warn(f"{self._file.name}: {error}; trying again with the next line", RuntimeWarning, stacklevel=2)

    def sync(self) -> None:
        """Wait until the disk has every line; raises OSError where it cannot."""
        self._write()
        try:
            os.fsync(self._file.fileno())
        except OSError:  # is told once; the next fsync would call good what was lost
            self._waiting, self._unsynced = bytes(self._unsynced), bytearray()
            self._file.truncate(self._size)
            raise
        self._size, self._unsynced = self._size + len(self._unsynced), bytearray()

    def close(self) -> None:
        """Write what still waits, and no more; harmless when repeated."""
        if not self._file.closed:
            try:
                self._write()
            except OSError as error:
                warnings.warn(f"{self._file.name}: {error}; its last lines are lost", RuntimeWarning, stacklevel=2)
            self._file.close()

    def _write(self) -> None:
        while self._waiting:
            count = self._file.write(self._waiting)
            self._unsynced += self._waiting[:count]
            self._waiting = self._waiting[count:]
        self._failures = 0


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The records of a file, without lines that are not whole; none where there is no file."""
    if not path.exists():
        return []
    records = map(_parsed, path.read_text(errors="replace").splitlines())
    return [record for record in records if isinstance(record, dict)]


def _parsed(line: str) -> Any:
    try:
        return json.loads(line)
    except ValueError:
        return None


def line_of(record: dict[str, Any]) -> str:
    """A record as the line that holds it; tensors and NumPy numbers become numbers."""
    return json.dumps(record, default=_number) + "\n"


def _number(value: Any) -> Any:
    return value.tolist() if hasattr(value, "tolist") else str(value)
