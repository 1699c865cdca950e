"""The hybrid step against the naive one in fp32, in one process, turn by turn; with the FLOPs that both execute and those of a model."""

import argparse
from dataclasses import replace
from typing import Any

from benchmarks.cost import naive_cost, shapes_of, step_cost
from benchmarks.count import flops, without_numbers
from benchmarks.naive import NaiveStep
from benchmarks.result import Result, Table, interleaved, median, spread
from benchmarks.setup import Workload, add_orders, add_workload, device_of, positive, settings_of, workload_of
from dist_vlcl.dist.world import World
from dist_vlcl.step import HybridStep
from dist_vlcl.zo.noise import Key

EXAMPLES = """examples:
  python -m benchmarks step --images 4 --classes 4                                a few settings at ViT-B/16, on a CPU
  python -m benchmarks step --orders all --zo conservative --count                every setting, counted only: no time is taken
  python -m benchmarks step --orders all --count --picture step.png               and a picture of them
  python -m benchmarks step --device cuda --orders language_all,dual_hop_odd      on a GPU, 128 images
  python -m benchmarks step --device cuda --precision bf16                        the fast step in bf16, the naive one in fp32"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_workload(parser)
    add_orders(parser, "language_all,vision_suffix,dual_hop_odd")
    parser.add_argument("--no-graphs", dest="graphs", action="store_false", help="launch kernels one by one on a GPU (model.graphs=false)")
    parser.add_argument("--repeats", type=positive, default=5, help="turns that are timed (default: %(default)s)")
    parser.add_argument("--count", action="store_true", help="count the fast step's FLOPs and take no time; any size on any machine")


def run(args: argparse.Namespace) -> Result:
    rows, records = [], []
    for orders in settings_of(args):
        workload = workload_of(args, orders=orders)
        record = counted(workload, args.count_on) if args.count else timed(workload, device_of(args), args.repeats)
        records.append({"orders": orders, **record})
        tera = [record[k] / 1e12 for k in ("naive_model", "model", "executed")]
        row: list[Any] = [orders, *tera, record["executed"] / record["model"], record["naive_model"] / record["model"]]
        if not args.count:
            row += [
                median(record["naive_s"]),
                median(record["fast_s"]),
                spread(record["naive_s"], record["fast_s"]),
                record["images_per_s"],
            ]
        rows.append(row)
    columns = ["orders", "naive TFLOP", "model TFLOP", "executed TFLOP", "executed / model", "naive / model"]
    title = f"{args.model}, {args.zo}, {args.images} images, {args.classes} classes, {args.sides}-sided, {args.precision}"
    if args.count:
        return Result([Table(f"FLOPs of a step: {title}", columns, rows)], records)
    columns += ["naive s, fp32", f"fast s, {args.precision}", "times faster", "images/s"]
    return Result([Table(f"A step, naive and fast: {title}", columns, rows)], records)


def counted(workload: Workload, device: str = "meta") -> dict[str, Any]:
    """Return the FLOPs of a step: executed (`meta`: in shapes only), by the model, and by the naive model."""
    with without_numbers():
        towers = workload.towers(device)
        step = workload.step(towers, World.alone(device))
        batch = workload.batch(towers.image_size)
        executed = flops(lambda: step([batch], Key(0, 0), 1e-3))
    return {"executed": executed, **_modelled(workload, step)}


def timed(workload: Workload, device: str, repeats: int) -> dict[str, Any]:
    """Return the same as `counted`, and the seconds of each turn of naive and fast."""
    towers = replace(workload, graphs=False).towers(device)
    fast, naive = workload.step(towers, World.alone(device)), naive_of(workload, device)
    batch = workload.batch(towers.image_size)
    executed = flops(lambda: fast([batch], Key(0, 0), 1e-3))
    if workload.graphs and device == "cuda":  # what a replay executes is not seen
        towers.record()
    naive_executed = flops(lambda: naive(batch, Key(0, 0), 1e-3))
    turns = {"naive": lambda: naive(batch, Key(0, 1), 1e-3), "fast": lambda: fast([batch], Key(0, 1), 1e-3)}
    seconds = interleaved(turns, repeats, device)
    modelled = _modelled(workload, fast)
    return {
        "executed": executed,
        "naive_executed": naive_executed,
        **modelled,
        "naive_s": seconds["naive"],
        "fast_s": seconds["fast"],
        "images_per_s": workload.images / median(seconds["fast"]),
    }


def naive_of(workload: Workload, device: str) -> NaiveStep:
    """Return the naive step of a workload: in fp32 whatever the fast one's precision is, since two evaluations in bf16 are no slope."""
    towers = replace(workload, precision="fp32", checkpoint=False).towers(device, context="full")
    return NaiveStep(towers, workload.orders_of(towers), workload.zeroth, workload.class_names)


def _modelled(workload: Workload, step: HybridStep) -> dict[str, int]:
    what = shapes_of(step.towers, step.tokens.shape[1]), step.orders, workload.zeroth, workload.images, workload.classes
    return {"model": step_cost(*what, step.delta_branches).total, "naive_model": naive_cost(*what).total}
