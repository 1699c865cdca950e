"""What a run folder says about its run: the forms of its files, and its configuration as plain data.

Nothing in a configuration is resolved or imported here. Code, commands, addresses and outside paths count only if the user repeats them on
the command line.
"""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from dist_vlcl.masking import explained
from dist_vlcl.options import flatten, matches
from dist_vlcl.reading import or_warn, read_file, read_json, read_lines, warn

# patterns of the options that a resume may change, because they do not affect the result
MAY_CHANGE: tuple[str, ...] = ("run.*", "cluster.*", "eval.batch_size", "model.graphs", "train.check_every_steps", "train.max_skips")
MAY_CHANGE += tuple(f"data.{key}" for key in ("root", "url", "timeout_s", "allow_pipe", "num_workers", "cache_gib", "encoding", "on_error"))
# options that name files and addresses
PATH_OPTIONS: tuple[str, ...] = ("data.root", "data.url", "data.source", "data.split_file", "data.class_names")
PATH_OPTIONS += ("model.name", "model.pretrained", "adapter.init")
OUTSIDE = r"^/|:|(^|/)\.\.(/|$)"  # an absolute path, an address, or a path that leads up
BUILT_IN = {"zo.estimator": "finite_difference", "adapter.kind": None, "data.allow_pipe": False}  # other values run the user's code
MAX_CONFIG_BYTES = 1 << 20
MAX_CELLS = 1 << 26  # of a file of units/: 4 million rows
UNITS = {"step": "int64", "task": "int32", "branch": "string", "layer": "int32", "order": "string", "gradient_variance": "float"}

NUMBER = (None, float)
ENVIRONMENT = [{"run": (None, str), "data": (None, str), "weights": (None, str), "code_digest": (None, str)}]
COUNTS = [[[int]]]  # correct and total by class and row
MEANS = {"last": NUMBER, "avg": NUMBER, "forgetting": NUMBER}
ACCURACY = {"complete": bool, **MEANS, "rows": (None, COUNTS), "zero_shot": (None, {...: float}), "steps": (None, int), "seconds": NUMBER}
ACCURACY |= {"train_images": (None, int)}
# of the lines of metrics.jsonl: what steps have, and what tasks have
METRICS_FORM = {"kind": str, "step": int, "task": int, **MEANS, "zo": (None, dict), "per_task": (None, [NUMBER])}
METRICS_FORM |= dict.fromkeys(("loss", "seconds", "data_seconds", "peak_gib", "allocated_gib", "seen", "zero_shot", "transfer"), NUMBER)
ORDERS = {"branch": str, "order": str, "rest": (str, {"language": str, "vision": str})}
RUN_FORM = {"seed": int, "data": {"name": str}, "tasks": {"increment": int}, "adapter": dict, "train": dict, "orders": ORDERS}
RUN_FORM |= {"zo": {"name": str, "transform": (None, str)}}  # RUN_FORM: what a report reads of config.yaml
MOVE = {"group": str, "projected_gradient": dict, "coefficient": float}
JOURNAL_FORM = {"step": int, "task": (None, int), "seed": (None, int), "lr": NUMBER, "moves": (None, [MOVE])}


