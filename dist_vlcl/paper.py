"""The paper's catalogue of runs, their controls and some runs beyond it, by id. `paper=ID` is translated here.

`t2-moe-cifar10-dual-hop_odd`      A published cell: one line of configs/paper_runs.yaml.
`t5-moe-dual`                      A memory probe of Table 5: five steps.
`x2-lora-cifar10-dual-hop_odd`     Not published: Table 2 with LoRA.
`frozen-moe-cifar10-dual-hop_odd`  The control of every run that trains these units by zeroth order. Here they are frozen.
`walk-moe-cifar10-dual-hop_odd`    A control: the same directions and lengths, with random signs; `signwalk-...` for sign steps.
`sign-moe-cifar10-dual-hop_odd`    The sign strategy beside a plan that was run with MoZO.
`zero-shot-cifar10`                CLIP without training. Also the control of dual-all, where no other unit learns.
"""

import difflib
import hashlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from dist_vlcl.options import matches
from dist_vlcl.saved import MAY_CHANGE

# Beside the package in a checkout, inside of it in a wheel.
CONFIG_FOLDER = next(p for p in (Path(__file__).parents[1] / "configs", Path(__file__).parent / "configs") if (p / "config.yaml").exists())
# Options that do not change a run's result are not part of its name.
NOT_NAMED = (*MAY_CHANGE, "data.source", "data.allow_pipe")
DATASET_IDS = {"cifar100": "cifar", "tiny_imagenet": "tiny", "imagenet_r": "imgr"}  # as the ids abbreviate them
HALF = 6  # blocks of prefix and suffix in the paper; its ids say prefix6 and suffix6
PROBE_CLASSES = 125  # as in benchmarks.memory, with 64 images
# The random walk of each strategy, and the strategy whose options a random walk has.
WALK_OF = {"naive": "walk", "conservative": "walk", "sign": "signwalk", "mozo": "signwalk", "many_probes": "manywalk"}
WALKED_BY = {"walk": "naive", "signwalk": "sign", "manywalk": "many_probes"}


@dataclass(frozen=True)
class Cell:
    """One row of the catalogue: what is trained, how, on which tasks. The rows of paper_runs.yaml have the same fields.

    `last` and `avg` are the paper's accuracies in percent, or None.
    """

    id: str
    dataset: str
    increment: int  # classes per task; 0 where each task is a data set of its own
    adapter: str  # "" where nothing is trained
    branch: str  # whose units learn by zeroth order: dual, vision, language; none
    layers: str  # which of them: all, hop_odd, hop_even, prefix, suffix; none
    variant: str  # naive, sign, conservative, mozo; frozen, ...walk: controls; none: first order everywhere; zero_shot: no training
    table: int | None = None
    last: float | None = None
    avg: float | None = None

    @property
    def tasks_id(self) -> str:
        """Data set and increment as the ids abbreviate them, such as cifar10."""
        return f"{DATASET_IDS.get(self.dataset, self.dataset)}{self.increment}"

    def control(self) -> "Cell | None":
        """Return the run in which the zeroth-order units are not trained; None for a run without such units and for memory probes."""
        if self.variant not in WALK_OF or self.table == 5:
            return None
        return self.zero_shot() if (self.branch, self.layers) == ("dual", "all") else self._with("frozen")

    def controls(self) -> list["Cell"]:
        """Return every run that this one is compared with: frozen units, a random walk, zero-shot and, for MoZO, the sign strategy."""
        if self.table == 5:
            return []
        found = [control] if (control := self.control()) else []
        found += [self._with(WALK_OF[self.variant])] if self.variant in WALK_OF else []
        return [*found, *([self._with("sign")] if self.variant == "mozo" else []), self.zero_shot()]

    def _with(self, variant: str) -> "Cell":
        """Return the unpublished cell with the same units and another variant."""
        layers = f"{self.layers}{HALF}" if self.layers in ("prefix", "suffix") else self.layers
        return _beyond(self, f"{variant}-{self.adapter}-{self.tasks_id}-{self.branch}-{layers}", variant=variant)

    def zero_shot(self) -> "Cell":
        """Return the untrained model on the same tasks."""
        return _beyond(self, f"zero-shot-{self.tasks_id}", adapter="", branch="none", layers="none", variant="zero_shot")

    def overrides(self) -> list[str]:
        """Return the Hydra overrides that mean this cell: the only place where a row of the catalogue becomes a configuration.

        A data set, adapter, plan or strategy that has no file in configs/ (the user's own) gets the nearest that has one.
        """
        found = [f"data={self.dataset}"] if _has_config("data", self.dataset) else ["data=folder", f"data.name={self.dataset}"]
        found += [f"tasks.increment={self.increment}"] if self.increment else []
        found += ["model=vit_b16", f"adapter={self.adapter if _has_config('adapter', self.adapter) else 'moe'}"]
        if self.dataset in DATASET_IDS:
            found += [f"tasks.order={'natural' if self.dataset == 'imagenet_r' else 'paper'}"]
            found += [f"train.batch_size={64 if self.dataset == 'tiny_imagenet' else 128}"]
        if self.table == 5:
            found += ["tasks.num_tasks=1", "train.max_steps=5"]
            found += ["eval.zero_shot=false", "run.record_every_steps=0", "model.graphs=false"]  # each of these takes memory
        if self.branch == "none":
            return [*found, f"orders={'zero_shot' if self.variant == 'zero_shot' else 'first'}"]
        plan = f"{self.branch}_{self.layers}"
        found += [f"orders={plan if _has_config('orders', plan) else f'{self.branch}_all'}"]
        found += [f"orders.span={HALF}"] if self.layers in ("prefix", "suffix") else []
        if self.variant == "frozen":
            return [*found, "orders.order=frozen"]
        if self.variant in WALKED_BY:
            return [*found, f"zo={WALKED_BY[self.variant]}", "zo.random_signs=true"]
        return [*found, f"zo={self.variant if _has_config('zo', self.variant) else 'naive'}"]


