"""The zeroth-order update: a finite difference, a transform and an acceptance rule combined (docs/concepts.md, section 2)."""

# n parameters of a branch

import functools
import math
import pkgutil
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, count
from typing import Any

from torch import Tensor

from dist_vlcl.masking import explained
from dist_vlcl.options import BRANCHES, option
from dist_vlcl.zo.difference import DISTRIBUTIONS, TENSORS, Directions, Evaluate, FiniteDifference, Slopes, StepDirections
from dist_vlcl.zo.flat import Flat, Group, groups_of, restricted
from dist_vlcl.zo.noise import Key, derive_seed

ACCEPTANCES, GRANULARITIES, EVALUATIONS = ("always", "best_of_three"), ("branch", "unit", "joint"), ("auto", "whole", "delta")
# Losses are rounded to 2^-32. With a smaller epsilon the difference of two losses would be mostly that rounding.
MIN_EPSILON = 1e-7


@dataclass
class ZerothOrderConfig:
    """A row of the strategy table (configs/zo) and the options of concepts.md 2."""

    name: str = option("mozo", "Name of the strategy in tables and logs; it changes nothing else.")
    estimator: str = option("finite_difference", "The gradient estimator: finite_difference, or module:Class of your own class.")
    estimator_options: dict[str, Any] = option({}, "Arguments of your own estimator's class, by name (extending.md).")
    transform: str = option("sign", "Turn the estimate into a direction: take it as it is, or its sign.", choices=("identity", "sign"))
    acceptance: str = option("always", "Always take the step, or the best of stay, step, mirrored step.", choices=ACCEPTANCES)
    epsilon: dict[str, float] = option({"language": 1e-3, "vision": 5e-4}, "Size of the perturbation, per branch.", min=MIN_EPSILON)
    sides: int = option(1, "1: compare with the base loss; 2: compare the two sides of the base.", choices=(1, 2))
    probes: Any = option(1, "Number of directions that are averaged in a step: one number, or {language: N, vision: N}.")
    directions: str = option("gaussian", "Distribution of the directions.", choices=DISTRIBUTIONS)
    tensors: str = option("all", "Tensors of a unit that a direction changes: all, or only the up projections.", choices=TENSORS)
    granularity: str = option("branch", "What one loss difference moves: a branch, a unit, or both branches.", choices=GRANULARITIES)
    evaluation: str = option("auto", "Compute a candidate's features, or their change; auto: the change in bf16.", choices=EVALUATIONS)
    clip: float | None = option(10.0, "Largest absolute value of a projected gradient; null: no limit.", above=0)
    lr_scale: Any = option(1.0, "Ratio to the first-order learning rate; auto: from the projected gradients (concepts.md 2.8).")
    random_signs: bool = option(False, "A control that learns nothing: random signs of the projected gradients; the step is always taken.")

    def check(self) -> None:
        """Raise ValueError for a branch without epsilon or an estimator that Python cannot import."""
        if set(self.epsilon) != set(BRANCHES):
            raise ValueError(f"zo.epsilon={self.epsilon}: give zo.epsilon.language and zo.epsilon.vision, and no other")
        by_branch = self.probes if isinstance(self.probes, Mapping) else dict.fromkeys(BRANCHES, self.probes)
        if set(by_branch) != set(BRANCHES) or any(type(count) is not int or count < 1 for count in by_branch.values()):
            raise ValueError(f"zo.probes={self.probes}: give a number of at least 1, or one for each branch: {{language: 128, vision: 1}}")
        if self.granularity == "joint" and len(set(by_branch.values())) > 1:
            raise ValueError(f"zo.probes={self.probes}: zo.granularity=joint perturbs both branches together; give one number")
        is_number = type(self.lr_scale) in (int, float) and 0 < self.lr_scale < math.inf
        if not is_number and (self.lr_scale != "auto" or self.transform != "identity"):
            raise ValueError(f"zo.lr_scale={self.lr_scale}: give a number above 0, or auto, which needs zo.transform=identity")
        self.make_estimator()

    def probes_of(self, branch: str) -> int:
        """Return the number of directions of a branch."""
        return self.probes[branch] if isinstance(self.probes, Mapping) else self.probes

    def make_estimator(self) -> FiniteDifference:
        """Return the object that makes candidates and turns their losses into estimates.

        Raises ValueError if `estimator` does not name a class that can be imported and built.
        """
        arguments = (self.epsilon, self.sides, self.probes, self.clip)
        if self.estimator == "finite_difference":
            if self.estimator_options:
                raise ValueError(f"zo.estimator_options={self.estimator_options}: finite_difference has none; see zo.sides")
            return FiniteDifference(*arguments)
        advice, errors = "give finite_difference, or module:Class of a file", (ImportError, AttributeError, TypeError, ValueError)
        with explained(f"zo.estimator={self.estimator!r}: {advice} that Python can import", kinds=errors):
            return pkgutil.resolve_name(self.estimator)(*arguments, **self.estimator_options)


