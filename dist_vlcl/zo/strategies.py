"""The zeroth-order update: a difference, a transform and an acceptance, put together (docs/METHOD.md, 2)."""

# n numbers of a branch

import math
import pkgutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from dist_vlcl.zo.accept import ACCEPTANCES, best_of_three
from dist_vlcl.zo.difference import DISTRIBUTIONS, Directions, Estimate, Evaluate, FiniteDifference, Flat, Group, groups_of, only
from dist_vlcl.zo.noise import Key, Streams
from dist_vlcl.zo.transform import TRANSFORMS, Adam, Moments, gradient, transformed

GRANULARITIES = ("branch", "unit", "joint")
EVALUATIONS = ("auto", "whole", "delta")
MIN_EPSILON = 1e-7  # losses are rounded to 2^-32: below it differences of losses are that rounding, or 0


@dataclass
class ZerothOrderConfig:
    """A row of the strategy table, and the options that METHOD 2 names. `name` is for tables and logs only."""

    name: str = "mozo"
    estimator: str = "finite_difference"  # or module:Class of your own, with the methods of FiniteDifference (docs/EXTENDING.md)
    transform: str = "sign"
    acceptance: str = "always"
    epsilon: dict[str, float] = field(default_factory=lambda: {"language": 1e-3, "vision": 5e-4})
    sides: int = 1
    probes: int = 1
    directions: str = "gaussian"
    granularity: str = "branch"
    evaluation: str = "auto"  # of losses: whole, of each candidate; delta, of its change alone; auto: delta where the tower is in bf16
    clip: float | None = 10.0  # of the projected gradient
    optimizer: str = "sgd"  # or adam
    lr_scale: float = 1.0  # lambda, read as eta_ZO / eta_FO (METHOD 2.7)
    steps_per_fo_step: int = 1  # lambda, read as ZO steps per FO step
    update: str = "simultaneous"  # every loss at theta_t, or sequential: FO, then language, then vision

    def check(self) -> None:
        """Raise ValueError in the words of the option."""
        for option, allowed in {
            "transform": TRANSFORMS,
            "acceptance": ACCEPTANCES,
            "sides": (1, 2),
            "directions": DISTRIBUTIONS,
            "evaluation": EVALUATIONS,
            "granularity": GRANULARITIES,
            "optimizer": ("sgd", "adam"),
            "update": ("simultaneous", "sequential"),
        }.items():
            if getattr(self, option) not in allowed:
                raise ValueError(f"zo.{option}={getattr(self, option)!r}: choose from {', '.join(map(str, allowed))}")
        self.make_estimator()
        for branch in ("language", "vision"):
            if not self.epsilon.get(branch, 0) >= MIN_EPSILON:
                raise ValueError(f"zo.epsilon.{branch}={self.epsilon.get(branch)}: give a number of at least {MIN_EPSILON:g}, such as 1e-3")
        if self.clip is not None and not self.clip > 0:
            raise ValueError(f"zo.clip={self.clip}: give a positive number, or null")
        if self.granularity == "joint" and self.update == "sequential":
            raise ValueError(
                "zo.update=sequential: moves one branch after the other, so zo.granularity=joint cannot be; choose branch or unit"
            )
        if not 0 < self.lr_scale < math.inf:
            raise ValueError(f"zo.lr_scale={self.lr_scale}: give a positive number")
        for option in ("probes", "steps_per_fo_step"):
            if getattr(self, option) < 1:
                raise ValueError(f"zo.{option}={getattr(self, option)}: give a positive number")
        if self.probes * self.steps_per_fo_step > Streams.MAX_PROBES:
            raise ValueError(f"zo.probes * zo.steps_per_fo_step may be at most {Streams.MAX_PROBES}")

    def make_estimator(self) -> FiniteDifference:
        """Return what gives candidates and makes estimates of their losses; raise ValueError where the option names no such class."""
        arguments = (self.epsilon, self.sides, self.probes, self.clip)
        if self.estimator == "finite_difference":
            return FiniteDifference(*arguments)
        try:
            return pkgutil.resolve_name(self.estimator)(*arguments)
        except (ImportError, AttributeError, TypeError, ValueError) as error:
            raise ValueError(
                f"zo.estimator={self.estimator!r}: give finite_difference, or module:Class of a file that Python can import ({error})"
            ) from error


