"""Random directions: numbers a second by several ways; what noise and its application take of a step, with everything else left out."""

import argparse
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from benchmarks.naive import NaiveStep
from benchmarks.result import Result, Table, interleaved, median, spread
from benchmarks.setup import Workload, add_workload, device_of, positive, workload_of
from dist_vlcl.dist.world import World
from dist_vlcl.step import HybridStep
from dist_vlcl.zo.difference import Candidate, Directions
from dist_vlcl.zo.noise import Key
from dist_vlcl.zo.update import ZerothOrder

EXAMPLES = """examples:
  python -m benchmarks noise
  python -m benchmarks noise --device cuda"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_workload(parser, images=8, classes=4)
    parser.add_argument("--repeats", type=positive, default=5, help="turns that are timed (default: %(default)s)")


def run(args: argparse.Namespace) -> Result:
    device, workload = device_of(args), workload_of(args, orders="dual_all")
    step = workload.step(workload.towers(device), World.alone(device))
    batch = workload.batch(step.towers.image_size)
    drawn = interleaved(draws(step, device), args.repeats, device)
    parts = interleaved(noise_of_a_step(workload, step, device), args.repeats, device)
    step_s = median(interleaved({"step": lambda: step([batch], Key(0, 0), 1e-3)}, 3 if device == "cuda" else 1, device)["step"])
    total = sum(flat.numel for flat in step.flats.values())
    naive, naive_step = next(iter(drawn.values())), next(iter(parts.values()))
    rows = [[way, total / median(s) / 1e6, spread(naive, s)] for way, s in drawn.items()]
    shares: list[Sequence[Any]] = [
        [part, 1000 * median(s), "" if "dropout" in part else spread(naive_step, s), f"{100 * median(s) / step_s:.3f} %"]
        for part, s in parts.items()
    ]
    columns = ["what", "ms", "times faster", f"of our step of {args.images} images, {step_s:.3g} s"]
    return Result(
        [
            Table(f"Draw and add {total:,} numbers", ["way", "million numbers/s", "times faster"], rows),
            Table(f"Noise and apply in a step: {args.model}, dual_all, {args.zo}, losses given", columns, shares),
        ],
        [{"way": w, "s": s, "step_s": step_s} for w, s in (drawn | parts).items()],
    )


def draws(step: HybridStep, device: str) -> dict[str, Any]:
    """Return ways to draw as many numbers as a direction has, and to add them."""
    tensors = [t.clone() for unit in step.towers.units.values() for t in unit.tensors().values()]
    values = {branch: flat.values_n.clone() for branch, flat in step.flats.items()}
    flat = torch.zeros(sum(v.numel() for v in values.values()), device=device)

    def tensor_by_tensor() -> None:
        for t in tensors:
            t.data = t.data + torch.normal(0.0, 1.0, t.shape, device=device) * 1e-3

    def ours(directions: Directions) -> None:
        for branch, v in values.items():
            v.add_(directions.draw(branch, Key(0, 0), 0), alpha=1e-3)

    gaussian, rademacher = (Directions(step.flats, law) for law in ("gaussian", "rademacher"))
    return {
        "tensor by tensor, torch.normal (MeZO)": tensor_by_tensor,
        "one flat tensor, normal_": lambda: flat.add_(torch.empty_like(flat).normal_(), alpha=1e-3),
        "counter-based, Gaussian": lambda: ours(gaussian),
        "counter-based, Rademacher": lambda: ours(rademacher),
    }


def noise_of_a_step(workload: Workload, step: HybridStep, device: str) -> dict[str, Any]:
    """Return what steps do besides evaluating losses: the naive one, ours by the law of its directions, and ours for the adapters."""
    towers = workload.towers(device, context="full")
    naive = NaiveStep(towers, workload.orders_of(towers), workload.zeroth, workload.class_names)

    def ours(zeroth: ZerothOrder) -> None:
        def evaluate(candidates: Sequence[Candidate]) -> list[float]:
            for branch, flat in zeroth.flats.items():  # as BatchLosses makes its parameter sets
                offsets = [c[branch] for c in candidates if branch in c]
                if offsets:
                    torch.stack(offsets).add_(flat.values_n)
            return [1.0 + 1e-3 * k for k in range(len(candidates))]

        _, moves = zeroth.decide(evaluate, zeroth.rounds()[0], Key(0, 0), 1e-6)
        zeroth.apply(moves or [])

    def adapters() -> None:
        noise = step._step_noise(Key(0, 0), torch.arange(workload.images, device=device))
        inputs = {"vision": torch.empty(workload.images), "language": step.tokens}
        for branch in inputs:
            tower = step.towers.tower(branch)
            for block in tower:
                block.adapter.draw(noise, branch, block.unit.id.layer, tower.ends.length(inputs[branch]), True)

    laws = {law: ZerothOrder(step.flats, replace(workload.zeroth, directions=law)) for law in ("gaussian", "rademacher")}
    return {
        "naive: drawn again for each pass, tensor by tensor": lambda: naive._zeroth_order(lambda: 1.0, Key(0, 0), 1e-6, 1.0),
        "ours, Gaussian": lambda: ours(laws["gaussian"]),
        "ours, Rademacher": lambda: ours(laws["rademacher"]),
        "ours, router noise and dropout of all experts": adapters,
    }
