"""Train the confirming runs of docs/reproduction.md, one after another: each run for each seed, with a class order of its own.

    python tools/confirm.py                                           the runs of the primary contrasts, CIFAR-100 Inc20, ten seeds
    python tools/confirm.py hybrid frozen --data tiny_imagenet        those of the contrast on Tiny-ImageNet
    python tools/confirm.py defaults --data tiny_imagenet             the paper's defaults and their controls, there
    python tools/confirm.py tuned --seeds 10-12                       the screens' choice for each plan, and its random walks
    python tools/confirm.py tables --seeds 10                         Tables 1, 2 and 4 and Figure 4 on CIFAR-100, once
    python tools/confirm.py --list                                    only print the commands
    dist-vlcl tune data=cifar100 ...                                  the screens before them: the commands in docs/settings.md
    python tools/evidence.py collect runs/confirm/cifar100-* --out docs/results/cifar100.csv

Complete runs are skipped, interrupted ones go on. A run takes half a minute to 14 minutes on a core with 200 training images a class, the
positive control 18 to 53 minutes, the screens' choice three to 39.
"""

import argparse
import re
import sys
from collections.abc import Sequence

from rich.console import Console

from dist_vlcl.commands.sweep import COMPLETE, DONE, launcher_of, prepare, print_commands, run_all
from dist_vlcl.config import errors_refused

DATA = {  # warm-up: a fifth of the steps of a task, with the images that this evidence has
    "cifar100": "data=cifar100 tasks.increment=20 train.warmup_steps=6",
    "tiny_imagenet": "data=tiny_imagenet tasks.increment=20 train.warmup_steps=5",
    "digits": "data=digits",
}
MANY_PROBES = {  # with the defaults and the positive control: every run that configs/contrasts.yaml compares, and first order
    "language": "orders=language_late orders.rest=frozen zo=many_probes",
    "language-many-walk": "orders=language_late orders.rest=frozen zo=many_probes zo.random_signs=true",
    "language-first": "orders=language_late orders.rest=frozen orders.order=first",
    "hybrid": "orders=language_late zo=many_probes",
    "frozen": "orders=language_late orders.order=frozen",
    "hybrid-first": "orders=language_late orders.order=first",
    "walk": "orders=language_late zo=many_probes zo.random_signs=true",
}
LEARNING_RATES = {  # R at other learning rates: for first order, 3e-3 is best by Last and 1e-2 by Avg (docs/settings.md)
    **{f"language-first-lr{lr}": f"{MANY_PROBES['language-first']} first_order.lr={lr}" for lr in ("3e-3", "1e-2")},
    "language-lr3e-3": f"{MANY_PROBES['language']} first_order.lr=3e-3",
}
DEFAULTS = {
    "first": "orders=first",
    "language-default": "orders=language_all zo=conservative",
    "language-frozen": "orders=language_all orders.order=frozen",
    "hop-default": "orders=dual_hop_odd zo=conservative",
    "hop-frozen": "orders=dual_hop_odd orders.order=frozen",
    "hop-mozo": "orders=dual_hop_odd zo=mozo",
    "hop-mozo-walk": "orders=dual_hop_odd zo=mozo zo.random_signs=true",
    "hop-sign": "orders=dual_hop_odd zo=sign",
    "dual-conservative": "orders=dual_all zo=conservative",
    "vision-conservative": "orders=vision_all zo=conservative",
    "vision-frozen": "orders=vision_all orders.order=frozen",
    "language-walk": "orders=language_all zo=naive zo.random_signs=true",
    "hop-walk": "orders=dual_hop_odd zo=naive zo.random_signs=true",
    "dual-walk": "orders=dual_all zo=naive zo.random_signs=true",
    "vision-walk": "orders=vision_all zo=naive zo.random_signs=true",
}
SCREENED = "zo.lr_scale=10 zo.probes={language:64,vision:16}"  # the screens' choice, with fewer probes where one costs most
PLANS = {"language": "language_all", "vision": "vision_all", "dual": "dual_all", "hop": "dual_hop_odd"}
TUNED_OVER_TASKS = "orders=language_all zo=sign zo.lr_scale=3 zo.probes=64"
TUNED = {
    **{f"{name}-tuned": f"orders={orders} zo=sign {SCREENED}" for name, orders in PLANS.items()},
    "language-tuned-all": TUNED_OVER_TASKS,
    "language-tuned-all-walk": f"{TUNED_OVER_TASKS} zo.random_signs=true",
    "hop-mozo-tuned": f"orders=dual_hop_odd zo=mozo {SCREENED}",
    **{f"{name}-tuned-walk": f"orders={orders} zo=sign {SCREENED} zo.random_signs=true" for name, orders in PLANS.items()},
}
POSITIVE_CONTROL = {
    "ten-times": "orders=dual_all zo=conservative train.epochs=10",
    "ten-times-first": "orders=first train.epochs=10",
}
BRANCHES, LAYERS = ("dual", "vision", "language"), ("hop_odd", "hop_even", "prefix", "suffix")
TABLES = {
    **{f"{branch}-{zo}": f"orders={branch}_all zo={zo}" for branch in BRANCHES for zo in ("conservative", "naive", "sign")},
    **{f"{branch}-lora": f"orders={branch}_all zo=conservative adapter=lora" for branch in BRANCHES},
    **{f"{branch}-{layers}": f"orders={branch}_{layers} zo=conservative" for branch in BRANCHES for layers in LAYERS},
    "first": DEFAULTS["first"],
    **{f"language-{layers}-unit": f"orders=language_{layers} zo=conservative zo.granularity=unit" for layers in LAYERS},
    "first-lora": "orders=first adapter=lora",
}
GROUPS = {
    "many-probes": MANY_PROBES,
    "learning-rates": LEARNING_RATES,
    "defaults": DEFAULTS,
    "tuned": TUNED,
    "positive-control": POSITIVE_CONTROL,
    "tables": TABLES,
}
OF_CONTRASTS = ("many-probes", "defaults", "positive-control")
RUNS = {name: options for group in GROUPS.values() for name, options in group.items()}