@dataclass(frozen=True)
class Move:
    """A decided update: the values in each branch's slice change by coefficient * direction.

    Tensors `[n]` are per branch and zero outside the group's slice.
    """

    group: Group
    projected_gradient: Slopes
    gradients: Mapping[str, Tensor]  # the gradient estimate, before the transform
    directions: Mapping[str, Tensor]  # the same after the transform
    coefficient: float = 0.0
    losses: tuple[float, float, float] | None = None  # of staying, of -step and of +step, if the acceptance rule compared them

    @property
    def slope_sizes(self) -> dict[str, float]:
        """Return the mean absolute projected gradient over the probes, per branch."""
        return {branch: sum(map(abs, slopes)) / len(slopes) for branch, slopes in self.projected_gradient.items()}

    def offsets(self, coefficient: float) -> dict[str, Tensor]:
        """Return the candidate that moves by `coefficient`. `apply` adds exactly these numbers."""
        return {branch: restricted(d * coefficient, self.group.slices[branch]) for branch, d in self.directions.items()}

    def record(self) -> dict[str, Any]:
        """Return the move as a journal entry. With the step's key it is enough to repeat the move."""
        slopes = {branch: list(of_branch) for branch, of_branch in self.projected_gradient.items()}
        losses = {} if self.losses is None else {"losses": list(self.losses)}
        return {"group": self.group.name, "projected_gradient": slopes, "coefficient": self.coefficient, **losses}


def gradient(slopes: Sequence[float], directions: Iterable[Tensor]) -> Tensor:
    """Return the gradient estimate `[n]`: the mean over probes q of s_q z_q."""
    return functools.reduce(Tensor.add, (z * (s / len(slopes)) for s, z in zip(slopes, directions, strict=False)))


def best_of_three(base: float, minus: float, plus: float, step: float) -> float:
    """Return the coefficient with the lowest loss: 0 (stay), -step (the ordinary step) or +step (the mirrored step); concepts.md 2.4.

    For equal losses, staying comes before the ordinary step, and that before the mirrored one. ZO-LLM never stays for equal losses: if
    staying and minus are equal and below plus, it takes the ordinary step; in the three other ties it takes the mirrored one.
    """
    losses = {0.0: base, -step: minus, step: plus}
    return min(losses, key=losses.__getitem__)


