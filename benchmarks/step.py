"""Time and FLOPs of a step: ours and a naive step in fp32, alternately in one process, beside the cost model.

    python -m benchmarks.step model=small --images 8 --classes 8              times on this machine, in seconds
    python -m benchmarks.step --images 8 --classes 8                          the same of ViT-B/16, in minutes
    python -m benchmarks.step --count --orders all zo=mozo                    FLOPs only, counted without computing
    python -m benchmarks.step --count --classes 200                           how the cost grows with the classes: once for each number
    python -m benchmarks.step --count adapter.experts=22                      or with the experts
    python -m benchmarks.step --count model.name=PE-Core-B-16                 what blocks of timm cost more than open_clip's own
    python -m benchmarks.step cluster.device=cuda model.precision=bf16        a GPU, our step in bf16

With cluster.exact_bits=true a rank with fewer than 16 images computes 16. The naive step is left out for models and strategies that it does
not know, with the reason below the table. For blocks of timm, `executed / model` says what it costs that they are called whole
(docs/models.md).
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

from benchmarks.common import Row, Table, Workload, benchmark, flops, interleaved, print_row, ratio, without_numbers, workloads_of
from benchmarks.cost_model import naive_cost, step_cost, tower_shapes
from benchmarks.naive import naive_step, refusal
from dist_vlcl.dist.world import World
from dist_vlcl.zo.noise import Key


def measure(args: argparse.Namespace) -> list[Table]:
    """Return one row per order plan and number of classes. Each is printed on stderr as soon as it is measured."""
    work, started, rows = workloads_of(args), time.monotonic(), list[Row]()
    for orders, workload in work:
        row = {"orders": orders, "classes": workload.classes, **count(workload)}
        rows.append(row if args.count else row | time_in_turn(workload, args.repeats))
        print_row(rows, len(work), started)
    config = workload.config
    reason = "" if args.count else refusal(workload.towers("meta"), config.zo)
    return [Table(f"A step: {config.model.name}, {config.zo.name}, {config.model.precision}, {args.images} images", rows, reason)]


def count(workload: Workload) -> Row:
    """Return the TFLOPs of the naive model, of our model, and those that our step executes on the meta device."""
    with without_numbers():
        step = workload.step(workload.towers("meta"), World.alone("meta"))
        batch = workload.batch(step.towers)
        executed = flops(lambda: step([batch], Key(0, 0), 1e-3))
    size = tower_shapes(step.towers, step.tokens.shape[1]), step.orders, workload.config.zo, workload.images, workload.classes
    naive, model = naive_cost(*size), step_cost(*size, step.precision.delta_branches)
    tera = {"naive TFLOP": naive / 1e12, "model TFLOP": model / 1e12, "executed TFLOP": executed / 1e12}
    return {**tera, "executed / model": executed / model, "naive / model": naive / model}


def time_in_turn(workload: Workload, repeats: int) -> Row:
    """Return the seconds of our step, and of the naive one if it knows the model and the strategy."""
    device, key = workload.device, Key(0, 1)
    ours = workload.step(workload.towers(device), World.alone(device))
    batch = workload.batch(ours.towers)
    variants: dict[str, Callable[[], Any]] = {"ours": lambda: ours([batch], key, 1e-3)}
    if not refusal(ours.towers, workload.config.zo):
        naive = naive_step(workload, device)
        variants["naive"] = lambda: naive(batch, key, 1e-3)
    seconds = interleaved(variants, repeats, device)
    median = statistics.median(seconds["ours"])
    row: Row = {"s": median, "images/s": workload.images / median}
    if "naive" in seconds:
        row |= {"naive s": statistics.median(seconds["naive"]), "times faster": ratio(seconds["naive"], seconds["ours"])}
    return row


main = benchmark(measure, __doc__, images=128, classes=20, orders="language_all,vision_suffix,dual_hop_odd", repeats=5, count=False)
