"""The shards of a data set: made once, opened by every run."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from dist_vlcl.data.sets import read_raw
from dist_vlcl.data.settings import DataConfig
from dist_vlcl.data.shards import Index, write_shards


def make_shards(data: DataConfig, track: Callable[[Sequence[Any]], Iterable[Any]] = iter) -> Path:
    """Write the shards of the set that the options name; returns their folder.

    Raises FileExistsError if they are there: they are not compared with the source.
    """
    folder = Path(data.root) / data.name
    if (folder / "index.json").exists():
        raise FileExistsError(f"{folder} has shards already: remove it to build them again, or choose another data.root")
    raw = read_raw(data)
    options: dict[str, Any] = {"samples_per_shard": data.samples_per_shard, "pixels": data.stores_pixels, "track": track}
    write_shards(raw, folder, name=data.name, reader=data.reader_name, **options)
    return folder


def open_index(data: DataConfig) -> Index:
    """The index of the shards; `digits` are built on the spot, with others FileNotFoundError gives the command that builds them."""
    if data.url:
        return Index.load(data.url, data.allow_pipe, data.timeout_s)
    folder = Path(data.root) / data.name
    if not (folder / "index.json").exists():
        if data.reader_name != "digits":
            raise FileNotFoundError(f"{folder}/index.json is missing; build the shards first:\n  {build_command(data)}")
        make_shards(data)
    return Index.load(str(folder))


def build_command(data: DataConfig) -> str:
    """What to type to build these shards."""
    defaults = DataConfig()
    words = [f"data={data.reader_name}"]
    if data.name != data.reader_name:
        words.append(f"data.name={data.name}")
    of_source = ("root", "source", "test_source", "test_fraction", "split_file", "split_seed", "class_names")
    for option in (*of_source, "samples_per_shard", "encoding"):
        value = getattr(data, option)
        if value != getattr(defaults, option):
            words.append(f"data.{option}={value}")
    if data.reader_name == "folder" and data.source is None:
        words.append("data.source=FOLDER_OR_TAR")
    return " ".join(["python -m dist_vlcl.commands.build_data", *words])
