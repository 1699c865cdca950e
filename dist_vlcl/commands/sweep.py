"""Train many runs, one after another: `dist-vlcl sweep [paper=GROUP] [OPTION=VALUE[,VALUE...] ...]`.

    dist-vlcl sweep paper=table2                     train the runs of Table 2 that are not complete
    dist-vlcl sweep paper=all,figure8 --controls     116 trainings, and their controls
    dist-vlcl sweep paper='t1-moe-cifar*' seed=0,1,2 model=small train.epochs=2 --processes 2
    dist-vlcl sweep orders=zero_shot,first,dual_hop_odd seed=0,1,2       without paper=: every combination
    dist-vlcl sweep paper=table2 --list              only print the commands
    dist-vlcl sweep paper=table2 --count             check every run and print their number: 48
    sbatch --array=0-47 ...  dist-vlcl sweep paper=table2 --item "$SLURM_ARRAY_TASK_ID"

paper=  ids, wildcards and groups, separated by commas.
        Groups of published runs: table1 to table4, table5 (memory probes), figure8 (five seeds), all (the 92 trainings).
        Other groups: lora-layers (Table 2 with LoRA), frozen, walks (random signs) and zero-shot (the controls).
Every other OPTION=VALUE goes to every run. Values separated by commas give a run each, for every combination. A list in brackets
and a text in quotes are one value. A run's folder is named after its plan, its seed and the options that differ between runs; with paper=,
after its id and all options.

All options, data sets and weights are checked before the first run starts. Complete runs are skipped, and interrupted runs continue from
their checkpoint. A run that fails does not stop the others. Its name is printed at the end.
Exit status: 0 if all runs are complete, 1 if a run failed, 2 for a wrong option, 75 if a signal stopped the sweep (start it again).
"""

import ctypes
import itertools
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from dist_vlcl.config import Config, compose_config, errors_refused, search_path
from dist_vlcl.data.shards import open_sets
from dist_vlcl.masking import explained, masked, masked_command
from dist_vlcl.model.clip import build_clip, unit_ids
from dist_vlcl.options import matches, split_options, values_of
from dist_vlcl.orders import assign
from dist_vlcl.paper import catalogue, published, select
from dist_vlcl.reading import or_warn
from dist_vlcl.run.folder import as_saved, differences
from dist_vlcl.run.signals import Preemption
from dist_vlcl.saved import MAY_CHANGE, digest_at_start, read_accuracy, read_config

NAMED = ("run.name", "orders.order", "data.name", "tasks.increment")  # options that are in every run's name
COMPLETE, DONE, FAILED, LEFT = "complete before", "done", "FAILED", "not run"


@dataclass(frozen=True)
class Item:
    """One run: the options on its command line, and its folder."""

    options: tuple[str, ...]
    folder: Path
    config: Config = field(compare=False, repr=False)

    @property
    def accuracy(self) -> dict:
        """The contents of accuracy.json; empty if there is none that can be used."""
        return or_warn(lambda: read_accuracy(self.folder), {})

    @property
    def is_complete(self) -> bool:
        """Whether every task is done."""
        return self.accuracy.get("complete") is True

    def changes(self, saved: dict[str, Any], is_complete: bool = True) -> dict[str, str]:
        """Return "was -> is" for each option of a saved configuration that this run has otherwise and that decides its result."""
        unread = () if "zeroth" in self.config.orders.in_use() or not is_complete else ("zo.*",)  # a resume must have equal options
        changes = differences(saved, as_saved(self.config.as_dict()))
        return {key: was_is for key, was_is in changes.items() if not matches(key, (*MAY_CHANGE, *unread))}

    def check(self) -> None:
        """Raise ValueError if the folder has a run with other options: its result is not the one that is asked for."""
        saved = self.folder / "config.yaml"
        changes = self.changes(read_config(saved), self.is_complete) if saved.exists() else {}
        earlier = () if "train_images" in self.accuracy or not self.is_complete else ("train.batch_size", "train.epochs")
        fitted = [key for key in earlier if changes.get(key, "").endswith(" -> None")]  # versions before 0.2 wrote the fitted numbers
        if other := [f"{key}: {was_is}" for key, was_is in changes.items() if key not in fitted]:
            raise ValueError(f"{self.folder} has a run with other options (was -> is): {', '.join(other)}; choose another folder for these")
        was, now = digest_at_start(self.folder, "data"), fingerprint_here(self.config)
        if was and now and was != now:
            raise ValueError(f"{self.folder} has a run on other data (digest was {was[:16]}, is {now[:16]}); choose another folder")


