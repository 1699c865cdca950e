"""Time and FLOPs of a step: ours and a naive step in fp32, alternately in one process, beside the cost model.

    python -m benchmarks.step --images 8 --classes 8                          times on this machine, ViT-B/16
    python -m benchmarks.step --count --orders all zo=mozo                    FLOPs only, counted without computing
    python -m benchmarks.step --count --classes 10,50,100,200                 how the cost grows with the classes
    python -m benchmarks.step --count adapter.experts=22                      or with the experts: once for each number
    python -m benchmarks.step --count model.name=PE-Core-B-16                 what blocks of timm cost more than open_clip's own
    python -m benchmarks.step cluster.device=cuda model.precision=bf16        a GPU, our step in bf16

With cluster.exact_bits=true a rank with fewer than 8 images computes 8. The naive step knows the adapter moe and open_clip's own blocks,
and is left out with others. For blocks of timm, `executed / model` says what it costs that they are called whole (docs/models.md).
"""

import argparse
import statistics
from collections.abc import Callable, Sequence
from typing import Any

from benchmarks.common import Row, Table, Workload, flops, interleaved, make_parser, positive, ratio, run, without_numbers, workloads_of
from benchmarks.cost_model import naive_cost, step_cost, tower_shapes
from benchmarks.naive import NaiveStep
from dist_vlcl.dist.world import World
from dist_vlcl.model.moe import MoEConfig
from dist_vlcl.model.timm_tower import WholeBlock
from dist_vlcl.zo.noise import Key


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = make_parser(__doc__, images=128, classes=20, orders="language_all,vision_suffix,dual_hop_odd")
    parser.add_argument("--repeats", type=positive, default=5, help="turns that are timed (default: %(default)s)")
    parser.add_argument("--count", action="store_true", help="only count FLOPs; any size on any machine")
    run(parser, measure, arguments)


def measure(args: argparse.Namespace) -> list[Table]:
    """Return one row per order plan and number of classes."""
    rows = []
    for orders, workload in workloads_of(args):
        row = {"orders": orders, "classes": workload.classes, **count(workload)}
        rows.append(row if args.count else row | time_in_turn(workload, args.repeats))
    config = workload.config
    return [Table(f"A step: {config.model.name}, {config.zo.name}, {config.model.precision}, {args.images} images", rows)]


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
    """Return the seconds of our step, and of the naive one if it knows the adapter."""
    device, key = workload.device, Key(0, 1)
    ours = workload.step(workload.towers(device), World.alone(device))
    batch = workload.batch(ours.towers)
    variants: dict[str, Callable[[], Any]] = {"ours": lambda: ours([batch], key, 1e-3)}
    if isinstance(workload.config.adapter, MoEConfig) and not isinstance(ours.towers.vision.block(1), WholeBlock):
        naive = naive_step(workload, device)
        variants["naive"] = lambda: naive(batch, key, 1e-3)
    seconds = interleaved(variants, repeats, device)
    median = statistics.median(seconds["ours"])
    row: Row = {"s": median, "images/s": workload.images / median}
    if "naive" in seconds:
        row |= {"naive s": statistics.median(seconds["naive"]), "times faster": ratio(seconds["naive"], seconds["ours"])}
    return row


def naive_step(workload: Workload, device: str) -> NaiveStep:
    """Return the naive step of a workload, in fp32 whatever our precision: two evaluations in bf16 do not give a slope."""
    naive = workload.changed("model.precision=fp32", "model.checkpoint=false", "model.graphs=false", "model.context=full")
    towers = naive.towers(device)
    return NaiveStep(towers, naive.orders(towers), naive.config.zo, naive.class_names)


if __name__ == "__main__":
    main()