@dataclass(frozen=True)
class Move:
    """An update that was decided: values of each branch's slice change by coefficient * direction.

    gradients: per branch the estimate `[n]` that the direction was made from, before any transform.
    """

    estimate: Estimate
    gradients: Mapping[str, Tensor]
    directions: Mapping[str, Tensor]
    coefficient: float
    losses: tuple[float, float, float] | None  # of staying, minus and plus, where the acceptance looked

    @property
    def group(self) -> Group:
        return self.estimate.group

    @property
    def sizes(self) -> dict[str, float]:
        """Each branch's size of a projected gradient: the mean over its probes."""
        return {branch: sum(map(abs, slopes)) / len(slopes) for branch, slopes in self.estimate.projected_gradient.items()}

    def offsets(self, coefficient: float) -> dict[str, Tensor]:
        """Return the candidate that moves by `coefficient`: the very numbers that `apply` adds."""
        return {branch: d * coefficient for branch, d in self.directions.items()}

    def record(self) -> dict:
        """Return the move as a journal entry: with the step's seed, all that a replay needs."""
        return {
            "group": self.group.name,
            "projected_gradient": {b: list(s) for b, s in self.estimate.projected_gradient.items()},
            "coefficient": self.coefficient,
            **({} if self.losses is None else {"losses": list(self.losses)}),
        }


