"""Train many runs of the paper, one after another:  python -m dist_vlcl.commands.sweep paper=GROUP [OPTION=VALUE ...]

    python -m dist_vlcl.commands.sweep paper=table2                                  what is missing of Table 2
    python -m dist_vlcl.commands.sweep paper=all,figure8 --controls                  116 trainings, with their controls
    python -m dist_vlcl.commands.sweep paper='t1-moe-cifar*' seed=0,1,2 model=small train.epochs=2 --processes 2
    python -m dist_vlcl.commands.sweep paper=table2 --list                           only say what would be run
    python -m dist_vlcl.commands.sweep paper=table2 --count                          48, for `sbatch --array=0-47`, whose task then calls
    python -m dist_vlcl.commands.sweep paper=table2 --item "$SLURM_ARRAY_TASK_ID"

paper=  ids, wildcards and groups, with commas: table1 to table4, table5 (memory probes), figure8 (five seeds), all (the 92 published
        trainings), lora-layers (Table 2 with LoRA, not published), frozen and zero-shot (the controls).
seed=   one or several, with commas.
Every other OPTION=VALUE goes to every run; a run's folder is named after its id, its seed and these options.

Complete runs are skipped, interrupted ones go on where they stopped, a run that fails is named at the end and does not hold up the others.
Exit status: 0 when all is complete, 1 when a run failed, 2 for a wrong option, 75 when a signal stopped the sweep: start it again.
"""

import argparse
import json
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from rich.console import Console
from rich.progress import track
from rich.table import Table

from dist_vlcl.config import CONFIG_FOLDER, expand_paper, format_error, from_hydra
from dist_vlcl.masking import masked, masked_command
from dist_vlcl.paper import control_of, published, select, zero_shot_of

STOPPED = 75  # sysexits' EX_TEMPFAIL
COMPLETE, DONE, FAILED, LEFT = "complete before", "done", "FAILED", "not run"


@dataclass(frozen=True)
class Item:
    """One run: the words of its command line, and the folder that they lead to."""

    words: tuple[str, ...]
    folder: Path

    @property
    def is_complete(self) -> bool:
        return self.accuracy.get("complete") is True

    @property
    def wants_to_go_on(self) -> bool:
        """Whether the run was stopped by a signal, saved."""
        return (self.folder / "REQUEUE").exists()

    @property
    def accuracy(self) -> dict:
        try:
            return json.loads((self.folder / "accuracy.json").read_text())
        except (OSError, ValueError):
            return {}


def plan(words: Sequence[str], controls: bool = False) -> list[tuple[str, ...]]:
    """Return the words of every run that a command line asks for, each once; raise ValueError for one that cannot be."""
    chosen = dict(word.split("=", 1) for word in words if word.startswith(("paper=", "seed=")))
    if "paper" not in chosen:
        raise ValueError("paper=...: say which runs, such as paper=table2 or paper=t1-moe-cifar20-fo")
    own = [word for word in words if not word.startswith(("paper=", "seed="))]
    if wrong := [word for word in own if "=" not in word]:
        raise ValueError(f"{wrong[0]!r}: an option is OPTION=VALUE, such as train.epochs=2")
    given = chosen["seed"].split(",") if "seed" in chosen else None
    pairs: dict[tuple[str, str], None] = {}
    for pattern in chosen["paper"].split(","):
        seeds = given or [str(seed) for seed in range(published()["figure8"]["seeds"] if pattern == "figure8" else 1)]
        pairs |= dict.fromkeys((id, seed) for seed in seeds for id in select([pattern]))
    if controls:
        pairs |= dict.fromkeys((control, seed) for id, seed in list(pairs) if (control := control_of(id)))
        pairs |= dict.fromkeys((zero_shot_of(id), seed) for id, seed in list(pairs))
    return [(f"paper={id}", f"seed={seed}", *own) for id, seed in pairs]


def prepare(commands: Iterable[tuple[str, ...]]) -> list[Item]:
    """Return the runs with their folders, each configuration composed and checked; raise ValueError, naming the run, for a wrong option."""
    items: dict[Path, Item] = {}
    with initialize_config_dir(str(CONFIG_FOLDER), version_base=None):
        for words in commands:
            try:
                run = from_hydra(compose("config", expand_paper(list(words)))).run
            except (ValueError, HydraException) as error:
                raise ValueError(f"{masked_command(words)}: {format_error(error)}") from error
            folder = Path(run.root) / run.name
            if folder in items:
                raise ValueError(
                    f"{folder}: {masked_command(items[folder].words)} and {masked_command(words)} would share it; leave run.name to us"
                )
            items[folder] = Item(words, folder)
    return list(items.values())


