"""Choose zeroth-order options on the first task: `python -m dist_vlcl.commands.tune [OPTION=VALUE[,VALUE...] ...]`.

    python -m dist_vlcl.commands.tune data=cifar100 orders=dual_hop_odd zo=mozo
    python -m dist_vlcl.commands.tune paper=t3-moe-cifar10-mozo-hop_odd seed=0,1 zo.lr_scale=0.3,1,3 zo.epsilon.language=1e-3
    accelerate launch -m dist_vlcl.train data=cifar100 orders=dual_hop_odd zo=mozo tuned=tuning/NAME/tuned.yaml

Every combination of the options with several values is trained on the first task and evaluated on held-out images of its training set.
Test images are never read. With several seeds, a combination counts with their mean. These options are searched unless you give them one
value:

    zo.lr_scale=0.1,1,10                   the zeroth-order learning rate over the first-order one
    zo.epsilon.BRANCH=1e-3,1e-4            vision: 5e-4,1e-4
    zo.acceptance=always,best_of_three

The folder tuning/NAME/ gets the runs and tuned.yaml, which a run or a sweep takes as tuned=FILE. Its tuning.md, tuning.csv and tuning.png
compare the combinations with the same units frozen and with zero-shot CLIP. Complete runs are not repeated; failed ones are left out.
"""

import argparse
import itertools
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean

import pandas as pd
from omegaconf import OmegaConf
from rich.console import Console

from dist_vlcl.commands.sweep import LEFT, STOPPED, Item, add_launch_options, launcher_of, prepare, print_commands, run_all, split_options
from dist_vlcl.config import Config, compose_config, refuse
from dist_vlcl.masking import masked_command
from dist_vlcl.orders import PLAN_BRANCHES
from dist_vlcl.report.records import read_records
from dist_vlcl.report.trials import plot_trials, ranked, trial_table
from dist_vlcl.run.files import replace_file

EPSILONS = {"language": ["1e-3", "1e-4"], "vision": ["5e-4", "1e-4"]}
CONTROL = {"orders.order": "frozen"}
Choice = dict[str, str]  # option -> value


def read_options(words: Sequence[str]) -> tuple[list[str], dict[str, list[str]], list[str]]:
    """Return the options that all runs share, the options with several values, and the seeds."""
    pairs = split_options(words)
    several = {key: value.split(",") for key, value in pairs if "," in value and not value.startswith(("[", "{"))}
    seeds = several.pop("seed", None) or [dict(pairs).get("seed", "0")]
    return [f"{key}={value}" for key, value in pairs if key not in several and key != "seed"], several, seeds


def grid(cfg: Config, several: dict[str, list[str]], fixed: Sequence[str]) -> list[Choice]:
    """Return every combination of the searched options. Raises ValueError if there is nothing to search."""
    if cfg.orders.branch == "none" or cfg.orders.order != "zeroth":
        given = f"orders.branch={cfg.orders.branch}, orders.order={cfg.orders.order}"
        raise ValueError(f"{given}: no unit learns by zeroth order, so there is nothing to tune; choose a plan such as orders=dual_hop_odd")
    searched = {"zo.lr_scale": ["0.1", "1", "10"]}
    searched |= {f"zo.epsilon.{branch}": EPSILONS[branch] for branch in PLAN_BRANCHES[cfg.orders.branch]}
    searched |= {"zo.acceptance": ["always", "best_of_three"]}
    given_once = {key for key, _ in split_options(fixed)}
    searched = {key: values for key, values in (searched | several).items() if key not in given_once}
    if not searched:
        raise ValueError("every option has one value: give some of them several, such as zo.lr_scale=0.1,1,10")
    return [dict(zip(searched, values, strict=True)) for values in itertools.product(*searched.values())]


def command_lines(fixed: Sequence[str], choice: Choice, seeds: Sequence[str], folder: Path, holdout: float) -> list[tuple[str, ...]]:
    """Return the options of a choice's runs, one per seed."""
    words = [f"{key}={value}" for key, value in choice.items()]
    ours = ["tasks.num_tasks=1", f"eval.holdout={holdout}", "run.trackers=[]", f"run.root={folder}/trials"]
    name = "-".join(f"{key.split('.')[-1]}_{value}" for key, value in choice.items())
    return [(*fixed, *words, *ours, f"seed={seed}", f"run.name={name}-seed{seed}") for seed in seeds]