class _Plain(yaml.SafeLoader):
    """YAML without aliases: a few of them are enough to fill the memory."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("it holds an alias (*name)")
        return super().compose_node(parent, index)


def read_starts(folder: Path) -> list[dict[str, Any]]:
    """Return what env.json has of each start of a run; [] with a warning if it cannot be read."""
    return or_warn(lambda: read_json(folder / "env.json", ENVIRONMENT, []), [])


def digest_at_start(folder: Path, name: str) -> str:
    """Return the digest of the `data` or the frozen `weights` that a run was started with; "" if it is not known."""
    return next(filter(re.compile("[0-9a-f]{1,128}").fullmatch, (start.get(name) or "" for start in reversed(read_starts(folder)))), "")


def read_config(path: Path) -> dict[str, Any]:
    """Return options from a YAML file as nested dictionaries. Raises OSError, or ValueError that names the file and what is wrong.

    An interpolation (`${...}`) is refused: it could fetch a secret from the environment of whoever reads the file.
    """
    with explained(f"{path} is damaged", kinds=(yaml.YAMLError, ValueError, RecursionError)):
        config = yaml.load(read_file(path, MAX_CONFIG_BYTES), _Plain)
        if not isinstance(config, dict) or not all(isinstance(key, str) for key in config):
            raise ValueError("it holds no options")
        if odd := [key for key, value in flatten(config).items() if "${" in f"{key}{value}"]:
            raise ValueError(f"{odd[0]} holds an interpolation (${{...}}), and a saved value is plain")
    return config


def digest_of(config: Mapping[str, Any]) -> str:
    """Return the identity of a configuration as it is saved: a digest of all options that a resume may not change."""
    fixed = {key: value for key, value in flatten(config).items() if not matches(key, MAY_CHANGE)}
    return hashlib.blake2b(json.dumps(fixed, sort_keys=True, default=str).encode(), digest_size=16).hexdigest()


def untrusted_options(config: Mapping[str, Any], places: Sequence[str] = PATH_OPTIONS) -> list[str]:
    """Return, as OPTION=VALUE, what a saved configuration may not decide: code, commands, and addresses and paths in the options `places`.

    A relative path stays below the working directory and is allowed. A file of weights is not: it may lie in the run folder itself.
    """
    options = flatten(config)
    found = [key for key, own in BUILT_IN.items() if options.get(key, own) not in (own, None)]
    texts = {key: str(options[key]) for key in places if options.get(key)}
    weights = texts.pop("model.pretrained", "")  # open_clip may take it for a file and not for one of its tags
    found += ["model.pretrained"] * (bool(re.search(r"[./:]", weights)) or (weights != "" and Path(weights).exists()))
    return [f"{key}={options[key]}" for key in (*found, *(key for key, text in texts.items() if re.search(OUTSIDE, text)))]


def read_accuracy(folder: Path, config: Mapping[str, Any] | None = None, run: str | None = None) -> dict[str, Any]:
    """Return accuracy.json of a run folder, {} if there is none. Raises ValueError if it is damaged or belongs to another run.

    `config`: the configuration that it must belong to. `run`: the id of the run that it must belong to. Files of earlier versions have
    neither, and are taken as they are.
    """
    path = folder / "accuracy.json"
    accuracy: dict[str, Any] = read_json(path, ACCURACY, {})
    if accuracy.get("complete") and (not accuracy.get("rows") or None in (accuracy.get(key) for key in MEANS)):
        raise ValueError(f"{path} is damaged: it says complete, and has no results")
    if config is not None and accuracy.get("config") not in (None, digest_of(config)):
        raise ValueError(f"{path} belongs to another configuration than config.yaml")
    if run is not None and accuracy.get("run") not in (None, run):
        raise ValueError(f"{path} belongs to another run")
    return accuracy


def read_unit_records(path: Path) -> Any:
    """Return one file of units/ as a pyarrow table. Raises OSError, or ValueError that names a damaged file."""
    import pyarrow.parquet

    with explained(f"{path} is damaged", kinds=(OSError, ValueError, pyarrow.ArrowException)):
        file = pyarrow.parquet.ParquetFile(pyarrow.BufferReader(read_file(path)), page_checksum_verification=True)
        if file.metadata.num_rows * file.metadata.num_columns > MAX_CELLS:  # a small file can unpack to gigabytes
            raise ValueError(f"it has more than {MAX_CELLS:,} values")
        table = file.read()
        types = {field.name: str(field.type) for field in table.schema}
        if not table.num_rows or {name: types.get(name) for name in UNITS} != UNITS:
            raise ValueError("it lacks rows or columns")
    return table


def read_steps(path: Path, form: Any, last: int | None = None) -> list[dict[str, Any]]:
    """Return the records of metrics.jsonl or journal.jsonl. Warns of damaged lines, and of steps and tasks that are missing or doubled.

    last: the last step that the run has taken; None if it is not known.
    """
    records = read_lines(path, form)
    if wrong := misplaced(records, last):
        warn(f"{path} is damaged: {wrong}")
    return records


def misplaced(records: Sequence[Mapping[str, Any]], last: int | None = None, num_tasks: int | None = None) -> str:
    """Return as text which steps and tasks are missing, doubled or in another order among the lines of a file; "" if none is."""
    steps, tasks = ([r[kind] for r in records if r.get("kind", "step") == kind] for kind in ("step", "task"))
    in_order = sorted(range(len(records)), key=lambda place: records[place]["step"])
    num_steps, num_tasks = last or max(steps, default=0), len(tasks) if num_tasks is None else num_tasks
    checks = {"steps": (steps, range(1, num_steps + 1)), "tasks": (tasks, range(num_tasks)), "lines": (in_order, range(len(records)))}
    return "; ".join(f"{name} {wrong}" for name, (found, whole) in checks.items() if (wrong := differing(found, whole)))


def differing(found: Sequence[int], expected: range) -> str:
    """Return as text which expected numbers are missing, which occur twice, or that the order is another; "" if all is as expected."""
    counts = Counter(found)
    doubled = [number for number, count in counts.items() if count > 1]
    missing = max(0, expected.stop - expected.start) - sum(number in expected for number in counts)
    texts = [f"missing: {missing}, the first is {next(k for k in expected if k not in counts)}"] if missing else []
    texts += [f"doubled: {len(doubled)}, the first is {doubled[0]}"] if doubled else []
    return "; ".join(texts) or ("in another order" if list(found) != list(expected) else "")
