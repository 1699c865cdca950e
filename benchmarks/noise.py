"""Random directions: how fast they are drawn, or (--slope) how much of a slope is rounding at each precision.

python -m benchmarks.noise                                                time to draw and add one direction of every adapter
python -m benchmarks.noise cluster.device=cuda
python -m benchmarks.noise --slope --images 8 --classes 4 --repeats 4     slopes at several precisions against float64, ViT-B/16
python -m benchmarks.noise --slope cluster.device=cuda --images 32        on a GPU also with TF32
"""

import argparse
import contextlib
import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from benchmarks.common import Row, Table, Workload, interleaved, make_parser, positive, ratio, run, workloads_of
from dist_vlcl.dist.world import World
from dist_vlcl.precision import MAX_SLOPE_NOISE
from dist_vlcl.step import HybridStep
from dist_vlcl.zo.difference import Directions
from dist_vlcl.zo.noise import Key

LOGIT_SCALE = 100  # of OpenAI's weights; a model with random weights has 14
MODES = [  # model.precision, zo.evaluation, and arithmetic that dist_vlcl does not offer
    ("fp32", "whole", ""),
    ("fp32", "delta", ""),
    ("bf16", "whole", ""),
    ("bf16", "delta", ""),
    ("fp32", "whole", "tf32"),
    ("fp32", "whole", "bf16 autocast"),
    ("fp32", "whole", "fp16 autocast"),
]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = make_parser(__doc__, images=8, classes=4, orders="language_all,vision_all")
    parser.add_argument("--slope", action="store_true", help="measure rounding in slopes instead of speed")
    parser.add_argument("--repeats", type=positive, default=8, help="turns that are timed, or directions of a slope (default: %(default)s)")
    run(parser, lambda args: [measure_slopes(args) if args.slope else measure_draws(args)], arguments)


def measure_draws(args: argparse.Namespace) -> Table:
    """Return the speed of several ways to draw and add a direction of all adapters."""
    workload = workloads_of(args)[0][1].changed("orders=dual_all")
    device = workload.device
    step = workload.step(workload.towers(device), World.alone(device))
    batch = workload.batch(step.towers)
    seconds = interleaved(draws(step, device), args.repeats, device)
    of_step = statistics.median(interleaved({"step": lambda: step([batch], Key(0, 0), 1e-3)}, 1, device)["step"])
    total = sum(flat.values_n.numel() for flat in step.flats.values())
    per_tensor = next(iter(seconds.values()))
    rows = [
        {
            "way": way,
            "million numbers/s": total / statistics.median(s) / 1e6,
            "times faster": ratio(per_tensor, s),
            f"% of our step of {args.images} images, {of_step:.3g} s": 100 * statistics.median(s) / of_step,
        }
        for way, s in seconds.items()
    ]
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
        exact = slopes(workload, args.repeats, "fp64")
        for precision, evaluation, arithmetic in MODES:
            if arithmetic == "tf32" and workload.device != "cuda":
                continue
            found = slopes(workload.changed(f"model.precision={precision}", f"zo.evaluation={evaluation}"), args.repeats, arithmetic)
            noise = float((found - exact).norm() / exact.norm())
            row: Row = {"orders": orders, "precision": arithmetic or precision, "zo.evaluation": evaluation, "noise / slope": noise}
            row["same sign"] = f"{100 * float((found.sign() == exact.sign()).double().mean()):.0f} %"
            row[f"below {MAX_SLOPE_NOISE}"] = "yes" if noise < MAX_SLOPE_NOISE else "no"
            rows.append(row)
    epsilon = ", ".join(f"{branch} {value:g}" for branch, value in workload.config.zo.epsilon.items())
    title = f"Rounding in slopes: {workload.config.model.name}, {args.images} images, {args.repeats} directions, epsilon {epsilon}"
    return Table(title, rows, "Against float64. Training offers fp32 and bf16; the other precisions are shown for comparison.")


@torch.no_grad()
def slopes(workload: Workload, directions: int, arithmetic: str = "") -> torch.Tensor:
    """Return projected gradients `[directions]` of the first zeroth-order branch, at the same point along the same directions."""
    device = workload.device
    towers = workload.towers(device)
    towers.language.stem_and_head.clip.logit_scale.fill_(math.log(LOGIT_SCALE))
    step = workload.step(towers, World.alone(device))
    if arithmetic == "fp64":
        towers.double()
    with computed_in(arithmetic, device):
        batch, precision = workload.batch(towers), step.precision
        found = precision.slopes(towers, step.tokens, batch, Key(7, 0), directions, precision.delta_branches)
    return next(iter(found.values()))


@contextlib.contextmanager
def computed_in(arithmetic: str, device: str) -> Iterator[None]:
    """Compute matrix products in a precision that training does not offer."""
    dtypes: dict[str, Any] = {"bf16 autocast": torch.bfloat16, "fp16 autocast": torch.float16}
    torch.backends.cuda.matmul.allow_tf32 = arithmetic == "tf32"
    try:
        with torch.autocast(device, dtype=dtypes.get(arithmetic), enabled=arithmetic in dtypes):
            yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = False


if __name__ == "__main__":
    main()
