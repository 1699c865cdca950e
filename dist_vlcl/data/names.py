"""Class names and class orders of the known data sets. The lists are text files beside this module.

ImageNet-R's class names and order are those of RAPF, an open choice: the paper does not state which ones it used.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

FOLDER = Path(__file__).parent


def known_classes(reader: str) -> dict[str, str]:
    """Return raw folder -> class name, in the order of the class ids, of a data set that has a list."""
    return dict(line.split("\t") for line in _lines(FOLDER / "names" / f"{reader}.txt"))


def prompt_names(class_names: Sequence[str], underscores: bool = False) -> list[str]:
    """Return the names as prompts use them: `aquarium fish`, or torchvision's `aquarium_fish` with `underscores`."""
    return [name if underscores else name.replace("_", " ") for name in class_names]


def distinct(names: Sequence[str]) -> list[str]:
    """Return the names, with their place behind those that come more than once: `cat (3)` is the third class."""
    return [name if list(names).count(name) == 1 else f"{name} ({place})" for place, name in enumerate(names, 1)]


def paper_order(reader: str) -> list[int] | None:
    """Return the published class order of a known data set, or None. ImageNet-R's is RAPF's (see above)."""
    path = FOLDER / "orders" / f"{reader}.txt"
    return [int(number) for line in _lines(path) for number in line.replace(",", " ").split()] if path.exists() else None


def class_order(spec: str | Sequence[int], num_classes: int, paper: Sequence[int] | None = None) -> list[int]:
    """Return the class ids in the order in which they are learned.

    `spec` is `natural`, `paper` (the list `paper`), `seed:N`, or the list itself, which TaskStream checks. `seed:N` is numpy's legacy
    `RandomState(N).permutation`, as in PILOT and PROOF. Raises ValueError if `paper` has no list for these classes.
    """
    if not isinstance(spec, str):
        return [int(class_id) for class_id in spec]
    if spec == "natural":
        return list(range(num_classes))
    if spec == "paper":
        if paper is None or len(paper) != num_classes:
            raise ValueError(f"tasks.order='paper': no published order of these {num_classes} classes; choose natural, seed:N or a list")
        return list(paper)
    return np.random.RandomState(int(spec.removeprefix("seed:"))).permutation(num_classes).tolist()


def _lines(path: Path) -> list[str]:
    return [line for line in path.read_text(encoding="utf-8").splitlines() if line and not line.startswith("#")]