def fingerprint_here(config: Config) -> str | None:
    """Return the fingerprint of a data set whose shards are on this machine, otherwise None."""
    names = config.tasks.sets or [config.data.name]
    is_here = not config.data.url and all(Path(config.data.root, name, "index.json").exists() for name in names)
    return or_warn(lambda: open_sets(config.data, config.tasks.sets)[0].fingerprint, None) if is_here else None


def read(options: tuple[str, ...]) -> Config:
    """Return the configuration of a run. Raises ValueError that names the run if an option is wrong."""
    with explained(masked_command(options)):
        config = compose_config(options)
        assign(unit_ids(config.model), config.orders)  # whether the plan fits the model's depth
    return config


def without_unread(run: dict[str, str]) -> dict[str, str]:
    """Return a run's options without those of zo if none of its units learns by zeroth order."""
    of_zeroth = [key for key in run if key.lstrip("+").partition(".")[0] == "zo"]
    is_read = not of_zeroth or "zeroth" in read(tuple(map("=".join, run.items()))).orders.in_use()
    return {key: value for key, value in run.items() if is_read or key not in of_zeroth}


def combinations(lists: Mapping[str, Sequence[str]]) -> list[dict[str, str]]:
    """Return every choice of one value per key, the last key's values one after another."""
    return [dict(zip(lists, values, strict=True)) for values in itertools.product(*lists.values())]


def command_lines(words: Sequence[str], controls: bool = False) -> list[tuple[str, ...]]:
    """Return the options of every run that a command line asks for, each once. Raises ValueError for a wrong command line."""
    lists = {key: values_of(value) for key, value in split_options(words)}
    if "paper" not in lists:
        if controls:
            raise ValueError("--controls needs paper=...; without it name them, such as orders.order=zeroth,frozen")
        varied = [key for key in lists if len(lists[key]) > 1 and "." in key and key not in NAMED]
        runs = [without_unread(run) for run in combinations(lists)]
        for run, key in itertools.product(runs, varied):
            if key in run:
                value = re.sub(r"[^A-Za-z0-9._-]+", "_", f"-{key.split('.', 1)[1]}_{masked(run[key])}")
                run["run.name"] = run.get("run.name", "auto") + value
        return [item.options for item in prepare(tuple(map("=".join, run.items())) for run in runs)]  # equal runs once
    patterns, seeds = lists.pop("paper"), lists.pop("seed", None)
    pairs: dict[tuple[str, str], None] = {}
    for pattern in patterns:
        number = published()["figure8"]["seeds"] if pattern == "figure8" else 1
        pairs |= dict.fromkeys((id, seed) for seed in seeds or map(str, range(number)) for id in select([pattern]))
    if controls:
        pairs |= dict.fromkeys((control.id, seed) for id, seed in pairs for control in catalogue()[id].controls())
    runs = [without_unread({"paper": id, "seed": seed, **own}) for own in combinations(lists) for id, seed in pairs]
    return list(dict.fromkeys(tuple(map("=".join, run.items())) for run in runs))


def prepare(commands: Iterable[tuple[str, ...]]) -> list[Item]:
    """Return the runs with their folders, equal runs once. Raises ValueError if an option is wrong or unequal runs share a folder."""
    items: dict[Path, Item] = {}
    for options in commands:
        config = read(options)
        item = Item(options, config.run.folder, config)
        first = items.setdefault(item.folder, item)
        if item.changes(as_saved(first.config.as_dict())):
            both = f"{masked_command(first.options)} and {masked_command(options)}"
            raise ValueError(f"{both} would share the folder {item.folder}: train them by separate calls, with different run.name")
    return list(items.values())


