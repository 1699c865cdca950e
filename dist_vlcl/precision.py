"""Is the precision high enough for zeroth order? Measure the rounding error of the slopes, and refuse to train if it is too large."""

# K candidates

import math
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor

from dist_vlcl.dist.world import World
from dist_vlcl.losses import BatchLosses
from dist_vlcl.model.clip import TwoTowers
from dist_vlcl.reading import warn
from dist_vlcl.zo.flat import restricted
from dist_vlcl.zo.noise import Key
from dist_vlcl.zo.update import ZerothOrder

MAX_SLOPE_NOISE = 0.1  # largest rounding error allowed, relative to the projected gradient
NOISE_SAMPLES = 32  # samples of a rank on which it is measured
# A smaller epsilon is measured in fp32 too. The error there is 0.018 of a slope at 1e-4 and 0.13 at 1e-5 (a tiny CLIP).
FINE_EPSILON = 1e-4


class SlopePrecision:
    """Chooses how candidates are evaluated, and measures the rounding error of their slopes once, before the first step.

    The candidates of `delta_branches` compute only the change of the features (`model.perturbed`). Raises ValueError if the precision must
    be measured and the parameters are sharded over ranks (`is_sharded`), because a sharded model cannot be copied.
    """

    def __init__(self, towers: TwoTowers, zeroth: ZerothOrder, world: World, is_sharded: bool = False):
        self.towers, self.flats, self.zeroth, self.world = towers, zeroth.flats, zeroth, world
        narrow = [branch for branch in self.flats if towers.tower(branch).dtype.itemsize < 4]
        self.delta_branches = {"auto": narrow, "whole": [], "delta": list(self.flats)}[zeroth.config.evaluation]
        self.is_fine = any(zeroth.config.epsilon[branch] < FINE_EPSILON for branch in self.flats)
        self.is_checked = not self.flats or (towers.config.precision == "fp32" and not self.is_fine)
        self.is_new = False  # whether this run has taken its first step here
        if is_sharded and not self.is_checked:
            advice = f"use zero2, or model.precision=fp32 with every zo.epsilon at least {FINE_EPSILON:g}"
            raise ValueError(f"the rounding error of slopes cannot be measured under ZeRO-3, which divides the model; {advice}")

    def check_once(self, tokens: Tensor, batch: Any, key: Key) -> None:
        """Raise ValueError if the rounding error is too large for this precision. All ranks call this before each step.

        A resumed run is only warned: it may not change the options that would help, and its first start has passed.
        """
        self.is_new |= key.step == 0
        if self.is_checked or (len(tokens) == 1 and self.towers.config.loss == "cross_entropy"):  # the loss of one class is always 0
            return
        noise = self.slope_noise(tokens, batch, key)
        self.is_checked = noise.keys() == self.flats.keys()  # a branch whose slopes were all 0 was not measured
        if all(value <= MAX_SLOPE_NOISE for value in noise.values()):  # False for NaN
            return
        found = ", ".join(f"{value:.2g} of a {branch} slope" for branch, value in noise.items())
        precision, evaluation = self.towers.config.precision, self.zeroth.config.evaluation
        better = ["zo.evaluation=delta"] * (len(self.delta_branches) < len(self.flats))
        better += ["model.precision=fp32"] * (precision != "fp32")
        advice = f"At most {MAX_SLOPE_NOISE} is allowed. Use {' or '.join([*better, 'a larger zo.epsilon'])}"
        text = f"model.precision={precision} with zo.evaluation={evaluation}: the rounding error is {found}. {advice}"
        if self.is_new:
            raise ValueError(text)
        warn(f"{text}. The run goes on, because a resume may not change these options")

    def slope_noise(self, tokens: Tensor, batch: Any, key: Key, directions: int = 16) -> dict[str, float]:
        """Return the rounding error of the projected gradients per branch: root mean squares over directions, error over slope.

        It is measured on the first samples of a batch, against the same weights in float32, or in float64 for a fine epsilon. All ranks
        call this.
        """
        few = batch.cut(0, NOISE_SAMPLES)
        found = self.slopes(self.towers, tokens, few, key, directions, self.delta_branches)
        exact = self.towers.copy()
        exact.to(torch.float64 if self.is_fine else torch.float32)
        true = self.slopes(exact, tokens, few, key, directions, ())
        return {b: float((found[b] - true[b]).norm() / true[b].norm()) for b in true if float(true[b].norm()) != 0}

    @torch.no_grad()
    def slopes(
        self, towers: TwoTowers, tokens: Tensor, batch: Any, key: Key, directions: int, delta_branches: Collection[str]
    ) -> dict[str, Tensor]:
        """Return one-sided projected gradients, float64 `[at least directions]`, of every zeroth-order branch. All ranks call this.

        Those of single units where the run estimates single units: their slopes are smaller, and their rounding errors are not.
        towers: the model, or a copy of it in another precision.
        """
        losses = BatchLosses(towers, self.zeroth, tokens, self.world, delta_branches, stop=False)
        losses.add(towers, batch, key, shares_text=False)
        result = {}
        for branch, epsilon in ((branch, self.zeroth.config.epsilon[branch]) for branch in self.flats):
            parts = [group.slices[branch] for group in self.zeroth.groups if branch in group.slices]
            draws = [self.zeroth.directions.draw(branch, key, q) * epsilon for q in range(math.ceil(directions / len(parts)))]
            pairs = [losses([{}, {branch: restricted(draw, part)}]).losses for draw in draws for part in parts]
            result[branch] = torch.tensor([(perturbed - base) / epsilon for base, perturbed in pairs], dtype=torch.float64)
        return result
