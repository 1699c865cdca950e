"""Read run folders, complete or not: as records, and as tidy data frames with one row per run, per step or per unit."""

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from math import nan
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow

from dist_vlcl import saved
from dist_vlcl.config import compose_config
from dist_vlcl.options import flatten, matches
from dist_vlcl.paper import WALKED_BY, Cell, cell_of
from dist_vlcl.reading import fits
from dist_vlcl.report.measures import MEASURES, measures_of

TASKS = ["dataset", "increment"]
CELL = [*TASKS, "adapter", "branch", "layers", "variant"]  # the fields of paper.Cell that say what a run is
UNTRAINED = {"adapter": "", "branch": "none", "layers": "none", "variant": "zero_shot"}  # CLIP as it was downloaded
WITHOUT_ZEROTH = ("none", "zero_shot", "frozen")  # variants in which no unit is moved by zeroth order
CONTROLS = ("frozen", *WALKED_BY)  # variants in which the units that a run is about learn nothing
IMAGES_PER_CLASS = {"cifar100": (500, 100), "tiny_imagenet": (500, 50), "imagenet_r": (120, 30)}  # training, test; the last on average
PART_OF_TRAINING, PART_OF_TEST = "only a part of the training images", "only a part of the test images"

# Options that do not change a result or its meaning, and those that are the cell itself.
NOT_COMPARED = (*saved.MAY_CHANGE, "seed", "paper", "eval.zero_shot", "data.source", "data.reader", "data.samples_per_shard", "zo.name")
NOT_COMPARED += ("train.micro_batches", "orders.branch", "orders.layers", "orders.order", "orders.span", "adapter.kind", "tasks.increment")
OF_METHOD = ("adapter.*", "orders.*", "zo.*")
OF_TRAINING = ("train.*", "first_order.*", "model.loss", PART_OF_TRAINING)
OF_PROBES = ("train.max_steps", "tasks.num_tasks", PART_OF_TRAINING, PART_OF_TEST)  # these do not change the memory of a step

Records = Mapping[str, Sequence[Mapping[str, Any]]]  # kind (step, task) -> the lines of metrics.jsonl


def read_records(folder: Path | str, last: int | None = None) -> Records:
    """Return the records of metrics.jsonl by kind (step, task). last: the run's last step. Leaves out damaged lines, with a warning."""
    records = saved.read_steps(Path(folder) / "metrics.jsonl", saved.METRICS_FORM, last)
    return {kind: [record for record in records if record["kind"] == kind] for kind in ("step", "task")}


def read_units(folder: Path | str) -> pyarrow.Table:
    """Return the records of every unit of a run folder in the order of the steps; an empty table where there are none.

    `step` (int64)                    From 1.
    `task` (int32)                    From 0.
    `branch` (string)                 The name of the tower.
    `layer` (int32)                   From 1.
    `order` (string)                  One of first, zeroth, frozen.
    `numel` (int32)                   The number of the unit's parameters.
    `gradient_norm` (float32)         Of the first-order gradient, or of the zeroth-order estimate before its sign. NaN for a frozen unit.
    `gradient_mean` (float32)         Likewise.
    `gradient_variance` (float32)     Likewise.
    `update_norm` (float32)           Of the change that the step made.
    `update_mean` (float32)           Likewise.
    `update_variance` (float32)       Likewise.
    `parameter_norm` (float32)        After the step.
    `projected_gradient` (float32)    Its size, mean over probes. Null for a unit that does not learn by zeroth order.

    A skipped step has no rows. Raises ValueError that names a damaged file.
    """
    parts = sorted(Path(folder, "units").glob("step-*.parquet"))
    return pyarrow.concat_tables(map(saved.read_unit_records, parts), promote_options="default") if parts else pyarrow.table({})


