"""The runs of the paper, their controls and what it leaves out, by id: what `paper=ID` and `tuned=FILE` on a command line mean.

t2-moe-cifar10-dual-hop_odd      a published cell, a line of configs/paper_runs.yaml
t5-moe-dual                      a memory probe of Table 5: a few steps
x2-lora-cifar10-dual-hop_odd     not published: Table 2 with LoRA
frozen-moe-cifar10-dual-hop_odd  the control of every zeroth-order run with these units: they are not trained
zero-shot-cifar10                CLIP as it is; also the control of dual-all, in which nothing else is trained
"""

import difflib
import hashlib
import re
from collections.abc import Iterator, Mapping
from fnmatch import fnmatch, fnmatchcase
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from dist_vlcl.run.folder import MAY_CHANGE

# Beside the package in a checkout, inside of it in a wheel.
CONFIG_FOLDER = next(p for p in (Path(__file__).parents[1] / "configs", Path(__file__).parent / "configs") if (p / "config.yaml").exists())
# What a run's name leaves out: options that do not change its result.
NOT_NAMED = (*MAY_CHANGE, "data.source", "data.test_source", "data.allow_pipe")
PROBE_STEPS = 5


@cache
def published() -> dict[str, Any]:
    """Return paper_runs.yaml."""
    return yaml.safe_load((CONFIG_FOLDER / "paper_runs.yaml").read_text())


def paper_runs() -> dict[str, dict]:
    """Return the published trainings by id."""
    return {run["id"]: run for run in published()["runs"]}


@cache
def catalogue() -> dict[str, dict]:
    """Return every run that has an id, published or not, with the fields of paper_runs.yaml."""
    runs = paper_runs()
    layer_wise = [_as_lora(run) for run in runs.values() if run["table"] == 2]
    zeroth = [run for run in (*runs.values(), *layer_wise) if run["zo_branch"] != "none"]
    more = [*layer_wise, *_probes(), *(_control(run) for run in zeroth)]
    return runs | {run["id"]: run for run in more}


def control_of(id: str) -> str | None:
    """Return the id of the control of a zeroth-order run: the same units not trained; None for a run that has no such units."""
    run = catalogue()[id]
    is_trained = run["zo_variant"] in ("naive", "sign", "conservative", "mozo") and run["table"] != 5
    return _control(run)["id"] if is_trained else None


def zero_shot_of(id: str) -> str:
    """Return the id of the untrained model on the tasks of a run."""
    return f"zero-shot-{_stream(catalogue()[id])}"


def groups() -> dict[str, list[str]]:
    """Return the ids of every group; figure8 is to be run with five seeds."""
    found = catalogue()
    tables = {f"table{n}": [id for id, run in found.items() if run["table"] == n] for n in (1, 2, 3, 4, 5)}
    return {
        **tables,
        "figure8": list(published()["figure8"]["configs"]),
        "all": list(paper_runs()),
        "lora-layers": [id for id in found if id.startswith("x2-")],
        "frozen": sorted({control for id in paper_runs() if (control := control_of(id))}),
        "zero-shot": [id for id in found if id.startswith("zero-shot-")],
    }


def select(patterns: list[str]) -> list[str]:
    """Return the ids that groups, ids and wildcards name, each once, in their order; raise ValueError for a word that names none."""
    chosen: dict[str, None] = {}
    for pattern in patterns:
        ids = groups().get(pattern) or [id for id in catalogue() if fnmatchcase(id, pattern)]
        if not ids:
            near = difflib.get_close_matches(pattern, [*groups(), *catalogue()], 5, 0.3)
            raise ValueError(
                f"paper={pattern!r}: no such run; the nearest are {', '.join(near) or 'none'}. "
                f"Groups: {', '.join(groups())}; or an id, or a wildcard such as 't1-moe-cifar*'"
            )
        chosen |= dict.fromkeys(ids)
    return list(chosen)


def expand_paper(arguments: list[str]) -> list[str]:
    """Return command-line overrides with `tuned=FILE` and `paper=ID` spelled out.

    The user's own overrides come after a cell's, and win; a run's name tells which they are. Options of Hydra stay in front, where argparse
    wants them. Raises ValueError for an id that there is not.
    """
    arguments = [word for argument in arguments for word in _untuned(argument)]
    ids = [a.removeprefix("paper=") for a in arguments if a.startswith("paper=")]
    if not ids:
        return arguments
    if ids[-1] not in catalogue():
        near = difflib.get_close_matches(ids[-1], catalogue(), 5, 0.3)
        raise ValueError(f"paper={ids[-1]!r}: no such run in configs/paper_runs.yaml; the nearest are {', '.join(near) or 'none'}")
    own = [a for a in arguments if not a.startswith(("paper=", "-"))]
    first = next(k for k, argument in enumerate(arguments) if "=" in argument and not argument.startswith("-"))
    return [*arguments[:first], *_overrides(catalogue()[ids[-1]]), f"run.name={run_name(ids[-1], own)}", *arguments[first:]]


