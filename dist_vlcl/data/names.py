"""Class names and class orders of the known data sets, kept as text beside this file."""

import re
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).parent


def known_classes(reader: str) -> dict[str, str] | None:
    """Raw folder -> class name, in the order of the class ids; None for a set without a list."""
    path = HERE / "names" / f"{reader}.txt"
    if not path.exists():
        return None
    return dict(line.split("\t") for line in _lines(path))


def prompt_names(class_names: Sequence[str], underscores: bool = False) -> list[str]:
    """The names as prompts have them: `aquarium fish`, or with `underscores` as torchvision has it, `aquarium_fish`."""
    return [name if underscores else name.replace("_", " ") for name in class_names]


def paper_order(reader: str) -> list[int] | None:
    """The published class order of a known set; None where there is none."""
    path = HERE / "orders" / f"{reader}.txt"
    if not path.exists():
        return None
    return [int(number) for line in _lines(path) for number in re.findall(r"\d+", line)]


def class_order(spec: str | Sequence[int], num_classes: int, paper: Sequence[int] | None = None) -> list[int]:
    """Class ids in the order in which they are learned.

    `spec` is `natural`, `paper`, `seed:N` (numpy's legacy `RandomState(N).permutation`, as PILOT and PROOF use) or the list itself,
    which TaskStream checks. Raises ValueError for another word and where `paper` has no list for these classes.
    """
    if not isinstance(spec, str):
        return [int(class_id) for class_id in spec]
    if spec == "natural":
        return list(range(num_classes))
    if spec == "paper":
        return _paper(num_classes, paper)
    if match := re.fullmatch(r"seed:(\d+)", spec):
        return _seeded(int(match[1]), num_classes)
    raise ValueError(f"tasks.order={spec!r}: choose from natural, paper, seed:N, or a list of class ids")


def _paper(num_classes: int, paper: Sequence[int] | None) -> list[int]:
    if paper is None:
        raise ValueError("tasks.order='paper': this data set has no published order; choose from natural, seed:N, or a list of class ids")
    if len(paper) != num_classes:
        raise ValueError(f"tasks.order='paper': the published order has {len(paper)} classes, this data set {num_classes}")
    return list(paper)


def _seeded(seed: int, num_classes: int) -> list[int]:
    import numpy as np

    return [int(class_id) for class_id in np.random.RandomState(seed).permutation(num_classes)]


def _lines(path: Path) -> list[str]:
    lines = path.read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line and not line.startswith("#")]
