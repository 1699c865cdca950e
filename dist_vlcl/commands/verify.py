"""Read every shard of a data set again and compare it with the index:  python -m dist_vlcl.commands.verify data=cifar100 [data.url=...]

Duration: that of reading the shards once. Exit status 1 and the names of the shards, if any is damaged.
"""

import sys
from collections.abc import Iterable, Sequence
from typing import Any

from rich.console import Console
from rich.progress import track

from dist_vlcl.config import Config, hydra_main
from dist_vlcl.data.shards import ShardError
from dist_vlcl.data.store import open_index
from dist_vlcl.masking import masked


def verify(config: Config) -> None:
    """Verify with a progress bar; damage is told on stderr, with exit status 1, and what the user can mend with status 2."""

    def with_bar(work: Sequence[Any]) -> Iterable[Any]:
        return track(work, description=f"{config.data.name}: shards")

    try:
        index = open_index(config.data)
        index.verify(with_bar)
    except (ValueError, OSError, ShardError) as error:
        print(masked(f"error: {error}"), file=sys.stderr)
        sys.exit(1 if isinstance(error, ShardError) else 2)
    Console().print(
        f"{masked(index.location)}: {index.count('train')} training and {index.count('test')} test images, every shard as it was written"
    )


def main() -> None:
    """Run the command line."""
    hydra_main(verify)


if __name__ == "__main__":
    main()
