"""Copy the scripts for several processes, machines and Slurm:  dist-vlcl launch-files FOLDER"""

import shutil
from argparse import ArgumentParser
from pathlib import Path

from dist_vlcl.config import errors_refused
from dist_vlcl.paper import CONFIG_FOLDER


@errors_refused()
def main() -> None:
    """Run the command line. A file that exists is not replaced: it may hold the settings of a site."""
    parser = ArgumentParser(prog="dist-vlcl launch-files", description=__doc__)
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="where to write launch/ and slurm/")
    folder, written = parser.parse_args().folder, 0
    for source in (file for name in ("launch", "slurm") for file in (CONFIG_FOLDER.parent / name).rglob("*.*")):
        target = folder / source.relative_to(CONFIG_FOLDER.parent)
        if not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source, target)
            written += 1
    print(f"{folder}: {written} files written, those that existed were kept; see launch/local.sh --help and slurm/train.sbatch")
