"""Choose zeroth-order options on the first tasks: `dist-vlcl tune [OPTION=VALUE[,VALUE...] ...]`.

    dist-vlcl tune data=cifar100 orders=language_all
    dist-vlcl tune data=cifar100 orders=vision_all orders.rest=frozen seed=0,1 zo=naive zo.lr_scale=3,10,30
    dist-vlcl tune data=cifar100 orders=language_all zo=sign zo.probes=64 zo.lr_scale=1,3,10 --tasks all

Every combination of the options with several values is trained on the first task and evaluated on held-out images of its training set.
Test images are never read. A step that is good for one task can be too long for many: --tasks learns more of them, and compares Avg, the
mean over tasks. A combination counts with its mean over the seeds (0, 1 and 2). These options are searched unless you give them one
value. In a plan with both branches, probes are those of the language branch.

    zo=naive,conservative,sign    zo.lr_scale=0.3,1,3,10    zo.probes=1,16,64

The best combination and the same units frozen are then run again with fresh seeds, which also hold out another random part of the same
images. The best of many looks better than it is. The fresh runs took no part in the choice, so the choice does not bias their paired
difference, however many choices there were.

The folder tuning/NAME/ gets the runs. Its tuning.md compares the combinations with the same units frozen and with zero-shot CLIP, and
has the command that trains with the best one. tuning.csv has a row per run. Complete runs are not repeated; failed ones do not count.
"""

import os
import re
import sys
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import isnan, nan
from pathlib import Path
from statistics import mean
from typing import Any

import pandas as pd
from rich.console import Console

from dist_vlcl.commands.sweep import LEFT, Item, add_launch_options, combinations, launcher_of, prepare, print_commands, run_all
from dist_vlcl.config import Config, compose_config, errors_refused, search_path
from dist_vlcl.dist.world import World
from dist_vlcl.experiment import open_tasks
from dist_vlcl.masking import masked_command
from dist_vlcl.options import split_options, values_of
from dist_vlcl.report.records import read_records
from dist_vlcl.report.statistics import paired_test
from dist_vlcl.report.tables import ranked, trial_table
from dist_vlcl.run.files import replace_file

SEEDS, FRESH = ["0", "1", "2"], 5
SEARCHED = {"zo": ["naive", "conservative", "sign"], "zo.lr_scale": ["0.3", "1", "3", "10"], "zo.probes": ["1", "16", "64"]}
CONTROL = {"orders.order": "frozen"}
Choice = dict[str, str]  # option -> value
Train = Callable[[Sequence[Choice], Sequence[str]], list[pd.DataFrame]]  # choices, seeds -> the rows of trained() of each choice


def read_options(words: Sequence[str]) -> tuple[list[str], dict[str, list[str]], list[str]]:
    """Return the options that all runs share, the options with several values, and the seeds."""
    pairs = split_options(words)
    several = {key: values for key, value in pairs if len(values := values_of(value)) > 1}
    seeds = several.pop("seed", None) or ([dict(pairs)["seed"]] if "seed" in dict(pairs) else SEEDS)
    return [f"{key}={value}" for key, value in pairs if key not in several and key != "seed"], several, seeds


def grid(cfg: Config, several: dict[str, list[str]], fixed: Sequence[str]) -> list[Choice]:
    """Return every combination of the searched options. Raises ValueError if there is nothing to search."""
    if cfg.orders.branch == "none" or cfg.orders.order != "zeroth":
        given = f"orders.branch={cfg.orders.branch}, orders.order={cfg.orders.order}"
        raise ValueError(f"{given}: no unit learns by zeroth order, so there is nothing to tune; choose a plan such as orders=dual_hop_odd")
    if other := [key for key in several if key != "zo" and not key.startswith("zo.")]:  # the control would not have it
        raise ValueError(f"{other[0]}: only options of zo can have several values; search others by separate calls")
    searched = dict(SEARCHED)
    if cfg.orders.branch == "dual":  # a probe of the vision branch costs a pass over the images
        searched["zo.probes"] = [f"{{language: {count}, vision: 1}}" for count in SEARCHED["zo.probes"]]
    given_once = {key for key, _ in split_options(fixed)}
    searched = {key: values for key, values in (searched | several).items() if key not in given_once}
    if not searched:
        raise ValueError("every option has one value: give some of them several, such as zo.lr_scale=0.1,1,10")
    return combinations(searched)


