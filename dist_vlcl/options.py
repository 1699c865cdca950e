"""Options declared once: default, allowed values and meaning stand beside the field, and one function checks them all."""

import math
import operator
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import Field, field, fields, is_dataclass
from fnmatch import fnmatch
from typing import Any, get_type_hints

BRANCHES = ("language", "vision")  # of CLIP, and of every option that is given per branch
BOUNDS: dict[str, tuple[str, Callable[[Any, Any], bool]]] = {"min": ("at least", operator.ge), "above": ("more than", operator.gt)}
BOUNDS |= {"max": ("at most", operator.le), "below": ("less than", operator.lt)}


def option(default: Any, help: str, *, choices: Sequence[Any] | None = None, **bounds: float) -> Any:
    """Return a dataclass field with its meaning and allowed values: one of `choices`, or a number within the bounds.

    `bounds`: min and max, which belong to the range, above and below, which do not. None is allowed if the field's type says so
    (`float | None`). A list or dictionary as default is copied for every instance, and its items are checked.
    """
    assert set(bounds) <= set(BOUNDS)
    metadata = {"help": help, "choices": choices, **bounds}
    if isinstance(default, list | dict):
        return field(default_factory=lambda: default.copy(), metadata=metadata)
    return field(default=default, metadata=metadata)


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return every leaf of a nested mapping under its dotted key, such as `train.epochs`. An empty mapping has none."""
    leaves: dict[str, Any] = {}
    for key, value in config.items():
        leaves |= flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return leaves


def matches(key: str, patterns: Iterable[str]) -> bool:
    """Return whether the name of an option fits one of the patterns, such as `run.*`."""
    return any(fnmatch(key, pattern) for pattern in patterns)


def declared(config: type, prefix: str = "") -> dict[str, Field]:
    """Return every field that holds a value under its dotted key, for a dataclass and those in it."""
    found: dict[str, Field] = {}
    hints = get_type_hints(config)
    for item in fields(config):
        is_group, key = is_dataclass(hints[item.name]), f"{prefix}{item.name}"
        found |= declared(hints[item.name], f"{key}.") if is_group else {key: item}
    return found


def allowed_values(metadata: Any) -> str:
    """Return as text what a field's metadata allows; "" where it says nothing."""
    if metadata.get("choices"):
        return f"choose from {', '.join(map(str, metadata['choices']))}"
    bounds = [f"{word} {metadata[bound]:g}" for bound, (word, _) in BOUNDS.items() if metadata.get(bound) is not None]
    return f"give a number of {' and '.join(bounds)}" if bounds else ""


def validate(config: Any, name: str = "") -> None:
    """Check every declared field of a dataclass and of those in it, then call its own `check()` for rules that span fields.

    Raises ValueError that names the option as it is written on a command line, the value given, and what is allowed.
    """
    for item in fields(config):
        value, key = getattr(config, item.name), f"{name}.{item.name}".lstrip(".")
        if is_dataclass(value):
            validate(value, key)
            continue
        is_optional = "None" in str(item.type)
        parts = {f"{key}.{place}": one for place, one in value.items()} if isinstance(value, dict) else {key: value}
        for where, given in parts.items():
            items = given if isinstance(given, list | tuple) else [given]
            if not all((one is None and is_optional) or _is_allowed(one, item.metadata) for one in items):
                raise ValueError(f"{where}={given!r}: {allowed_values(item.metadata)}{', or null' if is_optional else ''}")
    if callable(check := getattr(config, "check", None)):
        check()


def _is_allowed(value: Any, metadata: Any) -> bool:
    if metadata.get("choices") is not None:
        return value in metadata["choices"]
    limits = [(holds, metadata[bound]) for bound, (_, holds) in BOUNDS.items() if metadata.get(bound) is not None]
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return not limits or (is_number and all(holds(value, limit) for holds, limit in limits))


def values_of(text: str) -> list[str]:
    """Return the values that commas separate. Commas in quotes or brackets separate none."""
    piece = r"""[^'"\[\]{}()]|'[^']*'|"[^"]*"|\[[^]]*\]|\{[^}]*\}|\([^)]*\)"""
    return [value.strip() for value in re.split(f",(?=(?:{piece})*$)", text)]


def split_options(words: Sequence[str]) -> list[tuple[str, str]]:
    """Return the key and the value of every option; raise ValueError for a word that is none."""
    for word in words:
        if "=" not in word:
            raise ValueError(f"{word!r} is not an option: give OPTION=VALUE, such as train.epochs=2")
    return [(word.split("=", 1)[0], word.split("=", 1)[1]) for word in words]