def run_frame(folders: Iterable[Path]) -> tuple[pd.DataFrame, dict[str, str]]:
    """Return one row per run folder, and for every other folder its name with the reason why it could not be read.

    The fields CELL say which cell a run's configuration realises. Accuracies are in percent. `other_settings` says in which options it
    differs from the cell's configuration, such as "model.name=small_clip; zo.lr_scale=3.0". It is also split: `method_settings` (adapter,
    orders, zo), `shared_settings` (all others; runs are only compared where these are equal) and `model_settings` (the shared ones that
    matter without training). The columns MEASURES say what the zeroth-order steps contributed.
    """
    rows, unreadable = [], {}
    for folder in dict.fromkeys(folders):
        try:
            rows.append(_run_row(folder))
        except FileNotFoundError:
            unreadable[folder.name] = "not a run folder: it has no config.yaml"
        except (OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError) as error:
            unreadable[folder.name] = f"could not read its files: {next(iter(str(error).splitlines()), '')}"
    frame = pd.DataFrame(rows)
    if rows:
        is_shared = frame.groupby("dataset").data.transform("nunique") > 1  # one name for several sets of images
        for key in ("other_settings", "shared_settings", "model_settings"):
            frame[key] = frame[key].mask(is_shared, (frame[key] + "; shards " + frame.data.str[:6].fillna("?")).str.removeprefix("; "))
    return frame, unreadable


def _run_row(folder: Path) -> dict[str, Any]:
    config = saved.read_config(folder / "config.yaml")
    if not fits(config, saved.RUN_FORM):
        raise ValueError(f"{folder}/config.yaml is damaged: its values have other types than dist_vlcl writes")
    accuracy = saved.read_accuracy(folder, config)
    cell = cell_of(config)
    steps = step_frame(folder, accuracy.get("steps"))
    units = read_units(folder).to_pandas()  # damaged records raise here, where one run is left out by name
    before, last = accuracy.get("zero_shot") or {}, accuracy.get("steps")
    journal = [] if cell.variant in WITHOUT_ZEROTH else saved.read_steps(folder / "journal.jsonl", saved.JOURNAL_FORM, last)
    zero_shot = [100 * before[task] for task in sorted(before, key=int)]
    is_probe = config["train"].get("max_steps") is not None
    settings = _differing(config, _configuration_of(cell), cell.variant) | _missing_images(config, accuracy)
    settings = {key: text for key, text in settings.items() if not (is_probe and key in OF_PROBES)}
    parts = {
        "other_settings": list(settings.values()),
        "method_settings": [text for key, text in settings.items() if matches(key, OF_METHOD)],
        "shared_settings": [text for key, text in settings.items() if not matches(key, OF_METHOD)],
        "model_settings": [text for key, text in settings.items() if not matches(key, (*OF_METHOD, *OF_TRAINING))],
    }
    return {
        "run": folder.name,
        **{field: getattr(cell, field) for field in CELL},
        "seed": int(config["seed"]),
        **{metric: 100 * accuracy.get(metric, nan) for metric in ("last", "avg", "forgetting")},
        "zero_shot_last": zero_shot[-1] if zero_shot else nan,
        "zero_shot_avg": sum(zero_shot) / len(zero_shot) if zero_shot else nan,
        **{key: accuracy.get(key) for key in ("steps", "seconds")},
        **dict.fromkeys(MEASURES, nan),
        **measures_of(steps, journal, units, config["zo"]),
        **steps[["peak_gib", "allocated_gib"]].max(),
        "is_complete": accuracy.get("complete") is True,
        "is_probe": is_probe,  # stopped after a few steps: only its memory counts
        "tasks_done": len(accuracy.get("rows", ())),
        **{name: "; ".join(texts) for name, texts in parts.items()},
        "data": saved.digest_at_start(folder, "data") or None,
        "path": folder,
    }


@cache
def _configuration_of(cell: Cell) -> dict[str, Any]:
    """Return the resolved configuration of a cell: the paper's, and for data that the paper does not use our defaults."""
    return compose_config(cell.overrides()).as_dict()


