"""Random directions: how fast they are drawn, or (--slope) how much of a slope is rounding at each precision.

python -m benchmarks.noise                                                time to draw and add one direction of every adapter
python -m benchmarks.noise cluster.device=cuda
python -m benchmarks.noise --slope --images 8 --classes 4 --repeats 4     slopes at several precisions against float64, ViT-B/16
python -m benchmarks.noise --slope cluster.device=cuda --images 32
"""

import argparse
import itertools
import math
import statistics
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.common import Row, Table, Workload, benchmark, interleaved, ratio, workloads_of
from dist_vlcl.dist.world import World
from dist_vlcl.precision import MAX_SLOPE_NOISE
from dist_vlcl.step import HybridStep
from dist_vlcl.zo.difference import Directions
from dist_vlcl.zo.noise import Key


def measure(args: argparse.Namespace) -> list[Table]:
    """Return one table."""
    return [measure_slopes(args) if args.slope else measure_draws(args)]


def measure_draws(args: argparse.Namespace) -> Table:
    """Return the speed of several ways to draw and add a direction of all adapters."""
    workload = workloads_of(args)[0][1].changed("orders=dual_all")
    device = workload.device
    step = workload.step(workload.towers(device), World.alone(device))
    seconds = interleaved(draws(step, device), args.repeats, device)
    total = sum(flat.values_n.numel() for flat in step.flats.values())
    per_tensor = next(iter(seconds.values()))
    speeds = {way: total / statistics.median(s) / 1e6 for way, s in seconds.items()}
    rows = [{"way": way, "million numbers/s": speed, "times faster": ratio(per_tensor, seconds[way])} for way, speed in speeds.items()]
    return Table(f"Draw and add {total:,} numbers: {workload.config.model.name}", rows)


def draws(step: HybridStep, device: str) -> dict[str, Callable[[], Any]]:
    """Return ways to draw as many numbers as a direction has, and to add them."""
    tensors = [t.clone() for unit in step.towers.units.values() for t in unit.tensors().values()]
    values = {branch: flat.values_n.clone() for branch, flat in step.flats.items()}
    flat_n = torch.zeros(sum(v.numel() for v in values.values()), device=device)

    def per_tensor() -> None:
        for t in tensors:
            t.data = t.data + torch.normal(0.0, 1.0, t.shape, device=device) * 1e-3

    def ours(directions: Directions) -> None:
        for branch, v in values.items():
            v.add_(directions.draw(branch, Key(0, 0), 0), alpha=1e-3)

    gaussian, rademacher = (Directions(step.flats, distribution) for distribution in ("gaussian", "rademacher"))
    return {
        "per tensor, torch.normal (MeZO)": per_tensor,
        "one flat tensor, normal_": lambda: flat_n.add_(torch.empty_like(flat_n).normal_(), alpha=1e-3),
        "ours (counter-based), Gaussian": lambda: ours(gaussian),
        "ours (counter-based), Rademacher": lambda: ours(rademacher),
    }


def measure_slopes(args: argparse.Namespace) -> Table:
    """Return the rounding in slopes, relative to the slopes in float64, of each order plan and precision."""
    rows = []
    for orders, workload in workloads_of(args):
        exact = slopes(workload, args.repeats, exact=True)
        for precision, evaluation in itertools.product(("fp32", "bf16"), ("whole", "delta")):
            found = slopes(workload.changed(f"model.precision={precision}", f"zo.evaluation={evaluation}"), args.repeats)
            noise = float((found - exact).norm() / exact.norm())
            row: Row = {"orders": orders, "precision": precision, "zo.evaluation": evaluation, "noise / slope": noise}
            row["same sign"] = f"{100 * float((found.sign() == exact.sign()).double().mean()):.0f} %"
            row[f"below {MAX_SLOPE_NOISE}"] = "yes" if noise < MAX_SLOPE_NOISE else "no"
            rows.append(row)
    epsilon = ", ".join(f"{branch} {value:g}" for branch, value in workload.config.zo.epsilon.items())
    title = f"Rounding in slopes: {workload.config.model.name}, {args.images} images, {args.repeats} directions, epsilon {epsilon}"
    return Table(title, rows, "Against float64.")


@torch.no_grad()
def slopes(workload: Workload, directions: int, exact: bool = False) -> torch.Tensor:
    """Return projected gradients `[directions]` of the first zeroth-order branch, at the same point along the same directions.

    exact: computed in float64.
    """
    device = workload.device
    towers = workload.towers(device)
    towers.language.stem_and_head.clip.logit_scale.fill_(math.log(100))  # of OpenAI's weights; random ones have 14
    step = workload.step(towers, World.alone(device))
    if exact:
        towers.double()
    batch, precision = workload.batch(towers), step.precision
    found = precision.slopes(towers, step.tokens, batch, Key(7, 0), directions, precision.delta_branches)
    return next(iter(found.values()))


main = benchmark(measure, __doc__, images=8, classes=4, orders="language_all,vision_all", slope=False, repeats=8)
