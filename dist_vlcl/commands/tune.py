"""Choose zeroth-order options on the first task:  python -m dist_vlcl.commands.tune [OPTION=VALUE[,VALUE...] ...]

    python -m dist_vlcl.commands.tune data=cifar100 orders=dual_hop_odd zo=mozo
    python -m dist_vlcl.commands.tune paper=t3-moe-cifar10-mozo-hop_odd seed=0,1 zo.lr_scale=0.3,1,3 zo.epsilon.language=1e-3
    accelerate launch -m dist_vlcl.train data=cifar100 orders=dual_hop_odd zo=mozo tuned=tuning/NAME/tuned.yaml

Every combination of the options with several values is a run of the first task, judged on held-out images of its training set; test
images are never read. Searched unless you say otherwise: zo.lr_scale=0.1,1,10 (the zeroth-order learning rate over the first-order one),
zo.epsilon.BRANCH=1e-3,1e-4 (vision: 5e-4,1e-4) and zo.acceptance=always,best_of_three. One value is no search: zo.acceptance=always.
With several seeds, each choice is judged by their mean.

Writes tuning/NAME/: tuned.yaml, which a run or a sweep takes as tuned=FILE; tuning.md, tuning.csv and tuning.png, with the same units
frozen and zero-shot CLIP beside the choices; and the trials' folders. Trials that are done are not repeated; one that fails is left out.
"""

import argparse
import contextlib
import itertools
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import yaml
from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from rich.console import Console

from dist_vlcl.commands.sweep import FAILED, STOPPED, Item, add_launch_options, prepare, print_lines, run_all, runner_of
from dist_vlcl.config import CONFIG_FOLDER, Config, expand_paper, format_error, from_hydra
from dist_vlcl.masking import masked, masked_command
from dist_vlcl.orders import PLAN_BRANCHES
from dist_vlcl.report.records import read_records
from dist_vlcl.report.trials import Trial, plot_trials, ranked, trial_table, write_csv
from dist_vlcl.run.files import replace_file

EPSILONS = {"language": ["1e-3", "1e-4"], "vision": ["5e-4", "1e-4"]}
Choice = dict[str, str]  # option -> value


def read_words(words: Sequence[str]) -> tuple[list[str], dict[str, list[str]], list[str]]:
    """Return the words that are the same for every trial, the options with several values, and the seeds."""
    if wrong := [word for word in words if "=" not in word]:
        raise ValueError(f"{wrong[0]!r}: an option is OPTION=VALUE, such as zo.lr_scale=0.1,1")
    pairs = [word.split("=", 1) for word in words]
    several = {key: value.split(",") for key, value in pairs if "," in value and not value.startswith(("[", "{"))}
    seeds = several.pop("seed", None) or [dict(pairs).get("seed", "0")]
    return [f"{key}={value}" for key, value in pairs if key not in several and key != "seed"], several, seeds


def grid(cfg: Config, several: dict[str, list[str]], fixed: Sequence[str]) -> list[Choice]:
    """Return every combination of what is searched; raise ValueError where there is nothing to search."""
    if cfg.orders.branch == "none" or cfg.orders.order != "zeroth":
        raise ValueError(
            f"orders.branch={cfg.orders.branch}, orders.order={cfg.orders.order}: no unit learns by zeroth order; nothing to tune"
        )
    searched = {"zo.lr_scale": ["0.1", "1", "10"]}
    searched |= {f"zo.epsilon.{branch}": EPSILONS[branch] for branch in PLAN_BRANCHES[cfg.orders.branch]}
    searched |= {"zo.acceptance": ["always", "best_of_three"]}
    told = {word.split("=", 1)[0] for word in fixed}
    searched = {key: values for key, values in (searched | several).items() if key not in told}
    if not searched:
        raise ValueError("every option has one value: give some of them several, such as zo.lr_scale=0.1,1,10")
    return [dict(zip(searched, values, strict=True)) for values in itertools.product(*searched.values())]


def commands(fixed: Sequence[str], choice: Choice, seeds: Sequence[str], folder: Path, holdout: float) -> list[tuple[str, ...]]:
    """Return the words of a choice's trials, one a seed."""
    words = [f"{key}={value}" for key, value in choice.items()]
    ours = ["tasks.num_tasks=1", f"eval.holdout={holdout}", "run.wandb=off", f"run.root={folder}/trials"]
    name = "-".join(f"{key.split('.')[-1]}_{value}" for key, value in choice.items())
    return [(*fixed, *words, *ours, f"seed={seed}", f"run.name={name}-seed{seed}") for seed in seeds]


