"""Order plans: which unit learns by first order (back-propagation), by zeroth order (loss differences), or not at all.

Layers count from 1, as in the paper (concepts.md 2.5).
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

from dist_vlcl.model.units import UnitId
from dist_vlcl.options import BRANCHES, option


class Order(Enum):
    """How a unit learns."""

    FIRST = "first"
    ZEROTH = "zeroth"
    FROZEN = "frozen"


PLAN_BRANCHES = {"dual": BRANCHES, "vision": ("vision",), "language": ("language",), "none": ()}
PLAN_LAYERS = ("all", "hop_odd", "hop_even", "prefix", "suffix")
ORDERS = tuple(order.value for order in Order)
BY_BRANCH = "first or frozen for each branch of a plan: {language: frozen, vision: first}"


@dataclass
class OrderPlan:
    """A set of units with one order; every other unit has the order `rest` (of its branch)."""

    branch: str = option("dual", "Branches that the plan chooses units from; dual: both.", choices=tuple(PLAN_BRANCHES))
    layers: Any = option("hop_odd", "Layers of the plan: all, hop_odd, hop_even, prefix, suffix, a list, or one of these for each branch.")
    span: int | None = option(None, "Number of layers of prefix and suffix; null: half of the tower.", min=1)
    order: str = option("zeroth", "Order of the chosen units; frozen is the control without training.", choices=ORDERS)
    rest: Any = option("first", f"Order of all other units: {', '.join(ORDERS)}, or {BY_BRANCH}.")

    def check(self) -> None:
        """Raise ValueError for unknown orders, for layers that have no known name and are no list, or of a branch that is not chosen."""
        is_known = self.rest in ORDERS
        if isinstance(self.rest, Mapping) and set(self.rest) == set(BRANCHES) and self.branch != "none":
            is_known = all(order in ("first", "frozen") for order in self.rest.values())
        if not is_known:
            raise ValueError(f"orders.rest={self.rest!r}: choose from {', '.join(ORDERS)}, or {BY_BRANCH}")
        branches = PLAN_BRANCHES[self.branch]
        by_branch = self.layers if isinstance(self.layers, Mapping) else dict.fromkeys(BRANCHES, self.layers)
        if isinstance(self.layers, Mapping) and (unplanned := sorted(set(by_branch) - set(branches))):
            allowed = f"orders.branch={self.branch} chooses from {' and '.join(branches) or 'no branch'} only"
            raise ValueError(f"orders.layers.{unplanned[0]}: {allowed}; leave this out, or use orders.branch=dual")
        if not all(map(_names_layers, by_branch.values())):
            allowed = f"choose from {', '.join(PLAN_LAYERS)}, or give a list such as [1,3,5], or one of these for each branch"
            raise ValueError(f"orders.layers={self.layers!r}: {allowed}")

    def in_use(self) -> set[str]:
        """Return the orders of the plan and of the rest. With `branch=none` the plan has no units."""
        return {*map(self.rest_of, BRANCHES), *([self.order] if self.branch != "none" else [])}

    def rest_of(self, branch: str) -> str:
        """Return the order of a branch's other units."""
        return self.rest[branch] if isinstance(self.rest, Mapping) else self.rest

    def layers_of(self, branch: str, depth: int) -> set[int]:
        """Return the layers that the plan chooses in a tower of `depth` blocks. Raises ValueError for a layer that it does not have."""
        named = self.layers.get(branch, ()) if isinstance(self.layers, Mapping) else self.layers
        if isinstance(named, str):
            span = self.span or depth // 2
            if named in ("prefix", "suffix") and not 1 <= span <= depth:
                raise ValueError(f"orders.span={span}: the {branch} tower has {depth} blocks; choose from 1 to {depth}")
            layers = range(1, depth + 1)
            parts = {"hop_odd": layers[::2], "hop_even": layers[1::2], "prefix": layers[:span], "suffix": layers[-span:]}
            return set(parts.get(named, layers))
        if unknown := sorted(set(named) - set(range(1, depth + 1))):
            raise ValueError(f"orders.layers={list(named)}: the {branch} tower has no block {unknown[0]}; choose from 1 to {depth}")
        return set(named)


def _names_layers(layers: Any) -> bool:
    # the exact type: isinstance would take True for a number
    return layers in PLAN_LAYERS if isinstance(layers, str) else isinstance(layers, Sequence) and set(map(type, layers)) <= {int}


def assign(units: Iterable[UnitId], plan: OrderPlan) -> dict[UnitId, Order]:
    """Return the order of every unit. Raises ValueError if the plan names a branch or layer that the model does not have."""
    units = list(units)
    chosen: set[UnitId] = set()
    for branch in PLAN_BRANCHES[plan.branch]:
        depth = max((unit.layer for unit in units if unit.branch == branch), default=0)
        chosen |= {UnitId(branch, layer) for layer in plan.layers_of(branch, depth)}
    if plan.branch != "none" and not chosen:
        raise ValueError(f"orders.layers={plan.layers!r}: no layer of the {plan.branch} branch is chosen")
    return {unit: Order(plan.order if unit in chosen else plan.rest_of(unit.branch)) for unit in units}


def describe(orders: Mapping[UnitId, Order]) -> list[Sequence[str]]:
    """Return (branch, one mark per layer) for each branch: 1 is first order, 0 is zeroth order, - is frozen."""
    marks = {Order.FIRST: "1", Order.ZEROTH: "0", Order.FROZEN: "-"}
    branches = sorted({unit.branch for unit in orders})
    return [(branch, " ".join(marks[order] for unit, order in sorted(orders.items()) if unit.branch == branch)) for branch in branches]