def _has_config(group: str, name: str) -> bool:
    return bool(re.fullmatch(r"\w+", name)) and (CONFIG_FOLDER / group / f"{name}.yaml").exists()


def cell_of(config: Mapping[str, Any]) -> Cell:
    """Return the cell that a resolved configuration realises, without an id or published numbers.

    Its `paper` id is not read: options given beside it may have made it a run of another cell.
    """
    orders, adapter, tasks = config["orders"], config["adapter"], config["tasks"]
    branch, order, rest = orders["branch"], orders["order"], orders["rest"]
    if isinstance(rest, Mapping):  # first in one branch and frozen in the other is neither; without zeroth order it is a frozen control
        rest = rest["vision"] if rest["vision"] == rest["language"] else "frozen" if order == "first" else "mixed"
    layers = orders["layers"] if isinstance(orders["layers"], str) else str(orders["layers"]).replace(" ", "")
    if re.search("prefix|suffix", layers) and orders.get("span") not in (None, HALF):
        layers += str(orders["span"])
    # a user's adapter may have options of any name
    kind = adapter.get("kind", "").replace(":", ".") or ("lora" if "rank" in adapter else "moe" if "experts" in adapter else "other")
    strategy = config["zo"]["name"]
    if config["zo"].get("random_signs"):
        strategy = {"many_probes": "manywalk"}.get(strategy, "signwalk" if config["zo"]["transform"] == "sign" else "walk")
    cell = Cell("", config["data"]["name"], 0 if tasks.get("sets") else tasks["increment"], kind, branch, layers, strategy)
    order = rest if branch == "none" else order
    if branch == "none" or order == rest or (branch, layers) == ("dual", "all"):  # every unit has the same order
        if order == "zeroth":
            return replace(cell, branch="dual", layers="all")
        return replace(cell, branch="none", layers="none", variant="none") if order == "first" else replace(cell.zero_shot(), id="")
    if order == "first" or rest == "zeroth":  # the plan names the other units than those that the run is about
        beside = " (first order)" if order == "first" and rest == "zeroth" else ""  # otherwise the others are frozen, or learn alone
        cell, order = replace(cell, branch="dual", layers=f"all but {branch} {layers}{beside}"), rest
    return replace(cell, variant="frozen") if order == "frozen" else cell


@cache
def published() -> dict[str, Any]:
    """Return paper_runs.yaml. This is the only place that reads it."""
    return yaml.safe_load((CONFIG_FOLDER / "paper_runs.yaml").read_text())


@cache
def paper_runs() -> dict[str, Cell]:
    """Return the published trainings by id."""
    return {row["id"]: Cell(**row) for row in published()["runs"]}


