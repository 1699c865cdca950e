"""Writing files that survive an interruption at any instruction."""

import os
from pathlib import Path


def write_durably(path: Path, data: bytes) -> None:
    """Write `data` to a new file and wait until the disk has it."""
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def sync_folder(path: Path) -> None:
    """Make the names in a folder durable; a file's own fsync does not."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_folder(path: Path) -> None:
    """Make a folder and those above it where they are missing, and wait until the disk has the names of those made."""
    if not path.is_dir():
        make_folder(path.parent)
        path.mkdir(exist_ok=True)
        sync_folder(path.parent)


def replace_file(path: Path, text: str) -> None:
    """Write a text file so that a reader sees the old one or the new one, never a part."""
    aside = path.with_name(path.name + ".tmp")
    write_durably(aside, text.encode())
    os.replace(aside, path)
    sync_folder(path.parent)
