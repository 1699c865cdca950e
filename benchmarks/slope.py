"""How much of a projected gradient is rounding: slopes at several precisions against those in fp64, direction by direction."""

import argparse
import contextlib
import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

from benchmarks.result import Result, Table
from benchmarks.setup import Workload, add_orders, add_workload, device_of, positive, settings_of, workload_of
from dist_vlcl.dist.world import World
from dist_vlcl.step import MAX_SLOPE_NOISE
from dist_vlcl.zo.noise import Key

EXAMPLES = """examples:
  python -m benchmarks slope --images 2 --classes 4 --directions 4        ViT-B/16 with random weights
  python -m benchmarks slope --device cuda --images 32                    with TF32, too"""

LOGIT_SCALE = 100  # OpenAI's; a fresh model's is 14
MODES = [  # model.precision, zo.evaluation, and arithmetic that no option offers
    ("fp32", "whole", ""),
    ("fp32", "delta", ""),
    ("bf16", "whole", ""),
    ("bf16", "delta", ""),
    ("fp32", "whole", "tf32"),
    ("fp32", "whole", "bf16 autocast"),
    ("fp32", "whole", "fp16 autocast"),
]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_workload(parser, images=4, classes=4, zo="naive")
    add_orders(parser, "language_all,vision_all")
    parser.add_argument("--directions", type=positive, default=8, help="how many slopes are compared (default: %(default)s)")


def run(args: argparse.Namespace) -> Result:
    device, rows, records = device_of(args), [], []
    for orders in settings_of(args):
        workload = workload_of(args, orders=orders)
        exact = slopes(workload, device, args.directions, "fp64")
        for precision, evaluation, arithmetic in MODES:
            if arithmetic == "tf32" and device != "cuda":
                continue
            mode = replace(workload, precision=precision, evaluation=evaluation)
            found = slopes(mode, device, args.directions, arithmetic)
            noise = float((found - exact).norm() / exact.norm())
            agree = float((found.sign() == exact.sign()).double().mean())
            said = arithmetic or precision
            rows.append([orders, said, evaluation, noise, f"{100 * agree:.0f} %", "fit" if noise < MAX_SLOPE_NOISE else "not fit"])
            records.append({"orders": orders, "precision": said, "evaluation": evaluation, "noise": noise, "sign_agreement": agree})
    columns = ["orders", "precision", "evaluation", "noise / slope", "signs that agree", f"below {MAX_SLOPE_NOISE}"]
    eps = ", ".join(f"{b} {e:g}" for b, e in workload_of(args, orders="first").zeroth.epsilon.items())
    title = (
        f"Rounding in projected gradients: {args.model}, random weights, logit scale {LOGIT_SCALE}, {args.images} images, "
        f"{args.classes} classes, {args.directions} directions, epsilon {eps}"
    )
    notes = [
        "Against float64, weights not rounded. fp32 and bf16 are model.precision, evaluation is zo.evaluation; the rest cannot be chosen."
    ]
    return Result([Table(title, columns, rows)], records, notes)


@torch.no_grad()
def slopes(workload: Workload, device: str, directions: int, arithmetic: str = "") -> torch.Tensor:
    """Return projected gradients `[directions]` of the first zeroth-order branch, at the same point along the same directions."""
    towers = workload.towers(device)
    towers.language.ends.clip.logit_scale.fill_(math.log(LOGIT_SCALE))
    step = workload.step(towers, World.alone(device))
    if arithmetic == "fp64":
        towers.double()
    with computed_in(arithmetic, device):
        found = step.slopes(towers, workload.batch(towers.image_size), Key(7, 0), directions, step.delta_branches)
    return next(iter(found.values()))


@contextlib.contextmanager
def computed_in(arithmetic: str, device: str) -> Iterator[None]:
    """Run matrix products in a precision that training itself does not offer."""
    dtypes: dict[str, Any] = {"bf16 autocast": torch.bfloat16, "fp16 autocast": torch.float16}
    torch.backends.cuda.matmul.allow_tf32 = arithmetic == "tf32"
    try:
        with torch.autocast(device, dtype=dtypes.get(arithmetic), enabled=arithmetic in dtypes):
            yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = False