class ZerothOrder:
    """Decides and applies the updates of the zeroth-order units. Pure: losses come from `evaluate`, randomness from the key."""

    def __init__(self, flats: Mapping[str, Flat], config: ZerothOrderConfig):
        config.check()
        self.flats, self.config = flats, config
        self.difference = config.make_estimator()
        self.draws = Directions(flats, config.directions)
        self.begin()

    def begin(self) -> None:
        """Forget the optimiser state, as a new task does."""
        self.adam = Adam() if self.config.optimizer == "adam" else None

    def rounds(self) -> list[list[Group]]:
        """Return the groups that are decided together: all at once, or branch after branch."""
        groups = groups_of(self.flats, self.config.granularity)
        if self.config.update == "simultaneous":
            return [groups] if groups else []
        return [[g for g in groups if branch in g.slices] for branch in self.flats]

    def schedule(self) -> list[tuple[int, list[Group]]]:
        """Return the rounds of one key with the repeat that each belongs to, in the order in which they are decided and applied."""
        return [(repeat, groups) for repeat in range(self.config.steps_per_fo_step) for groups in self.rounds()]

    def decide(self, evaluate: Evaluate, groups: list[Group], key: Key, lr: float, repeat: int = 0) -> tuple[float, list[Move] | None]:
        """Return the base loss and a move per group, or None for the moves where a loss is not finite. Changes no value.

        `repeat` numbers the zeroth-order steps within one key. Ranks that see the same losses decide the same.
        """
        config = self.config
        directions = self._draw(groups, key, repeat)
        base, *probed = evaluate([{}, *self.difference.candidates(groups, directions)])
        if not all(map(math.isfinite, (base, *probed))):
            return base, None
        estimates = self.difference.estimates(groups, base, probed)
        moves = self._proposed(estimates, directions)
        step = lr * config.lr_scale
        if config.acceptance == "always":
            return base, [replace(m, coefficient=-step) for m in moves]
        losses = evaluate([m.offsets(c) for m in moves for c in (-step, step)])
        if not all(map(math.isfinite, losses)):
            return base, None
        return base, [
            replace(m, coefficient=best_of_three(base, minus, plus, step), losses=(base, minus, plus))
            for m, minus, plus in zip(moves, losses[::2], losses[1::2], strict=True)
        ]

    def replay(self, records: Sequence[Mapping[str, Any]], key: Key) -> None:
        """Apply the journalled moves of one key again: the same bits, and no loss is evaluated.

        Raises ValueError, with the moves before it applied, at a move that is not of these groups in this order.
        """
        left = list(records)
        for repeat, groups in self.schedule():
            taken, left = left[: len(groups)], left[len(groups) :]
            if not taken:  # the step was skipped from here on
                break
            if [record["group"] for record in taken] != [group.name for group in groups]:
                moved, wanted = (", ".join(names) for names in ([r["group"] for r in taken], [g.name for g in groups]))
                raise ValueError(f"the journal moves {moved} where the configuration has {wanted}")
            slopes = [{b: tuple(s) for b, s in record["projected_gradient"].items()} for record in taken]
            estimates = [Estimate(group, s) for group, s in zip(groups, slopes, strict=True)]
            moves = self._proposed(estimates, self._draw(groups, key, repeat))
            self.apply([replace(move, coefficient=record["coefficient"]) for move, record in zip(moves, taken, strict=True)])
        if left:
            raise ValueError(f"the journal has {len(left)} moves more than the configuration makes in a step")

    def _draw(self, groups: list[Group], key: Key, repeat: int) -> dict[tuple[str, int], Tensor]:
        """Return the directions of a round by branch and probe, `[n]` each."""
        branches = sorted({branch for group in groups for branch in group.slices})
        first = repeat * self.config.probes
        return {(b, q): self.draws.draw(b, key, first + q) for b in branches for q in range(self.config.probes)}

    def _proposed(self, estimates: list[Estimate], drawn: Mapping[tuple[str, int], Tensor]) -> list[Move]:
        """Return a move per estimate, still of coefficient 0; flat tensors `[n]`, zero outside of the group's slice."""
        transform, moves = self.config.transform, []
        for e in estimates:
            gradients, directions = {}, {}
            for branch, part in e.group.slices.items():
                slopes, probes = e.projected_gradient[branch], [only(drawn[branch, q], part) for q in range(self.config.probes)]
                gradients[branch] = gradient(slopes, probes)
                directions[branch] = transformed(gradients[branch], slopes, probes, transform)
            moves.append(Move(e, gradients, directions, 0.0, None))
        if self.adam is None:
            return moves
        adapted = self._adapted(self.adam, [m.directions for m in moves])
        return [replace(m, directions=d) for m, d in zip(moves, adapted, strict=True)]

    def _adapted(self, adam: Adam, gradients: Sequence[Mapping[str, Tensor]]) -> list[dict[str, Tensor]]:
        """Replace each gradient by Adam's direction, its moments kept per branch whatever the granularity."""
        total: dict[str, Tensor] = {}
        for g in gradients:
            for branch, value in g.items():
                total[branch] = total[branch] + value if branch in total else value
        directions = adam(total)
        return [{b: directions[b] * (value != 0) for b, value in g.items()} for g in gradients]

    def apply(self, moves: list[Move]) -> None:
        """Add each accepted move to the values, in place, and keep the moments that it was made with."""
        if self.adam is not None and moves:
            self.adam.commit()
        for move in moves:
            for branch, offset in move.offsets(move.coefficient).items():
                self.flats[branch].values_n.add_(offset)

    def state_dict(self) -> dict[str, Tensor]:
        """Return Adam's moments under the names of the parameters, however these lie in the flat values; empty without Adam."""
        state: dict[str, Tensor] = {}
        for branch, moments in (self.adam.moments if self.adam else {}).items():
            names = self.flats[branch].names()
            for kind, flat_n in (("first", moments.first_n), ("second", moments.second_n)):
                parts = flat_n.split([numel for _, numel in names])
                state |= {f"{name}/{kind}": part for (name, _), part in zip(names, parts, strict=True)}
            state[f"{branch}/steps"] = torch.tensor(moments.steps)
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore what `state_dict` returned."""
        if self.adam is None:
            return
        for branch, flat in self.flats.items():
            if f"{branch}/steps" in state:
                first_n, second_n = (torch.cat([state[f"{name}/{kind}"] for name, _ in flat.names()]) for kind in ("first", "second"))
                self.adam.moments[branch] = Moments(first_n, second_n, int(state[f"{branch}/steps"]))
