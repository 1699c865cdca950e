"""The journal: one line a step with its seed and accepted coefficients, from which the zeroth-order units can be rebuilt.

    {"step": 7, "task": 0, "seed": 8, "lr": 0.1, "moves": [{"group": "vision", "projected_gradient": ..., "coefficient": ...}], "crc": "…"}

A step's line is the last that is written of it, and is with the system before the next step begins: it survives kill -9.
A power cut may take the lines after the last checkpoint. The CRC-32 of the rest of the line tells a damaged line from a whole one.
"""

import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dist_vlcl.run.jsonl import line_of, read_lines

FILE = "journal.jsonl"


def sealed(record: dict[str, Any]) -> dict[str, Any]:
    """Return a record, its tensors as numbers, with the checksum that its line carries."""
    record = json.loads(line_of(record))
    return {**record, "crc": _checksum(record)}


def read_after(folder: Path, step: int) -> Iterator[dict[str, Any]]:
    """Yield the records that follow a step, one after another, up to the first that is missing, damaged or cut off."""
    for record in read_lines(folder / FILE):
        if record.get("step", 0) <= step:
            continue
        if record["step"] != step + 1 or not is_whole(record):
            return
        yield record
        step += 1


def is_whole(record: dict[str, Any]) -> bool:
    """Whether a record is the one that was sealed."""
    return record.get("crc") == _checksum({key: value for key, value in record.items() if key != "crc"})


def bytes_per_step(folder: Path) -> float:
    """Return the mean length of a line in bytes; 0 where there is none."""
    lines = len(read_lines(folder / FILE))
    return (folder / FILE).stat().st_size / lines if lines else 0.0


def _checksum(record: dict[str, Any]) -> str:
    return f"{zlib.crc32(line_of(record).encode()):08x}"