@cache
def catalogue() -> dict[str, Cell]:
    """Return every run that has an id, published or not."""
    runs = list(paper_runs().values())
    with_lora = [_beyond(cell, cell.id.replace("t2-moe-", "x2-lora-"), adapter="lora") for cell in runs if cell.table == 2]
    # The paper does not name the data set of its memory table. Tiny-ImageNet has the batch and enough classes for our memory benchmark.
    probed = [(adapter, setting) for adapter, settings in published()["table5_memory_gb"].items() for setting in settings]
    probes = [_beyond(paper_runs()[f"t1-{a}-tiny20-{s}"], f"t5-{a}-{s}", table=5, increment=PROBE_CLASSES) for a, s in probed]
    controls = [control for cell in (*runs, *with_lora) for control in cell.controls()]
    return {cell.id: cell for cell in (*runs, *with_lora, *probes, *controls)}


def _beyond(cell: Cell, id: str, **changes: Any) -> Cell:
    """Return a cell like another that is in none of the accuracy tables."""
    return replace(cell, **{"id": id, "table": None, "last": None, "avg": None, **changes})


def groups() -> dict[str, list[str]]:
    """Return the ids of every group. The paper ran figure8 with five seeds."""
    found = catalogue()
    return {
        **{f"table{n}": [id for id, cell in found.items() if cell.table == n] for n in (1, 2, 3, 4, 5)},
        "figure8": list(published()["figure8"]["configs"]),
        "all": list(paper_runs()),
        "lora-layers": [id for id in found if id.startswith("x2-")],
        "frozen": sorted({control.id for cell in paper_runs().values() if (control := cell.control())}),
        "walks": [id for id in found if id.startswith(("walk-", "signwalk-"))],
        "zero-shot": [id for id in found if id.startswith("zero-shot-")],
    }


def select(patterns: list[str]) -> list[str]:
    """Return the ids that groups, ids and wildcards name, each once, in order. Raises ValueError for a pattern that matches nothing."""
    chosen: dict[str, None] = {}
    for pattern in patterns:
        ids = groups().get(pattern) or [id for id in catalogue() if fnmatchcase(id, pattern)]
        if not ids:
            allowed = f"Give a group ({', '.join(groups())}), an id, or a wildcard such as 't1-moe-cifar*'"
            raise ValueError(f"{_no_such_run(pattern, [*groups(), *catalogue()])}. {allowed}")
        chosen |= dict.fromkeys(ids)
    return list(chosen)


def _no_such_run(name: str, known: Iterable[str]) -> str:
    return f"paper={name!r}: no such run; the nearest are {', '.join(difflib.get_close_matches(name, known, 5, 0.3)) or 'none'}"


def expand_paper(arguments: list[str]) -> list[str]:
    """Return command-line overrides with `paper=ID` replaced by the overrides that it stands for.

    The user's own overrides come after those of a cell, and win; the run's name shows them. Raises ValueError for an unknown id.
    """
    ids = [a.removeprefix("paper=") for a in arguments if a.startswith("paper=")]
    if not ids:
        return arguments
    if ids[-1] not in catalogue():
        if ids[-1] in groups():
            raise ValueError(f"paper={ids[-1]}: a group of runs; train it by dist-vlcl sweep paper={ids[-1]}")
        raise ValueError(f"{_no_such_run(ids[-1], catalogue())}. Ids are in configs/paper_runs.yaml")
    own = [a for a in arguments if not a.startswith("paper=")]
    return [*catalogue()[ids[-1]].overrides(), f"run.name={run_name(ids[-1], own)}", *arguments]


def run_name(id: str, own: list[str]) -> str:
    """Return the name of a run: its id, its seed and the user's own overrides, without paths and without what cannot change its result.

    Runs with different overrides have different names. The order of the overrides does not matter.
    """
    values = dict(option.lstrip("+~").split("=", 1) for option in own if "=" in option)
    seed = values.pop("seed", "0")
    named = {key: value for key, value in values.items() if "/" not in value and not matches(key, NOT_NAMED)}
    options = sorted(f"{key}={value}" for key, value in named.items())
    if not options:
        return f"{id}-seed{seed}"
    slug = "-".join(re.sub(r"[^A-Za-z0-9._]+", "_", option.split(".", 1)[-1]) for option in options)[:60]
    digest = hashlib.blake2s("\n".join(options).encode(), digest_size=3).hexdigest()
    return f"{id}-seed{seed}-{slug}-{digest}"
