"""Random directions: numbers a second by several ways, drawing and adding, and what share of a step that is."""

import argparse

import torch

from dist_vlcl.bench.result import Result, Table, interleaved, median, spread
from dist_vlcl.bench.setup import add_workload, device_of, workload_of
from dist_vlcl.dist.world import World
from dist_vlcl.zo.difference import Directions
from dist_vlcl.zo.noise import Key

EXAMPLES = """examples:
  python -m dist_vlcl.bench noise
  python -m dist_vlcl.bench noise --device cuda"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_workload(parser, images=8, classes=4)
    parser.add_argument("--repeats", type=int, default=5, help="turns that are timed (default: %(default)s)")


def run(args: argparse.Namespace) -> Result:
    device, workload = device_of(args), workload_of(args, orders="dual_all")
    step = workload.step(workload.towers(device), World.alone(device))
    tensors = [t.clone() for unit in step.towers.units.values() for t in unit.tensors().values()]
    values = {branch: flat.values_n.clone() for branch, flat in step.flats.items()}
    total = sum(v.numel() for v in values.values())
    flat = torch.zeros(total, device=device)

    def tensor_by_tensor() -> None:
        for t in tensors:
            t.data = t.data + torch.normal(0.0, 1.0, t.shape, device=device) * 1e-3

    def ours(law: str) -> None:
        draws = laws[law]
        for branch, v in values.items():
            v.add_(draws.draw(branch, Key(0, 0), 0), alpha=1e-3)

    laws = {law: Directions(step.flats, law) for law in ("gaussian", "rademacher")}
    ways = {
        "tensor by tensor, torch.normal (MeZO)": tensor_by_tensor,
        "one flat tensor, normal_": lambda: flat.add_(torch.empty_like(flat).normal_(), alpha=1e-3),
        "counter-based, Gaussian": lambda: ours("gaussian"),
        "counter-based, Rademacher": lambda: ours("rademacher"),
    }
    seconds = interleaved(ways, args.repeats, device)
    batch = workload.batch(step.towers.image_size)
    step_s = median(interleaved({"step": lambda: step([batch], Key(0, 0), 1e-3)}, 1, device)["step"])
    naive = seconds["tensor by tensor, torch.normal (MeZO)"]
    rows = [[way, total / median(s) / 1e6, spread(naive, s), f"{100 * median(s) / step_s:.2f} %"] for way, s in seconds.items()]
    columns = ["way", "million numbers/s", "times faster", f"of a dual_all step of {args.images} images"]
    return Result(
        [Table(f"Draw and add {total:,} numbers", columns, rows)], [{"way": w, "s": s, "step_s": step_s} for w, s in seconds.items()]
    )
