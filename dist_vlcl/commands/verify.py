"""Verify the checksums of all shards and open their images:  dist-vlcl verify data=cifar100 [data.url=ADDRESS]

Duration: the time to read the shards and to decode their images once. Exit status 1 and the names of the shards if any is damaged.
"""

import sys

from rich.progress import track

from dist_vlcl.config import Config, hydra_main
from dist_vlcl.data.shards import ShardError, open_sets
from dist_vlcl.masking import masked


def run(config: Config) -> None:
    """Verify with a progress bar. Damaged shards give exit status 1; an error of the user gives 2."""
    index = open_sets(config.data, config.tasks.sets)[0]
    try:
        index.verify(lambda shards: track(shards, description=f"{config.data.name}: shards"))
    except ShardError as error:
        print(masked(f"error: {error}"), file=sys.stderr)
        sys.exit(1)
    counts = f"{index.count('train')} training and {index.count('test')} test images"
    print(f"{masked(index.location)}: {counts}, every shard as it was written")


def main() -> None:
    """Run the command line."""
    hydra_main(run, __doc__)