class ZerothOrder:
    """Decides and applies the updates of the zeroth-order units. Losses come from `evaluate`, randomness from the key."""

    def __init__(self, flats: Mapping[str, Flat], config: ZerothOrderConfig):
        self.flats, self.config = flats, config
        self.groups = groups_of(flats, config.granularity)
        self.estimator = config.make_estimator()
        self.directions = Directions(flats, config.directions, config.tensors, sum(map(config.probes_of, BRANCHES)))

    def decide(self, evaluate: Evaluate, key: Key, lr: float) -> tuple[float, list[Move] | None]:
        """Return the base loss and one move per group, or None instead of the moves if a loss is not finite. Changes no value.

        Ranks that get the same losses from `evaluate` decide the same.
        """
        directions = self.directions.of_step(key)
        base, *perturbed = evaluate(chain([{}], self.estimator.candidates(self.groups, directions)))
        if not all(map(math.isfinite, (base, *perturbed))):
            return base, None
        slopes = self.estimator.projected_gradients(self.groups, base, perturbed)
        if [set(own) for own in slopes] != [set(group.slices) for group in self.groups] or not all(all(own.values()) for own in slopes):
            raise ValueError(f"zo.estimator={self.config.estimator}: each group needs slopes for each of its branches")
        if self.config.random_signs:
            slopes = with_random_signs(slopes, key)
        moves = list(self._proposed(slopes, directions))
        steps = [self._step(move, lr) for move in moves]
        if self.config.acceptance == "always" or self.config.random_signs or not moves:
            return base, [replace(move, coefficient=-step) for move, step in zip(moves, steps, strict=True)]
        losses = evaluate([move.offsets(c) for move, step in zip(moves, steps, strict=True) for c in (-step, step)])
        if not all(map(math.isfinite, losses)):
            return base, None
        return base, [
            replace(move, coefficient=best_of_three(base, minus, plus, step), losses=(base, minus, plus))
            for move, step, minus, plus in zip(moves, steps, losses[::2], losses[1::2], strict=True)
        ]

    def _step(self, move: Move, lr: float) -> float:
        """Return the coefficient of the ordinary step, without its minus sign.

        `auto` divides by the root mean square of the slopes and multiplies by their number q. Each probe then moves its direction by about
        lr, and the q moves are added, not averaged. With n perturbed parameters and q much smaller than n, the mean of q estimates has
        n / q times the square norm of the gradient. So the best step on a quadratic grows as q. The part of the step that lies along the
        gradient is then q lr long. It is limited to 1.5 sqrt(n) lr: one and a half first-order steps that move every parameter by lr.
        """
        if self.config.lr_scale != "auto":
            return lr * self.config.lr_scale
        slopes = [slope for of_branch in move.projected_gradient.values() for slope in of_branch]
        size = math.sqrt(sum(slope * slope for slope in slopes) / len(slopes))
        useful = min(max(map(len, move.projected_gradient.values())), 1.5 * math.sqrt(self.directions.num_changed(move.group)))
        return lr * useful / size if size > 0 else 0.0

    def apply(self, moves: Sequence[Move]) -> None:
        """Add each move to the values, in place."""
        for move in moves:
            for branch, part in move.group.slices.items():
                self.flats[branch].values_n[part].add_(move.directions[branch][part] * move.coefficient)

    def replay(self, records: Sequence[Mapping[str, Any]], key: Key) -> None:
        """Apply the recorded moves of one step again: the same bits, without evaluating a loss. A skipped step has no records.

        Raises ValueError if the records are not those of this configuration's groups; nothing is changed then.
        """
        if not records:
            return
        moved, expected = [record["group"] for record in records], [group.name for group in self.groups]
        if moved != expected:
            raise ValueError(f"the journal moves {', '.join(moved)} where the configuration has {', '.join(expected)}")
        slopes = [{b: tuple(s) for b, s in record["projected_gradient"].items()} for record in records]
        moves = self._proposed(slopes, self.directions.of_step(key))
        self.apply([replace(move, coefficient=record["coefficient"]) for move, record in zip(moves, records, strict=True)])

    def _proposed(self, slopes: Sequence[Slopes], directions: StepDirections) -> Iterator[Move]:
        """Yield a move per group, with coefficient 0 for now. Its tensors `[n]` are zero outside the group's slice."""
        for group, own in zip(self.groups, slopes, strict=True):
            gradients = {b: gradient(own[b], (restricted(directions[b, q], part) for q in count())) for b, part in group.slices.items()}
            proposed = {b: g.sign() for b, g in gradients.items()} if self.config.transform == "sign" else gradients
            yield Move(group, own, gradients, proposed)


def with_random_signs(slopes: Sequence[Slopes], key: Key) -> list[Slopes]:
    """Return the slopes of each group with random signs, the same on every rank."""
    draw = random.Random(derive_seed("random signs", key.seed, key.step))
    return [{branch: tuple(s * draw.choice((-1, 1)) for s in of_branch) for branch, of_branch in own.items()} for own in slopes]