def trial_of(choice: Choice, items: Sequence[Item]) -> Trial:
    """Return what the finished runs of a choice have shown; their loss is that of the last quarter of their steps."""
    done = [item for item in items if item.is_complete]
    losses = [[record["loss"] for record in read_records(item.folder).steps] for item in done]
    ends = [mean(of_run[-max(1, len(of_run) // 4) :]) for of_run in losses if of_run]
    return Trial(choice, [item.accuracy["last"] for item in done], mean(ends) if ends else None)


def write(folder: Path, command: str, fixed: Sequence[str], trials: Sequence[Trial], references: dict[str, float]) -> Path:
    """Write tables and picture, and the best choice with the other `zo` options as a file; return its path."""
    best = trials[0]
    doubt = warning(best, references)
    table = trial_table(trials, references).markdown()
    note = "Accuracy in % on held-out training images of the first task; test images were not read. The first row is in tuned.yaml."
    replace_file(folder / "tuning.md", f"# {folder.name}\n\n    {command}\n\n{table}\n{note}\n" + (f"\n**{doubt}**\n" if doubt else ""))
    write_csv(folder / "tuning.csv", trials)
    plot_trials(folder / "tuning.png", trials, references)
    content: dict[str, Any] = {}
    given = dict(word.split("=", 1) for word in fixed if word.startswith("zo."))
    for key, value in (given | dict(best.options)).items():
        *parents, leaf = key.split(".")
        inner = content
        for parent in parents:
            inner = inner.setdefault(parent, {})
        inner[leaf] = _read(value)
    head = f"# {command}\n# held-out accuracy {100 * (best.accuracy or 0):.2f} %, the best of {len(trials)}\n"
    head += f"# {doubt}\n" if doubt else ""
    replace_file(folder / "tuned.yaml", head + yaml.safe_dump(content, sort_keys=False))
    return folder / "tuned.yaml"


def warning(best: Trial, references: Mapping[str, float]) -> str:
    """Return what speaks against a choice: that what it is compared with does as well; nothing where nothing does."""
    as_good = [name for name, value in references.items() if value >= (best.accuracy or 0)]
    return f"No better than {' and '.join(as_good)}: zeroth order adds nothing that the held-out images show." if as_good else ""


def _read(text: str) -> Any:
    """Return the value that Hydra would read: YAML 1.1 takes 1e-3 for a word."""
    value = yaml.safe_load(text)
    with contextlib.suppress(ValueError):
        return float(value) if isinstance(value, str) else value
    return value


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        prog="dist_vlcl.commands.tune", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "words", nargs="*", metavar="OPTION=VALUE", help="options of dist_vlcl.train; several values with commas are searched"
    )
    parser.add_argument("--holdout", type=float, default=0.2, metavar="PART", help="part of each class's training images to judge on (0.2)")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="default: tuning/NAME, after the run's own name")
    parser.add_argument("--list", action="store_true", help="print the trials, and train nothing")
    add_launch_options(parser)
    arguments = parser.parse_intermixed_args()
    console = Console()
    try:
        if not 0 < arguments.holdout < 1:
            raise ValueError(f"--holdout {arguments.holdout}: choose a part between 0 and 1")
        fixed, several, seeds = read_words(arguments.words)
        with initialize_config_dir(str(CONFIG_FOLDER), version_base=None):
            cfg = from_hydra(compose("config", expand_paper(fixed)))
        folder = arguments.out or Path("tuning") / cfg.run.name
        choices = [{"orders.order": "frozen"}, *grid(cfg, several, fixed)]
        of_choice = [prepare(commands(fixed, choice, seeds, folder, arguments.holdout)) for choice in choices]
    except (ValueError, HydraException) as error:
        print(masked(f"error: {format_error(error) if isinstance(error, HydraException) else error}"), file=sys.stderr)
        sys.exit(2)
    runner = runner_of(arguments)
    if arguments.list:
        print_lines(shlex.join(runner.command(item)) for item in itertools.chain(*of_choice))
        return
    fates = run_all(list(itertools.chain(*of_choice)), runner, console)
    if runner.is_stopped:
        console.print("stopped by a signal; the same command goes on from here")
        sys.exit(STOPPED)
    frozen, *trials = (trial_of(choice, items) for choice, items in zip(choices, of_choice, strict=True))
    if not any(trial.accuracies for trial in trials):
        console.print(f"no trial came to its end; see what they said above, and {folder}/trials")
        sys.exit(1)
    references = {"the same units frozen": frozen.accuracy} if frozen.accuracy is not None else {}
    if zero_shot := [next(iter(item.accuracy["zero_shot"].values())) for item in of_choice[0] if item.accuracy.get("zero_shot")]:
        references["zero-shot CLIP"] = mean(zero_shot)
    command = f"python -m dist_vlcl.commands.tune {masked_command(arguments.words)} --holdout {arguments.holdout}"
    tuned = write(folder, command, fixed, ranked(trials), references)
    console.print(f"\n{trial_table(ranked(trials), references).markdown()}", highlight=False, markup=False, soft_wrap=True)
    if failed := [item.folder.name for item, fate in fates.items() if fate.startswith(FAILED)]:
        console.print(f"failed and left out: {', '.join(failed)}", highlight=False, soft_wrap=True)
    if doubt := warning(ranked(trials)[0], references):
        console.print(doubt, highlight=False, soft_wrap=True)
    console.print(f"Train with tuned={tuned}; the picture is {folder}/tuning.png", highlight=False, soft_wrap=True)


if __name__ == "__main__":
    main()
