"""Write the shards of a data set:  python -m dist_vlcl.commands.build_data data=cifar100 [data.source=PATH] [data.root=FOLDER]

Duration: one or two minutes for CIFAR-100 or Tiny-ImageNet on disk. Result: data/cifar100/index.json and one folder for each split.
"""

import sys
from pathlib import Path
from urllib.error import URLError

from rich.console import Console
from rich.progress import track

from dist_vlcl.config import Config, hydra_main
from dist_vlcl.data.settings import DataConfig
from dist_vlcl.data.shards import Index, make_shards
from dist_vlcl.masking import masked


def build(data: DataConfig) -> Path:
    """Write the shards with a progress bar, and return their folder."""
    folder = make_shards(data, lambda work: track(work, description=f"{data.name}: classes"))
    index = Index.load(str(folder))
    Console().print(f"{folder}: {index.num_classes} classes, {index.count('train')} training and {index.count('test')} test images")
    return folder


def run(config: Config) -> None:
    """Build the shards. An error of the user is one line on stderr and exit status 2."""
    try:
        build(config.data)
    except (ValueError, OSError, RuntimeError) as error:
        print(masked(f"error: {error}"), file=sys.stderr)
        if isinstance(error, URLError):
            print(
                f"This machine cannot download it. Get the official archive on another machine, then add data.source=PATH: "
                f"python -m dist_vlcl.commands.build_data data={config.data.name} data.source=PATH",
                file=sys.stderr,
            )
        sys.exit(2)


def main() -> None:
    """Run the command line."""
    hydra_main(run, __doc__)


if __name__ == "__main__":
    main()