def trials_of(choices: Sequence[Choice], items: Sequence[Sequence[Item]]) -> pd.DataFrame:
    """Return one row per choice and seed: the options, accuracy in percent (NaN for a failed run), and loss over its last quarter."""
    rows = []
    for choice, of_choice in zip(choices, items, strict=True):
        for item in of_choice:
            losses = [record["loss"] for record in read_records(item.folder).steps]
            end = mean(losses[-max(1, len(losses) // 4) :]) if losses and item.is_complete else float("nan")
            rows.append({**choice, "accuracy": 100 * item.accuracy["last"] if item.is_complete else float("nan"), "loss": end})
    return pd.DataFrame(rows)


def write(folder: Path, command: str, fixed: Sequence[str], trials: pd.DataFrame, references: Mapping[str, float]) -> str:
    """Write the tables, the picture and the best choice with the other `zo` options; return what the user should read."""
    choices = ranked(trials)
    best = choices.iloc[0]
    as_good = [name for name, accuracy in references.items() if accuracy >= best.accuracy]
    doubt = f"No better than {' and '.join(as_good)}: the held-out images show no gain from zeroth order." if as_good else ""
    table = trial_table(choices, references)
    note = "Accuracy in % on held-out training images of the first task; test images were not read. The first row is in tuned.yaml."
    replace_file(folder / "tuning.md", f"# {folder.name}\n\n    {command}\n\n{table}\n{note}\n" + (f"\n**{doubt}**\n" if doubt else ""))
    trials.to_csv(folder / "tuning.csv", index=False)
    plot_trials(folder / "tuning.png", trials, choices, references)
    options = dict(split_options([option for option in fixed if option.startswith("zo.")])) | dict(best[trials.columns[:-2]])
    content = OmegaConf.from_dotlist([f"{key}={value}" for key, value in options.items()])
    head = f"# {command}\n# held-out accuracy {best.accuracy:.2f} %, the best of {len(choices)}\n" + (f"# {doubt}\n" if doubt else "")
    replace_file(folder / "tuned.yaml", head + OmegaConf.to_yaml(content))
    advice = f"Train with tuned={folder}/tuned.yaml; the picture is {folder}/tuning.png"
    return "\n".join([f"\n{table}", *([doubt] if doubt else []), advice])


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m dist_vlcl.commands.tune", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("words", nargs="*", metavar="OPTION=VALUE", help="options of dist_vlcl.train; give several values with commas")
    parser.add_argument("--holdout", type=float, default=0.2, metavar="PART", help="part of each class's training images to hold out (0.2)")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="where to write (default: tuning/NAME, after the run's own name)")
    add_launch_options(parser)
    arguments = parser.parse_intermixed_args()
    console = Console()
    try:
        if not 0 < arguments.holdout < 1:
            raise ValueError(f"--holdout {arguments.holdout}: give a number of more than 0 and less than 1")
        fixed, several, seeds = read_options(arguments.words)
        cfg = compose_config(fixed)
        folder = arguments.out or Path("tuning") / cfg.run.name
        choices = grid(cfg, several, fixed)
        control, *items = (prepare(command_lines(fixed, choice, seeds, folder, arguments.holdout)) for choice in (CONTROL, *choices))
    except ValueError as error:
        refuse(error)
    runs, launcher = [*control, *itertools.chain(*items)], launcher_of(arguments)
    if arguments.list:
        print_commands(runs, launcher)
        return
    if LEFT in run_all(runs, launcher, console).values():
        sys.exit(STOPPED)
    trials = trials_of(choices, items)
    if trials.accuracy.isna().all():
        console.print(f"no run was completed; see their messages above, and {folder}/trials")
        sys.exit(1)
    complete = [item.accuracy for item in control if item.is_complete]
    zero_shot = [next(iter(accuracy["zero_shot"].values())) for accuracy in complete if accuracy.get("zero_shot")]
    values = {"the same units frozen": [accuracy["last"] for accuracy in complete], "zero-shot CLIP": zero_shot}
    references = {name: 100 * mean(accuracies) for name, accuracies in values.items() if accuracies}
    command = f"python -m dist_vlcl.commands.tune {masked_command(arguments.words)} --holdout {arguments.holdout}"
    console.print(write(folder, command, fixed, trials, references), highlight=False, markup=False, soft_wrap=True)


if __name__ == "__main__":
    main()