def _differing(config: Mapping[str, Any], reference: Mapping[str, Any], variant: str) -> dict[str, str]:
    """Return the options, as key=value, in which a configuration differs from its cell's and that its method reads."""
    unread: dict[str, tuple[str, ...]] = dict.fromkeys(WITHOUT_ZEROTH, ("zo.*",)) | {"zero_shot": (*OF_METHOD, *OF_TRAINING)}
    # random signs always take the step
    unread |= dict.fromkeys(WALKED_BY, ("zo.acceptance",)) | {"signwalk": ("zo.acceptance", "zo.epsilon.*")}
    ours, cell = _flat(config), _flat(reference)
    prefixes = ("zo.estimator_options.", *(("adapter.",) if config["adapter"].get("kind") else ()))
    own = {key for key in ours if key.startswith(prefixes)}  # of a user's own classes: the cell has none
    # An option that only one of the two has belongs to another version, such as zo.update of 0.1.
    keys = [key for key in ours if key in {*cell, *own} and not matches(key, (*NOT_COMPARED, *unread.get(variant, ())))]
    return {key: f"{key}={_text(ours, key)}" for key in sorted(keys) if key in own or _text(ours, key) != _text(cell, key)}


def _flat(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return every option under its dotted key. Orders and probes per branch are one option each.

    Where one branch alone reads the probes, they are its number.
    """
    orders, zo = config["orders"], config.get("zo", {})
    probes = zo.get("probes")
    if isinstance(probes, Mapping):
        zo = {**zo, "probes": probes.get(orders["branch"], _as_one(probes))}
    return flatten({**config, "orders": {**orders, "rest": _as_one(orders["rest"])}, "zo": zo})


def _as_one(value: Any) -> str:
    equal = set(map(str, value.values() if isinstance(value, Mapping) else [value]))
    return equal.pop() if len(equal) == 1 else f"{{{', '.join(f'{key}: {value[key]}' for key in sorted(value))}}}"


def _text(config: Mapping[str, Any], key: str) -> str:
    value = config[key]
    if key == "zo.lr_scale" and isinstance(value, int):
        value = float(value)  # the option may also be a word, so that 1 and 1.0 are kept as they were given
    if key == "tasks.order" and value == f"seed:{config['seed']}":
        return "seed:N"  # a class order per seed counts as one setting
    # a path is the user's own, and its name alone is not unique
    if matches(key, ("adapter.init", "model.name", "model.pretrained", "data.*")) and "/" in str(value):
        return f"{Path(value).name} ({hashlib.blake2s(str(Path(value)).encode(), digest_size=3).hexdigest()})"
    return str(value)


def _missing_images(config: Mapping[str, Any], accuracy: Mapping[str, Any]) -> dict[str, str]:
    """Say whether a run had only a part of one of the paper's data sets. The configuration does not say it, so images are counted."""
    rows, whole = accuracy.get("rows"), IMAGES_PER_CLASS.get(config["data"]["name"])
    if not rows or not whole:
        return {}
    num_classes, train = len(rows[-1]), config["train"]
    given = train["batch_size"] and train["epochs"]
    # an upper bound; 0 without training
    images = accuracy.get("steps", 0) * train["batch_size"] / train["epochs"] if given else accuracy.get("train_images") or 0
    tested = sum(total for _, total in rows[-1]) / num_classes
    counted = ((PART_OF_TRAINING, "at most ", images / num_classes, whole[0]), (PART_OF_TEST, "", tested, whole[1]))
    return {kind: f"{kind} ({bound}{count:.0f} a class)" for kind, bound, count, expected in counted if 0 < count < 0.9 * expected}


def step_frame(folder: Path, last: int | None = None) -> pd.DataFrame:
    """Return one row per step of a run: step, task, loss, peak_gib (reserved) and allocated_gib; NaN where it was not recorded."""
    return pd.DataFrame(read_records(folder, last)["step"]).reindex(columns=["step", "task", "loss", "peak_gib", "allocated_gib"])


def gather(runs: pd.DataFrame, read: Callable[[Path], pd.DataFrame]) -> pd.DataFrame:
    """Return the rows that `read` finds in the folder (column `path`) of every run, each with the other columns of `runs`."""
    about = runs.drop(columns="path")
    parts = [about[index : index + 1].merge(read(path), how="cross") for index, path in enumerate(runs.path)]
    return pd.concat(parts, ignore_index=True) if parts else about