class Runner:
    """Starts runs one at a time, in processes of their own, and passes signals on as the trainer wants them."""

    def __init__(self, launcher: Sequence[str]) -> None:
        self.launcher = [*launcher, "-m", "dist_vlcl.train"]
        self.is_stopped = False
        self._process: subprocess.Popen | None = None

    def command(self, item: Item) -> list[str]:
        return [*self.launcher, *item.words]

    def __call__(self, item: Item) -> int:
        """Train one run to its end and return the exit status; the main thread calls this."""
        handled = {number: signal.signal(number, self._stop) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)}
        try:
            # A session of its own: a signal to our process group reaches the ranks once, by us.
            self._process = subprocess.Popen(self.command(item), start_new_session=True, preexec_fn=_ignore_usr1)
            return self._process.wait()
        finally:
            self._process = None
            for number, handler in handled.items():
                signal.signal(number, handler)

    def _stop(self, _number: int, _frame: FrameType | None) -> None:
        self.is_stopped = True
        if self._process:
            self._process.send_signal(signal.SIGTERM)


def _ignore_usr1() -> None:
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # a launcher dies of it; the trainer installs its own handler


def default_launcher(processes: int | None) -> list[str]:
    """Return the launcher for one machine: a process per GPU, or one."""
    import torch

    number = processes or max(1, torch.cuda.device_count())
    if number == 1:
        return [sys.executable]  # accelerate's launcher of one process dies of a SIGTERM and leaves the trainer behind
    options = ["--num_processes", str(number), "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    return [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", *options, "--main_process_port", "0"]


def run_all(items: Sequence[Item], runner: Runner, console: Console) -> dict[Item, str]:
    """Train what is missing, in order; return what became of each. A failed run does not hold up the others, a signal does."""
    fates = {item: COMPLETE if item.is_complete else LEFT for item in items}
    missing = [item for item in items if fates[item] == LEFT]
    console.print(f"{len(missing)} of {len(items)} to train, the others are complete", highlight=False)
    for number, item in enumerate(missing, 1):
        if runner.is_stopped:
            break
        console.print(f"\n[{number}/{len(missing)}] {item.folder}", highlight=False, markup=False)
        status = runner(item)
        if item.is_complete:
            fates[item] = DONE
        elif not runner.is_stopped and not item.wants_to_go_on:
            fates[item] = f"{FAILED} (exit status {status})"
        runner.is_stopped |= item.wants_to_go_on  # a signal that the ranks had and we had not
    return fates


def show(fates: dict[Item, str], console: Console) -> None:
    """Print what became of every run, with its Last and Avg."""
    table = Table("run", "", "Last", "Avg", box=None)
    for item, fate in fates.items():
        accuracy = item.accuracy if item.is_complete else {}
        table.add_row(item.folder.name, fate, *(f"{100 * accuracy[key]:.2f}" if key in accuracy else "" for key in ("last", "avg")))
    console.print(table)


def exit_status(fates: dict[Item, str], runner: Runner) -> int:
    if any(fate.startswith(FAILED) for fate in fates.values()):
        return 1
    return STOPPED if runner.is_stopped and LEFT in fates.values() else 0


def print_lines(lines: Iterable[str]) -> None:
    """Print lines as long as somebody reads them: `head` does not for long."""
    try:
        for line in lines:
            print(line, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more when it ends


def add_launch_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--processes", type=int, metavar="N", help="processes of each run (default: one per GPU of this machine, or one)")
    parser.add_argument("--launcher", metavar="COMMAND", help="instead of accelerate launch, such as 'torchrun --nproc_per_node 2'")


def runner_of(arguments: argparse.Namespace) -> Runner:
    return Runner(shlex.split(arguments.launcher) if arguments.launcher else default_launcher(arguments.processes))


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        prog="dist_vlcl.commands.sweep", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("words", nargs="+", metavar="OPTION=VALUE", help="paper=..., seed=..., and options of dist_vlcl.train")
    parser.add_argument("--controls", action="store_true", help="also every control: the same units frozen, and zero-shot CLIP")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--list", action="store_true", help="print the command of every run, and train nothing")
    mode.add_argument("--count", action="store_true", help="print the number of runs, and train nothing")
    mode.add_argument("--item", type=int, metavar="K", help="train the K-th run only, from 0: the numbers do not change while others end")
    add_launch_options(parser)
    arguments = parser.parse_intermixed_args()
    console = Console()
    try:
        commands = plan(arguments.words, arguments.controls)
        if arguments.count:
            print(len(commands))
            return
        if arguments.item is not None:
            if not 0 <= arguments.item < len(commands):
                raise ValueError(f"--item {arguments.item}: choose from 0 to {len(commands) - 1}")
            commands = commands[arguments.item : arguments.item + 1]
        items = prepare(track(commands, "checking", console=console, transient=True) if console.is_terminal else commands)
    except ValueError as error:
        print(masked(f"error: {error}"), file=sys.stderr)
        sys.exit(2)
    runner = runner_of(arguments)
    if arguments.list:
        print_lines(shlex.join(runner.command(item)) for item in items)
        return
    fates = run_all(items, runner, console)
    show(fates, console)
    if failed := [item.folder.name for item, fate in fates.items() if fate.startswith(FAILED)]:
        console.print(f"failed: {', '.join(failed)}", highlight=False, soft_wrap=True)
    if runner.is_stopped:
        console.print("stopped by a signal; the same command goes on from here")
    sys.exit(exit_status(fates, runner))


if __name__ == "__main__":
    main()
