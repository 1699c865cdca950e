"""Memory of a step: what back-propagation keeps for an image and a prompt, and the peak per setting beside the paper's Table 5."""

import argparse
import itertools
from typing import Any

import torch

from benchmarks.count import PeakBytes, saved_bytes, without_numbers
from benchmarks.naive import NaiveStep
from benchmarks.result import Result, Table
from benchmarks.setup import Workload, add_orders, add_workload, device_of, settings_of, workload_of
from dist_vlcl.dist.world import World
from dist_vlcl.model.clip import PRECISIONS
from dist_vlcl.paper import published
from dist_vlcl.zo.noise import Key

EXAMPLES = """examples:
  python -m benchmarks memory                           counted for ViT-B/16, 64 images, 125 classes: no GPU, no time
  python -m benchmarks memory --picture memory.png      and a picture, beside the paper's
  python -m benchmarks memory --adapter lora            the other half of the paper's Table 5
  python -m benchmarks memory --device cuda             with the peak that the GPU saw"""

SETTINGS_OF_TABLE_5 = {"first": "fo", "language_all": "language", "vision_all": "vision", "dual_all": "dual"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_workload(parser, images=64, classes=125)
    add_orders(parser, ",".join(SETTINGS_OF_TABLE_5))


def run(args: argparse.Namespace) -> Result:
    device, records = device_of(args), []
    published_gb = published()["table5_memory_gb"].get(args.adapter, {})
    for orders in settings_of(args):
        for precision, checkpoint in itertools.product(PRECISIONS, (False, True)):
            workload = workload_of(args, orders=orders, precision=precision, checkpoint=checkpoint, graphs=False)
            counted = peak_bytes(workload, args.count_on)
            record: dict[str, Any] = {"orders": orders, "precision": precision, "checkpoint": checkpoint, "counted_bytes": counted}
            if device == "cuda":
                record["measured_bytes"] = measured_bytes(workload)
            records.append(record)
    kept: dict[str, dict[str, Any]] = {"naive": {"naive": True}} if args.adapter == "moe" else {}  # which is all the naive step knows
    for precision in PRECISIONS:
        kept |= {precision: {"precision": precision}, f"{precision}, checkpoints": {"precision": precision, "checkpoint": True}}
    size = {"model": args.model, "adapter": args.adapter}
    saved = [
        [name, *[saved_per_sample(b, device=args.count_on, **options, **size) / 1e6 for b in ("vision", "language")]]
        for name, options in kept.items()
    ]
    peaks = [
        [
            r["orders"],
            r["precision"],
            "yes" if r["checkpoint"] else "no",
            r["counted_bytes"] / 1e9,
            r["measured_bytes"] / 1e9 if "measured_bytes" in r else "not measured",
            published_gb.get(SETTINGS_OF_TABLE_5.get(r["orders"], ""), ""),
        ]
        for r in records
    ]
    columns = ["orders", "precision", "checkpoint", "counted GB", "GPU GB", "paper GB"]
    return Result(
        [
            Table(f"Kept for the backward pass, first order everywhere: {args.model}", ["", "MB an image", "MB a prompt"], saved),
            Table(f"Peak of a step, weights included: {args.images} images, {args.classes} classes", columns, peaks),
        ],
        records + [{"kept": name, "image_mb": image, "prompt_mb": prompt} for name, image, prompt in saved],
    )


def saved_per_sample(branch: str, naive: bool = False, samples: int = 2, device: str = "meta", **workload: Any) -> float:
    """Return the bytes kept for the backward pass of an image (branch vision) or a prompt, by first order everywhere."""
    setting = Workload(orders="first", images=samples, classes=samples, **workload)
    towers = setting.towers(device, context="full" if naive else "truncated")
    with without_numbers():
        if naive:
            step = NaiveStep(towers, setting.orders_of(towers), setting.zeroth, setting.class_names)
            inputs, run = step.tokens, step.features
        else:
            inputs = towers.prompts(setting.class_names).to(device)

            def run(branch: str, inputs: torch.Tensor, noise: Any) -> torch.Tensor:
                return towers({branch: inputs}, noise)[branch][0]

        if branch == "vision":
            inputs = setting.batch(towers.image_size).images.to(device)
        noise = setting.noise(Key(0, 0), device)
        weights = [*towers.parameters(), *towers.buffers()]
        return saved_bytes(lambda: run(branch, inputs, noise), besides=weights) / samples


def peak_bytes(workload: Workload, device: str = "meta") -> int:
    """Return the most bytes alive in the second step, weights included, optimiser too; counted, on no device."""
    with without_numbers(), PeakBytes() as memory:
        towers = workload.towers(device)
        step = workload.step(towers, World.alone(device))
        batch = workload.batch(towers.image_size).to(device)
        step([batch], Key(0, 0), 1e-3)
        memory.peak = memory.alive
        step([batch], Key(0, 1), 1e-3)
    return memory.peak


def measured_bytes(workload: Workload) -> int:
    """Return the most that torch had allocated on the GPU in the second step."""
    step = workload.step(workload.towers("cuda"), World.alone("cuda"))
    batch = workload.batch(step.towers.image_size)
    step([batch], Key(0, 0), 1e-3)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    step([batch], Key(0, 1), 1e-3)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated()