@errors_refused()
def launcher_of(arguments: Namespace) -> list[str]:
    """Return the command that starts a run, before its options: with the launcher given, or one process per GPU, or one."""
    number = max(1, torch.cuda.device_count()) if arguments.processes is None else arguments.processes
    if number < 1:
        raise ValueError(f"--processes {number}: give at least 1")
    if arguments.launcher:
        launcher = shlex.split(arguments.launcher)
    elif number == 1:
        launcher = [sys.executable]  # with one process, SIGTERM ends accelerate's launcher and leaves the trainer running
    else:
        options = ["--num_processes", str(number), "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
        launcher = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", *options, "--main_process_port", "0"]
    return [*launcher, "-m", "dist_vlcl.train"]


def train(command: Sequence[str], stop: Preemption) -> int:
    """Train one run in a new process and return its exit status. A signal to us stops it; it saves a checkpoint."""
    # In a new session: a signal to our process group then reaches the ranks once, through us.
    process = subprocess.Popen(command, start_new_session=True, preexec_fn=_prepare_child)
    while process.poll() is None and not stop.requested:
        time.sleep(0.1)
    if stop.requested:
        process.terminate()
    return process.wait()


def _prepare_child() -> None:
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # it would end a launcher; the trainer has its own handler
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG: the run saves and stops if this process is killed


def missing_inputs(configs: Sequence[Config]) -> list[str]:
    """Open every data set and load every model of these runs once. Return one text for each that is missing."""
    found = []
    works: dict[str, Callable[[], object]] = {repr((c.data, c.tasks.sets)): partial(open_sets, c.data, c.tasks.sets) for c in configs}
    works |= {repr(config.model): partial(build_clip, config.model, config.adapter) for config in configs}
    for work in works.values():
        try:
            work()
        except (OSError, ValueError, RuntimeError) as error:
            found.append(str(error))
    return found


def run_all(items: Sequence[Item], launcher: Sequence[str], console: Console) -> dict[Item, str]:
    """Train the runs that are not complete, in order. Return the outcome of each run: LEFT only if a signal has stopped us.

    A failed run does not stop the others. Exits with status 2 before the first run if a data set or the weights of a model are missing.
    """
    outcomes = {item: COMPLETE if item.is_complete else LEFT for item in items}
    missing = [item for item in items if outcomes[item] == LEFT]
    with errors_refused():
        for item in items:
            item.check()
        if len(missing) > 1 and (texts := missing_inputs([item.config for item in missing])):
            raise ValueError("\n".join(texts))
    console.print(f"{len(missing)} of {len(items)} to train, the others are complete", highlight=False)
    with Preemption() as stop:
        for number, item in enumerate(missing, 1):
            console.print(f"\n[{number}/{len(missing)}] {item.folder}", highlight=False, markup=False)
            (item.folder / "REQUEUE").unlink(missing_ok=True)  # of an earlier start
            status = train([*launcher, *item.options], stop)
            if item.is_complete:
                outcomes[item] = DONE
            elif stop.requested or (item.folder / "REQUEUE").exists():  # the signal may have reached the ranks and not us
                break
            else:
                outcomes[item] = f"{FAILED} (exit status {status})"
    if LEFT in outcomes.values():
        console.print("stopped by a signal; the same command continues from here")
    if failed := [item.folder.name for item, outcome in outcomes.items() if outcome.startswith(FAILED)]:
        console.print(f"failed: {', '.join(failed)}", highlight=False, soft_wrap=True)
    return outcomes


def print_commands(items: Iterable[Item], launcher: Sequence[str]) -> None:
    """Print the command line of every run."""
    print("\n".join(shlex.join([*launcher, *item.options]) for item in items))


def add_launch_options(parser: ArgumentParser) -> None:
    """Add the options that say how each run is started."""
    parser.add_argument("--config-dir", metavar="FOLDER", help="a folder with more option groups and files, as for dist_vlcl.train")
    parser.add_argument("--list", action="store_true", help="print the command of every run, and train nothing")
    parser.add_argument("--processes", type=int, metavar="N", help="processes of each run (default: one per GPU of this machine, or one)")
    parser.add_argument("--launcher", metavar="COMMAND", help="instead of accelerate launch, such as 'torchrun --nproc_per_node 2'")


def main() -> None:
    """Run the command line."""
    parser = ArgumentParser(prog="dist-vlcl sweep", description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="+", metavar="OPTION=VALUE", help="paper=..., seed=..., and options of dist_vlcl.train")
    parser.add_argument("--controls", action="store_true", help="also train every control: frozen, random walk, zero-shot, sign for MoZO")
    parser.add_argument("--count", action="store_true", help="check the options of every run, print the number of runs, and train nothing")
    parser.add_argument("--item", type=int, metavar="K", help="train only run K of the complete list, counted from 0")
    add_launch_options(parser)
    arguments = parser.parse_intermixed_args()
    console = Console()
    with errors_refused():
        commands = command_lines([*search_path(arguments.config_dir), *arguments.words], arguments.controls)
        if arguments.item is not None:
            if not 0 <= arguments.item < len(commands):
                raise ValueError(f"--item {arguments.item}: choose from 0 to {len(commands) - 1}")
            commands = commands[arguments.item : arguments.item + 1]
        items = prepare(track(commands, "checking", console=console, transient=True) if console.is_terminal else commands)
    if arguments.count:
        print(len(items))
        return
    launcher = launcher_of(arguments)
    if arguments.list:
        print_commands(items, launcher)
        return
    outcomes = run_all(items, launcher, console)
    table = Table("run", "", "Last", "Avg", box=None)
    for item, outcome in outcomes.items():
        accuracy = item.accuracy if item.is_complete else {}
        table.add_row(item.folder.name, outcome, *(f"{100 * accuracy[key]:.2f}" if key in accuracy else "" for key in ("last", "avg")))
    console.print(table)
    sys.exit(1 if any(outcome.startswith(FAILED) for outcome in outcomes.values()) else os.EX_TEMPFAIL if LEFT in outcomes.values() else 0)
