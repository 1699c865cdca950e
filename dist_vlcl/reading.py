"""Read files that this process has not written. They are data: regular files, of bounded size, of a known form.

A record may be sealed: `crc` is the CRC-32 of its other entries. A sealed record that was damaged is noticed.
"""

import json
import os
import stat
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dist_vlcl.masking import explained, masked

MAX_BYTES = 1 << 32


def read_file(path: Path, limit: int = MAX_BYTES) -> bytes:
    """Return the content of a file. Raises OSError also for a link, a pipe, a device, or more than `limit` bytes."""
    # O_NONBLOCK: without waiting for the writer of a pipe
    with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NOFOLLOW | os.O_NONBLOCK)) as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode) or status.st_size > limit:
            raise OSError(f"{path} is not a regular file of at most {limit:,} bytes")
        return file.read()


def fits(value: Any, form: Any) -> bool:
    """Whether a value has a form: a type; `[form]` of every item; `{key: form}`, with other keys allowed; or a tuple of alternatives.

    `{...: form}` is a form of every value, whatever its key. A key that is missing counts as None. A float may be a whole number; a bool
    is no number. A whole number has 64 bits.
    """
    if isinstance(form, tuple):
        return any(fits(value, one) for one in form)
    if isinstance(form, list):
        return isinstance(value, list) and all(fits(item, form[0]) for item in value)
    if isinstance(form, dict) and ... in form:
        return isinstance(value, dict) and all(fits(one, form[...]) for one in value.values())
    if isinstance(form, dict):
        return isinstance(value, dict) and all(fits(value.get(key), one) for key, one in form.items())
    if type(value) is int and not -(1 << 63) <= value < 1 << 63:  # pandas and torch take no other
        return False
    return value is None if form is None else type(value) in ((int, float) if form is float else (form,))


def parse_json(text: bytes | str, form: Any) -> Any:
    """Return what JSON text holds. Raises ValueError if it is damaged or has another form."""
    try:
        value = json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    for record in value if isinstance(value, list) else [value]:
        if isinstance(record, dict) and "crc" in record and record["crc"] != _checksum(record):
            raise ValueError("its content differs from its CRC-32")
    if not fits(value, form):
        raise ValueError("it has another form than dist_vlcl writes")
    return value


def read_json(path: Path, form: Any, default: Any) -> Any:
    """Return the content of a JSON file, or the default if there is no file. Raises ValueError that names a damaged file."""
    with explained(f"{path} is damaged"):
        try:
            return parse_json(read_file(path), form)
        except FileNotFoundError:
            return default


def or_warn(read: Callable[[], Any], default: Any) -> Any:
    """Return what `read` returns; if that cannot be read, warn, and return the default."""
    try:
        return read()
    except (OSError, ValueError, RuntimeError) as error:
        warn(f"{error}; going on without it")
        return default


def read_lines(path: Path, form: Any) -> list[dict[str, Any]]:
    """Return the records of a file with one JSON object per line. Leaves out damaged lines, with a warning that counts them.

    A last line that an interruption has cut off is no damage.
    """
    records, damaged = [], 0
    lines = read_file(path).split(b"\n") if path.exists() else []
    for number, line in enumerate(lines, 1):
        try:
            records.append(parse_json(line, form))
        except ValueError:
            damaged += number < len(lines)
    if damaged:
        warn(f"{path}: {damaged} damaged lines were left out")
    return records


class UserNote(RuntimeWarning):
    """A warning about the user's files, which is shown without the line of code that gives it."""


_of_python = warnings.formatwarning


warnings.formatwarning = lambda text, kind, *at, **line: f"warning: {text}\n" if kind is UserNote else _of_python(text, kind, *at, **line)


def warn(text: str) -> None:
    """Warn the user, without secrets."""
    warnings.warn(masked(text), UserNote, stacklevel=3)


def to_line(record: dict[str, Any]) -> str:
    """Return a record as its line; tensors and NumPy numbers become numbers."""
    return json.dumps(record, default=lambda value: value.tolist() if hasattr(value, "tolist") else str(value)) + "\n"


def seal(record: dict[str, Any]) -> dict[str, Any]:
    """Return a record with its checksum, and with numbers in place of tensors."""
    record = json.loads(to_line(record))
    return {**record, "crc": _checksum(record)}


def _checksum(record: dict[str, Any]) -> str:
    return f"{zlib.crc32(to_line({key: value for key, value in record.items() if key != 'crc'}).encode()):08x}"