def command_lines(fixed: Sequence[str], choice: Choice, seeds: Sequence[str], folder: Path, shared: Sequence[str]) -> list[tuple[str, ...]]:
    """Return the options of a choice's runs, one per seed. A strategy (zo=NAME) stands before all other options, which win over it.

    shared: options of all runs, which win over the user's own.
    """
    ours = [*shared, "run.trackers=[]", f"run.root={folder}/trials"]
    name = re.sub(r"[^A-Za-z0-9._-]+", "_", "-".join(f"{key.split('.')[-1]}_{value}" for key, value in choice.items()))
    return [(*fixed, *map("=".join, choice.items()), *ours, f"seed={seed}", f"run.name={name}-seed{seed}") for seed in seeds]


def trained(items: Sequence[Item]) -> pd.DataFrame:
    """Return one row per run: seed, Avg in percent (NaN for a failed run), Last, Avg of zero-shot CLIP, and loss over its last quarter."""
    rows = []
    for item in items:
        losses = [record["loss"] for record in read_records(item.folder)["step"]]
        end = mean(losses[-max(1, len(losses) // 4) :]) if losses and item.is_complete else nan
        before = mean((item.accuracy.get("zero_shot") or {"": nan}).values())
        last, avg = (item.accuracy[metric] if item.is_complete else nan for metric in ("last", "avg"))
        accuracies = {"accuracy": 100 * avg, "last": 100 * last, "zero_shot": 100 * before}
        rows.append({"seed": dict(split_options(item.options))["seed"], **accuracies, "loss": end})
    return pd.DataFrame(rows)


@dataclass(frozen=True)
class Search:
    """The result of a screen and of the fresh runs of its winner."""

    runs: pd.DataFrame  # one row per run: part (screen or fresh), seed, options, and what trained() returns
    trials: pd.DataFrame  # of these, the choices in the screen
    references: dict[str, float]  # accuracies in percent that the screen is compared with
    best: Choice
    screened: float  # the winner's gain over its control in the screen, in points
    fresh: dict[str, Any]  # the paired test of that gain on fresh seeds

    @property
    def answer(self) -> str:
        """What the fresh runs say, in one sentence."""
        options = " ".join(f"{key}={value}" for key, value in self.best.items())
        gain, low, high = (self.fresh[key] for key in ("mean", "low", "high"))
        if isnan(low):
            # Without the runs that failed the others would be a selection, which can fake a gain.
            reason = "some of them failed" if isnan(gain) else f"all differences are {gain:+.2f} points"
            return f"The fresh runs cannot tell whether {options} is better than the same units frozen: {reason}."
        found = "is better than" if low > 0 else "is worse than" if high < 0 else "shows no gain over"
        interval = f"{gain:+.2f} points, 95 % interval {low:+.2f} to {high:+.2f}, {self.fresh['seeds']} fresh seeds"
        return f"{options} {found} the same units frozen ({interval})."

    @property
    def shrinkage(self) -> str:
        """How much of the winner's gain in the screen did not appear again."""
        count, lost = len(self.trials[list(self.best)].drop_duplicates()), self.screened - self.fresh["mean"]
        again = "" if isnan(lost) else f" The fresh runs show {abs(lost):.2f} {'less' if lost >= 0 else 'more'}."
        return "" if isnan(self.screened) else f"In the screen it gained {self.screened:+.2f} points, the best of {count} choices.{again}"


def search(choices: Sequence[Choice], train: Train, seeds: Sequence[str], fresh: Sequence[str]) -> Search | None:
    """Screen the choices, and train the best one and its control again with fresh seeds. None if no run of the screen is complete."""

    def runs_of(part: str, choices: Sequence[Choice], seeds: Sequence[str]) -> list[pd.DataFrame]:
        return [runs.assign(part=part, **choice) for choice, runs in zip(choices, train(choices, seeds), strict=True)]

    control, *found = runs_of("screen", [CONTROL, *choices], seeds)
    trials = pd.concat(found)[[*choices[0], "accuracy", "loss"]].reset_index(drop=True)
    if trials.accuracy.isna().all():
        return None
    best = ranked(trials).iloc[0][list(choices[0])].to_dict()
    values = {"the same units frozen": control.accuracy, "zero-shot CLIP": control.zero_shot}
    references = {name: float(accuracies.mean()) for name, accuracies in values.items() if accuracies.notna().any()}
    pairs = [(found[choices.index(best)], control), tuple(runs_of("fresh", [best, CONTROL], fresh))]
    gains, fresh_gains = (ours.set_index("seed").accuracy - frozen.set_index("seed").accuracy for ours, frozen in pairs)
    runs = pd.concat([control, *found, *pairs[1]])
    return Search(runs, trials, references, best, float(gains.mean()), paired_test(fresh_gains.to_numpy()))


def write(folder: Path, command: str, fixed: Sequence[str], tasks: str, found: Search) -> str:
    """Write the tables and the command that trains with the best choice; return what the user should read."""
    table = trial_table(ranked(found.trials), found.references)
    learned = {"1": "the first task", "all": "all tasks (Avg)"}.get(tasks, f"the first {tasks} tasks (Avg)")
    note = f"Accuracy in % on held-out training images of {learned}; test images were not read."
    best = f"python -m dist_vlcl.train {masked_command([*fixed, *(f'{key}={value}' for key, value in found.best.items())])}"
    head = f"# {folder.name}\n\n    {command}\n\n**{found.answer}** {found.shrinkage}"
    replace_file(folder / "tuning.md", f"{head}\n\n{table}\n{note} Train with the first row:\n\n    {best}\n")
    found.runs.to_csv(folder / "tuning.csv", index=False)
    return "\n".join([f"\n{table}", note, found.answer, found.shrinkage, f"Train with: {best}"])


def parsed() -> Namespace:
    """Return the arguments of the command line. Exits with status 2 if one of them is wrong."""
    parser = ArgumentParser(prog="dist-vlcl tune", description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*", metavar="OPTION=VALUE", help="options of dist_vlcl.train; give several values with commas")
    parser.add_argument("--holdout", type=float, default=0.2, metavar="PART", help="part of each class's training images to hold out (0.2)")
    parser.add_argument("--tasks", default="1", metavar="N", help="how many tasks to learn, or all (1)")
    parser.add_argument("--fresh", type=int, default=FRESH, metavar="N", help=f"seeds that the best one is run again with ({FRESH})")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="where to write (default: tuning/NAME, after the run's own name)")
    add_launch_options(parser)
    arguments = parser.parse_intermixed_args()
    with errors_refused():
        if not re.fullmatch("all|[1-9][0-9]*", arguments.tasks):
            raise ValueError(f"--tasks {arguments.tasks}: give a whole number above 0, or all")
        if not 0 < arguments.holdout < 1:
            raise ValueError(f"--holdout {arguments.holdout}: give a number of more than 0 and less than 1")
        if arguments.fresh < 2:
            raise ValueError(f"--fresh {arguments.fresh}: give at least 2, because an interval needs two differences")
        for option, flag in (("tasks.num_tasks", "--tasks"), ("eval.holdout", "--holdout")):
            if option in dict(split_options(arguments.words)):
                raise ValueError(f"{option}: give {flag} instead, which this command needs for itself")
        arguments.words[:0] = search_path(arguments.config_dir)
    return arguments


def main() -> None:
    """Run the command line."""
    arguments, console = parsed(), Console()
    with errors_refused():
        fixed, several, seeds = read_options(arguments.words)
        cfg = compose_config(fixed)
        folder = arguments.out or Path("tuning") / f"{cfg.run.name}{'' if arguments.tasks == '1' else f'-tasks_{arguments.tasks}'}"
        shared = [f"tasks.num_tasks={'null' if arguments.tasks == 'all' else arguments.tasks}", f"eval.holdout={arguments.holdout}"]
        choices = grid(cfg, several, fixed)
        fresh = [str(max(map(int, seeds)) + 1 + k) for k in range(arguments.fresh)]

        def planned(choices: Sequence[Choice], seeds: Sequence[str]) -> list[list[Item]]:
            return [prepare(command_lines(fixed, choice, seeds, folder, shared)) for choice in choices]

        screen = planned([CONTROL, *choices], seeds)
        launcher = launcher_of(arguments)
        if arguments.list:
            print_commands([item for of_choice in screen for item in of_choice], launcher)
            return
        if not arguments.launcher:  # which may start on machines that have other files
            try:
                open_tasks(screen[0][0].config, World.alone())
            except ValueError as error:
                raise ValueError(str(error).replace("tasks.num_tasks=", "--tasks ")) from error

    def train(choices: Sequence[Choice], seeds: Sequence[str]) -> list[pd.DataFrame]:
        items = planned(choices, seeds)
        if LEFT in run_all([item for of_choice in items for item in of_choice], launcher, console).values():
            sys.exit(os.EX_TEMPFAIL)
        return [trained(of_choice) for of_choice in items]

    if (found := search(choices, train, seeds, fresh)) is None:
        console.print(f"no run was completed; see their messages above, and {folder}/trials")
        sys.exit(1)
    given = ["--tasks", arguments.tasks, "--holdout", str(arguments.holdout), "--fresh", str(arguments.fresh)]
    given += ["--out", str(folder)] if arguments.out else []
    command = f"dist-vlcl tune {masked_command([*arguments.words, *given])}"
    console.print(write(folder, command, fixed, arguments.tasks, found), highlight=False, markup=False, soft_wrap=True)
