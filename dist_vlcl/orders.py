"""Which unit learns by which order: first (back-propagation), zeroth (loss differences), or not at all.

Layers count from 1 to the depth of their tower, as the paper counts them (METHOD 2.5).
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

from dist_vlcl.model.units import BRANCHES, UnitId


class Order(Enum):
    """How a unit learns."""

    FIRST = "first"
    ZEROTH = "zeroth"
    FROZEN = "frozen"


PLAN_BRANCHES = {"dual": BRANCHES, "vision": ("vision",), "language": ("language",), "none": ()}
PLAN_LAYERS = ("all", "hop_odd", "hop_even", "prefix", "suffix")


@dataclass
class OrderPlan:
    """A set of units and its order; every other unit gets the order `rest`.

    `branch`: dual, vision, language or none. `layers`: all, hop_odd, hop_even, prefix, suffix, a list of layers, or a mapping from branch
    to a list. `span`: how many layers prefix and suffix take (default: half of the tower's depth). `order` is `zeroth`, or `frozen` for
    the control in which the same units are not trained (METHOD 0.1).
    """

    branch: str = "dual"
    layers: Any = "hop_odd"
    span: int | None = None
    order: str = "zeroth"
    rest: str = "first"

    def check(self) -> None:
        """Raise ValueError in the words of the option, before anything is built."""
        if self.branch not in PLAN_BRANCHES:
            raise ValueError(f"orders.branch={self.branch!r}: choose from {', '.join(PLAN_BRANCHES)}")
        branches = PLAN_BRANCHES[self.branch]
        by_branch = self.layers if isinstance(self.layers, Mapping) else dict.fromkeys(BRANCHES, self.layers)
        if isinstance(self.layers, Mapping) and (unplanned := sorted(set(by_branch) - set(branches))):
            raise ValueError(
                f"orders.layers.{unplanned[0]}: orders.branch={self.branch} plans {' and '.join(branches) or 'no branch'} only"
            )
        if not all(map(_names_layers, by_branch.values())):
            raise ValueError(
                f"orders.layers={self.layers!r}: choose from {', '.join(PLAN_LAYERS)}, or give a list such as [1,3,5], "
                f"or one of these for each of {', '.join(BRANCHES)}"
            )
        for option in ("order", "rest"):
            if getattr(self, option) not in {o.value for o in Order}:
                raise ValueError(f"orders.{option}={getattr(self, option)!r}: choose from {', '.join(o.value for o in Order)}")
        if self.span is not None and self.span < 1:
            raise ValueError(f"orders.span={self.span}: give a positive number of layers, or null for half of each tower")

    def layers_of(self, branch: str, depth: int) -> set[int]:
        """Return the layers of a tower of `depth` blocks that the plan names."""
        named = self.layers.get(branch, ()) if isinstance(self.layers, Mapping) else self.layers
        if isinstance(named, str):
            span = self.span or depth // 2
            if named in ("prefix", "suffix") and not 1 <= span <= depth:
                raise ValueError(f"orders.span={span}: the {branch} tower has {depth} blocks; choose from 1 to {depth}")
            return {
                "all": set(range(1, depth + 1)),
                "hop_odd": set(range(1, depth + 1, 2)),
                "hop_even": set(range(2, depth + 1, 2)),
                "prefix": set(range(1, span + 1)),
                "suffix": set(range(depth - span + 1, depth + 1)),
            }[named]
        unknown = sorted(set(named) - set(range(1, depth + 1)))
        if unknown:
            raise ValueError(f"orders.layers={list(named)}: the {branch} tower has no block {unknown[0]}; choose from 1 to {depth}")
        return set(named)


def _names_layers(layers: Any) -> bool:
    if isinstance(layers, str):
        return layers in PLAN_LAYERS
    return isinstance(layers, Sequence) and all(type(layer) is int for layer in layers)  # True is none


def assign(units: Iterable[UnitId], plan: OrderPlan) -> dict[UnitId, Order]:
    """Return the order of every unit, each exactly once, or raise ValueError where the plan names what the model has not."""
    plan.check()
    units = list(units)
    chosen: set[UnitId] = set()
    for branch in PLAN_BRANCHES[plan.branch]:
        depth = max((unit.layer for unit in units if unit.branch == branch), default=0)
        if depth == 0:
            raise ValueError(f"orders.branch={plan.branch!r}: the model has no blocks in its {branch} tower; choose another branch")
        chosen |= {UnitId(branch, layer) for layer in plan.layers_of(branch, depth)}
    if plan.branch != "none" and not chosen:
        raise ValueError(f"orders.layers={plan.layers!r}: names no layer of the {plan.branch} branch")
    return {unit: Order(plan.order) if unit in chosen else Order(plan.rest) for unit in units}


def describe(orders: Mapping[UnitId, Order]) -> list[Sequence[str]]:
    """Return one row per branch: its name and a mark per layer, 1 for first, 0 for zeroth, - for frozen."""
    marks = {Order.FIRST: "1", Order.ZEROTH: "0", Order.FROZEN: "-"}
    branches = sorted({unit.branch for unit in orders})
    return [(branch, " ".join(marks[order] for unit, order in sorted(orders.items()) if unit.branch == branch)) for branch in branches]