def commands(names: Sequence[str], data: str, seeds: list[int] | None = None) -> list[tuple[str, ...]]:
    """Return the options of each run. names: groups and runs of GROUPS. seeds: None for those of docs/reproduction.md."""
    runs: dict[str, str] = {}
    for name in names:
        runs |= GROUPS.get(name) or {name: RUNS[name]}
    return [
        (
            *DATA[data].split(),
            *options.split(),
            f"seed={seed}",
            f"tasks.order=seed:{seed}",
            "run.root=runs/confirm",
            f"run.name={data}-{name}-s{seed}",
        )
        for name, options in runs.items()
        for seed in seeds or (range(20, 30) if name in MANY_PROBES | LEARNING_RATES else range(10, 20))
    ]


def seeds_of(text: str) -> list[int]:
    """Read 10-19 or 10,12."""
    if not re.fullmatch(r"\d+-\d+|\d+(,\d+)*", text):
        raise argparse.ArgumentTypeError(f"{text}: give a range such as 10-19, or seeds such as 10,12")
    first, _, last = text.partition("-")
    if last and int(last) < int(first):
        raise argparse.ArgumentTypeError(f"{text}: the first seed must be the smallest")
    return list(range(int(first), int(last) + 1)) if last else [int(seed) for seed in text.split(",")]


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = [*GROUPS, *RUNS]
    names = f"groups: {', '.join(GROUPS)} (default: {', '.join(OF_CONTRASTS)}); or single runs of these (see --list)"
    parser.add_argument("names", nargs="*", metavar="RUN", help=names)
    parser.add_argument("--data", choices=DATA, default="cifar100", help="(default: %(default)s)")
    parser.add_argument("--seeds", type=seeds_of, metavar="10-19", help="or 10,12 (default: 20-29 for the first two groups, else 10-19)")
    parser.add_argument("--list", action="store_true", help="print the command of every run, and train nothing")
    parser.add_argument("--processes", type=int, metavar="N", help="processes of each run (default: one per GPU of this machine, or one)")
    parser.add_argument("--launcher", metavar="COMMAND", help="instead of accelerate launch, such as 'torchrun --nproc_per_node 2'")
    arguments = parser.parse_args()
    if odd := [name for name in arguments.names if name not in known]:
        parser.error(f"{odd[0]}: choose from {', '.join(known)}")
    with errors_refused():
        items = prepare(commands(arguments.names or OF_CONTRASTS, arguments.data, arguments.seeds))
    launcher = launcher_of(arguments)
    if arguments.list:
        print_commands(items, launcher)
        return 0
    return int(not set(run_all(items, launcher, Console()).values()) <= {COMPLETE, DONE})


if __name__ == "__main__":
    sys.exit(main())
