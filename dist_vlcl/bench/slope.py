"""How much of a projected gradient is rounding: slopes at several precisions against those in fp64, direction by direction."""

import argparse
import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from dist_vlcl.bench.result import Result, Table
from dist_vlcl.bench.setup import Workload, add_orders, add_workload, device_of, settings_of, workload_of
from dist_vlcl.dist.world import World
from dist_vlcl.zo.noise import Key

EXAMPLES = """examples:
  python -m dist_vlcl.bench slope --images 4 --classes 4 --directions 6        ViT-B/16 with random weights
  python -m dist_vlcl.bench slope --device cuda --images 32                    with TF32, too"""

LIMIT = 0.1  # noise over slope, above which a precision is not fit for zeroth order


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_workload(parser, images=4, classes=4, zo="naive")
    add_orders(parser, "language_all,vision_all")
    parser.add_argument("--directions", type=int, default=8, help="how many slopes are compared (default: %(default)s)")


def run(args: argparse.Namespace) -> Result:
    device, rows, records = device_of(args), [], []
    for orders in settings_of(args):
        workload = workload_of(args, orders=orders)
        exact = slopes(workload, device, "fp64", args.directions)
        for precision in ("fp32", *(["tf32"] if device == "cuda" else []), "bf16 autocast", "fp16 autocast"):
            found = slopes(workload, device, precision, args.directions)
            noise = float((found - exact).square().mean().sqrt() / exact.square().mean().sqrt())
            agree = float((found.sign() == exact.sign()).double().mean())
            rows.append([orders, precision, noise, f"{100 * agree:.0f} %", "fit" if noise < LIMIT else "not fit"])
            records.append({"orders": orders, "precision": precision, "noise": noise, "sign_agreement": agree, "slopes": found.tolist()})
    columns = ["orders", "precision", "noise / slope", "signs that agree", f"below {LIMIT}"]
    eps = ", ".join(f"{b} {e:g}" for b, e in workload_of(args, orders="first").zeroth.epsilon.items())
    title = f"Rounding in projected gradients: {args.model}, random weights, {args.images} images, {args.classes} classes, epsilon {eps}"
    return Result(
        [Table(title, columns, rows)], records, ["Training runs in fp32 with TF32 off, whatever the launcher's configuration says."]
    )


def slopes(workload: Workload, device: str, precision: str, directions: int) -> torch.Tensor:
    """Return projected gradients `[directions]` at the same point along the same directions."""
    towers = workload.towers(device)
    step = workload.step(towers, World.alone(device))
    step.zeroth.config.clip = None
    if precision == "fp64":
        towers.double()
        for flat in step.flats.values():
            flat.values_n = flat.values_n.double()
            flat.tie()
    batch, result = workload.batch(towers.image_size), []
    with evaluated_in(precision, device):
        for k in range(directions):
            (move,) = step([batch], Key(7, k), 0.0).moves  # a learning rate of 0: every slope at the same point
            result.append(next(iter(move.estimate.projected_gradient.values()))[0])
    return torch.tensor(result, dtype=torch.float64)


@contextlib.contextmanager
def evaluated_in(precision: str, device: str) -> Iterator[None]:
    """Run matrix products in a precision that training itself refuses."""
    dtypes: dict[str, Any] = {"bf16 autocast": torch.bfloat16, "fp16 autocast": torch.float16}
    torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
    try:
        with torch.autocast(device, dtype=dtypes.get(precision), enabled=precision in dtypes):
            yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = False
