"""Check a command line, then hand it to Slurm:  python -m dist_vlcl.run.submit train --nodes 2 [OPTION=VALUE ...]"""

import argparse
import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from dist_vlcl.masking import HIDDEN, masked, masked_command

SCRIPTS = {
    "train": "one run on several nodes",
    "sweep": "many runs of the paper, a task of an array each",
    "shards": "the shards of a data set",
}
# What sbatch is told goes through this shell only as arguments: $0 is the site's file, $@ the command.
IN_SITE = ["bash", "-c", 'source "$0" && exec "$@"']
NOT_FOUND = 127  # a shell's exit status


def check_options(what: str, options: Sequence[str]) -> None:
    """Raise ValueError for options that the job would refuse, before it has waited in the queue."""
    keys = [option.split("=")[0] for option in options]
    if wrong := [option for option in options if "=" not in option or option.startswith("-")]:
        raise ValueError(f"{wrong[0]!r}: an option is OPTION=VALUE, such as train.epochs=2")
    if twice := [key for key in keys if keys.count(key) > 1]:
        raise ValueError(f"{twice[0]} is given twice; quote values with {{ }} [ ] or *")
    if what == "sweep":
        return  # counting its runs checks them
    from hydra import compose, initialize_config_dir
    from hydra.errors import HydraException

    from dist_vlcl.config import CONFIG_FOLDER, expand_paper, format_error, from_hydra

    try:
        with initialize_config_dir(str(CONFIG_FOLDER), version_base=None):
            config = from_hydra(compose("config", expand_paper(list(options))))
    except HydraException as error:
        raise ValueError(format_error(error)) from error
    if what == "train":
        from dist_vlcl.model.clip import unit_ids
        from dist_vlcl.orders import assign

        assign(unit_ids(config.model), config.orders)


def number_of_runs(options: Sequence[str], controls: bool) -> int:
    """Return how many runs a sweep has, each checked; raises ValueError that names the run."""
    from dist_vlcl.commands.sweep import plan, prepare

    commands = plan(options, controls)
    runs = prepare(commands)
    check_options("train", commands[0])  # its plan against its model's depth, which is no other's unless options say so
    return len(runs)


def main() -> None:
    """Run the command line. Exit status: sbatch's, or 2 for a wrong option."""
    parser = argparse.ArgumentParser(prog="python -m dist_vlcl.run.submit", description=__doc__)
    parser.add_argument("what", choices=SCRIPTS, help="; ".join(f"{name}: {text}" for name, text in SCRIPTS.items()))
    parser.add_argument("--nodes", type=positive, metavar="N", help="train: nodes of the job (default: that of slurm/train.sbatch)")
    parser.add_argument("--time", metavar="LIMIT", help="time limit, such as 4:00:00")
    parser.add_argument(
        "--engine", metavar="NAME", help="train: of first-order units: ddp (default), zero0, zero1, zero2, zero3, zero3_offload"
    )
    parser.add_argument("--parallel", type=positive, default=8, metavar="N", help="sweep: tasks of the array at a time (default 8)")
    parser.add_argument("--controls", action="store_true", help="sweep: also every control, as with dist_vlcl.commands.sweep --controls")
    parser.add_argument(
        "--sbatch", action="append", default=[], metavar="OPTION", help="for sbatch itself, such as --sbatch=--partition=gpu"
    )
    parser.add_argument(
        "--repository", type=Path, default=Path.cwd(), metavar="FOLDER", help="the checkout with slurm/ (default: this folder)"
    )
    parser.add_argument("--dry-run", action="store_true", help="print the script and the command, its secrets hidden, and submit nothing")
    parser.add_argument("options", nargs="*", metavar="OPTION=VALUE", help="options of dist_vlcl.train, of the sweep, or of data.build")
    arguments = parser.parse_intermixed_args()
    script = arguments.repository / "slurm" / f"{arguments.what}.sbatch"
    engines = ["ddp", *sorted(path.stem for path in (arguments.repository / "launch/deepspeed").glob("*.json"))]
    try:
        if not script.exists():
            raise ValueError(f"{script} is missing: call this from the repository's folder, or give --repository")
        if arguments.engine and arguments.engine not in engines:
            raise ValueError(f"--engine {arguments.engine}: choose from {', '.join(engines)}")
        for name in ("engine", "nodes"):
            if getattr(arguments, name) and arguments.what != "train":
                raise ValueError(f"--{name}: it is for train; {arguments.what} takes one node and no engine")
        if arguments.controls and arguments.what != "sweep":
            raise ValueError("--controls: it is for sweep")
        check_options(arguments.what, arguments.options)
        own = [f"--nodes={arguments.nodes}"] if arguments.nodes else []
        own += [f"--time={arguments.time}"] if arguments.time else []
        if arguments.what == "sweep":
            own += [f"--array=0-{number_of_runs(arguments.options, arguments.controls) - 1}%{arguments.parallel}"]
    except ValueError as error:
        print(masked(f"error: {error}"), file=sys.stderr)
        sys.exit(2)
    repository, for_script = str(arguments.repository.resolve()), ["--engine", arguments.engine] if arguments.engine else []
    for_script += ["--controls"] if arguments.controls else []
    command = ["sbatch", *own, *arguments.sbatch, f"{repository}/slurm/{arguments.what}.sbatch", *for_script, *arguments.options]
    if arguments.dry_run:
        print(script.read_text())
        said = masked_command(command)
        print(f"# source {shlex.quote(f'{repository}/slurm/site.sh')} && \\\n# DIST_VLCL_HOME={shlex.quote(repository)} {said}")
        if said != shlex.join(command):
            print(f"# {HIDDEN}: hidden here; the job gets it as it was given")
        return
    done = subprocess.run([*IN_SITE, f"{repository}/slurm/site.sh", *command], env={**os.environ, "DIST_VLCL_HOME": repository})
    if done.returncode == NOT_FOUND:
        print("error: there is no sbatch here; call this where jobs are submitted, on the cluster's login node", file=sys.stderr)
    sys.exit(done.returncode)


def positive(text: str) -> int:
    """Return a whole number from 1 on; argparse names the option otherwise."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text}: give a whole number from 1")
    return int(text)


if __name__ == "__main__":
    main()
