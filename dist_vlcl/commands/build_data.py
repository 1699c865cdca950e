"""Write the shards of a data set:  dist-vlcl data data=cifar100 [data.source=PATH] [data.root=FOLDER]

Duration: one or two minutes for CIFAR-100 or Tiny-ImageNet on disk. Result: data/cifar100/index.json and one folder for each split.
"""

from rich.progress import track

from dist_vlcl.config import Config, hydra_main
from dist_vlcl.data.shards import make_shards
from dist_vlcl.masking import masked


def run(config: Config) -> None:
    """Write the shards with a progress bar. An error of the user is one line on stderr and exit status 2."""
    index = make_shards(config.data, lambda work: track(work, description=f"{config.data.name}: classes"))
    counts = f"{index.count('train')} training and {index.count('test')} test images"
    print(f"{masked(index.location)}: {len(index.class_names)} classes, {counts}")


def main() -> None:
    """Run the command line."""
    hydra_main(run, __doc__)