def run_name(id: str, own: list[str]) -> str:
    """Return what a run is called: its id and seed, and the user's own overrides, but for places and what cannot change its result.

    Two runs with other overrides have other names, and the same ones, in any order, the same.
    """
    values = dict(word.lstrip("+~").split("=", 1) for word in own if "=" in word)
    seed = values.pop("seed", "0")
    named = {key: value for key, value in values.items() if "/" not in value and not any(fnmatch(key, pattern) for pattern in NOT_NAMED)}
    told = sorted(f"{key}={value}" for key, value in named.items())
    if not told:
        return f"{id}-seed{seed}"
    slug = "-".join(re.sub(r"[^A-Za-z0-9._]+", "_", word.split(".", 1)[-1]) for word in told)[:60]
    digest = hashlib.blake2s("\n".join(told).encode(), digest_size=3).hexdigest()
    return f"{id}-seed{seed}-{slug}-{digest}"


def _untuned(argument: str) -> Iterator[str]:
    """Yield an argument, or for `tuned=FILE` what the file sets."""
    if not argument.startswith("tuned="):
        yield argument
        return
    path = Path(argument.removeprefix("tuned="))
    try:
        content = yaml.safe_load(path.read_text())
    except (OSError, yaml.YAMLError) as error:
        raise ValueError(f"tuned={str(path)!r}: cannot be read ({error}); python -m dist_vlcl.commands.tune writes such a file") from None
    if not isinstance(content, dict):
        raise ValueError(f"tuned={str(path)!r}: holds no options; python -m dist_vlcl.commands.tune writes such a file")
    yield from (f"{key}={'null' if value is None else value}" for key, value in _leaves(content))


def _leaves(content: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in content.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _overrides(run: Mapping[str, Any]) -> list[str]:
    """Return what a run of the catalogue means."""
    layers, variant = run["zo_layers"].removesuffix("6"), run["zo_variant"]
    overrides = [f"data={run['dataset']}", f"tasks.increment={run['inc']}", "model=vit_b16", f"adapter={run['adapter']}"]
    overrides += [f"tasks.order={'natural' if run['dataset'] == 'imagenet_r' else 'paper'}"]
    overrides += [f"train.batch_size={64 if run['dataset'] == 'tiny_imagenet' else 128}"]
    if run["table"] == 5:
        off = ["eval.zero_shot=false", "run.record_every_steps=0", "model.graphs=false"]  # graphs keep memory of their own
        overrides += ["tasks.num_tasks=1", f"train.max_steps={PROBE_STEPS}", *off]
    if variant == "zero_shot":
        return [*overrides, "orders=zero_shot"]
    if run["zo_branch"] == "none":
        return [*overrides, "orders=first"]
    overrides += [f"orders={run['zo_branch']}_{layers}"]
    overrides += ["orders.span=6"] if layers in ("prefix", "suffix") else []
    return [*overrides, "orders.order=frozen" if variant == "frozen" else f"zo={variant}"]


def _stream(run: Mapping[str, Any]) -> str:
    """Return data set and increment, as the ids have them."""
    return {"cifar100": "cifar", "tiny_imagenet": "tiny", "imagenet_r": "imgr"}[run["dataset"]] + str(run["inc"])


def _row(id: str, run: Mapping[str, Any], **changes: Any) -> dict[str, Any]:
    """Return a run like another, of no table and without published numbers."""
    kept = ("dataset", "inc", "tasks", "adapter", "zo_branch", "zo_layers", "zo_variant")
    return {"id": id, "table": None, **{key: run[key] for key in kept}, **changes}


def _as_lora(run: Mapping[str, Any]) -> dict[str, Any]:
    return _row(run["id"].replace("t2-moe-", "x2-lora-"), run, adapter="lora")


def _control(run: Mapping[str, Any]) -> dict[str, Any]:
    branch, layers = run["zo_branch"], run["zo_layers"]
    if (branch, layers) == ("dual", "all"):
        return _row(f"zero-shot-{_stream(run)}", run, adapter="moe", zo_branch="none", zo_layers="none", zo_variant="zero_shot")
    return _row(f"frozen-{run['adapter']}-{_stream(run)}-{branch}-{layers}", run, zo_variant="frozen")


def _probes() -> Iterator[dict[str, Any]]:
    """Yield Table 5's runs: Table 1's CIFAR-100 Inc20, for the paper does not name the data set; memory does not depend on it."""
    for adapter, settings in published()["table5_memory_gb"].items():
        for setting in settings:
            yield _row(f"t5-{adapter}-{setting}", paper_runs()[f"t1-{adapter}-cifar20-{setting}"], table=5)
