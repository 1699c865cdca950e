"""Write the shards of a data set:  python -m dist_vlcl.commands.build_data data=cifar100 [data.source=PATH] [data.root=DIR]

Duration: CIFAR-100 or Tiny-ImageNet from disk, a minute or two. Result: data/cifar100/index.json and one folder per split.
"""

import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any
from urllib.error import URLError

from rich.console import Console
from rich.progress import track

from dist_vlcl.data.settings import DataConfig
from dist_vlcl.data.shards import Index
from dist_vlcl.data.store import make_shards
from dist_vlcl.masking import masked


def build(data: DataConfig) -> Path:
    """Write the shards with a progress bar; returns their folder."""

    def with_bar(work: Sequence[Any]) -> Iterable[Any]:
        return track(work, description=f"{data.name}: classes")

    folder = make_shards(data, track=with_bar)
    index = Index.load(str(folder))
    Console().print(f"{folder}: {index.num_classes} classes, {index.count('train')} training and {index.count('test')} test images")
    return folder


def main() -> None:
    """The command; what the user can mend is one line on stderr and exit status 2."""
    from dist_vlcl.config import Config, hydra_main

    def work(config: Config) -> None:
        try:
            build(config.data)
        except (ValueError, OSError, RuntimeError) as error:
            print(masked(f"error: {error}"), file=sys.stderr)
            if isinstance(error, URLError):
                print(
                    f"No download from here? Get the official archive on another machine, and give it (or the folder that it unpacks to): "
                    f"data={config.data.name} data.source=PATH",
                    file=sys.stderr,
                )
            sys.exit(2)

    hydra_main(work)


if __name__ == "__main__":
    main()
