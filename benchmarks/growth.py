"""How the cost of a step and its time grow with the classes of a task, the tasks that were seen, and the experts."""

import argparse
from collections.abc import Collection
from functools import partial
from typing import Any

from benchmarks.count import flops as flops_of
from benchmarks.count import without_numbers
from benchmarks.result import Result, Table, interleaved, median, spread
from benchmarks.setup import Workload, add_orders, add_workload, device_of, numbers, positive, settings_of, workload_of
from benchmarks.step import counted
from dist_vlcl.dist.world import World
from dist_vlcl.zo.noise import Key

EXAMPLES = """examples:
  python -m benchmarks growth                                   counted at 128 images
  python -m benchmarks growth --time --images 8 --repeats 3     and timed"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_workload(parser)
    add_orders(parser, "language_all")
    parser.add_argument("--class-counts", type=numbers, default="10,50,100,200", help="(default: %(default)s)")
    parser.add_argument("--expert-counts", type=numbers, default="2,8,22", help="of which two act on a sample (default: %(default)s)")
    parser.add_argument(
        "--task-counts", type=numbers, default="1,10", help="the task that the step belongs to, after those before (default: %(default)s)"
    )
    parser.add_argument("--time", action="store_true", help="also take the steps, all sizes in turn")
    parser.add_argument("--repeats", type=positive, default=3, help="turns that are timed (default: %(default)s)")


def run(args: argparse.Namespace) -> Result:
    tables, records = [], []
    for orders in settings_of(args):
        by_classes = {n: workload_of(args, orders=orders, classes=n) for n in args.class_counts}
        by_experts = {n: workload_of(args, orders=orders, options=(("experts", n),)) for n in args.expert_counts}
        for what, workloads in {"classes": by_classes, "experts": by_experts}.items():
            flops = {n: counted(workload, args.count_on)["executed"] for n, workload in workloads.items()}
            seconds = _seconds(workloads, device_of(args), args.repeats) if args.time else {}
            first = min(workloads)
            rows: list[list[Any]] = [[n, flops[n] / 1e12, flops[n] / flops[first]] for n in workloads]
            for row in rows if seconds else []:
                row += [median(seconds[row[0]]), spread(seconds[row[0]], seconds[first])]
            columns = [what, "TFLOP", "relative", *(["s", "relative, by time"] if seconds else [])]
            tables.append(Table(f"A step by its {what}: {args.model}, {orders}, {args.zo}, {args.images} images", columns, rows))
            records += [{"orders": orders, what: n, "flops": flops[n], "s": seconds.get(n)} for n in workloads]
        by_task = in_tasks(workload_of(args, orders=orders), args.task_counts, args.count_on)
        rows = [[n, count / 1e12, count / by_task[min(by_task)]] for n, count in by_task.items()]
        tables.append(
            Table(f"A step by its task: {args.model}, {orders}, {args.zo}, {args.images} images", ["task", "TFLOP", "relative"], rows)
        )
        records += [{"orders": orders, "task": n, "flops": count} for n, count in by_task.items()]
    note = "Tasks that were seen before cost nothing: a step reads the classes of its own task only, and adapters do not grow."
    return Result(tables, records, [note])


def in_tasks(workload: Workload, tasks: Collection[int], device: str = "meta") -> dict[int, int]:
    """Return the FLOPs of a step in each of these tasks, counted from 1, of one run that takes a step in every task up to the last."""
    counts = {}
    with without_numbers():
        step = workload.step(workload.towers(device), World.alone(device))
        batch = workload.batch(step.towers.image_size)
        for task in range(1, max(tasks) + 1):
            letter = chr(ord("a") + task % 26)  # other classes, prompts of the same length
            step.begin([f"{name} {letter}" for name in workload.class_names])
            counts[task] = flops_of(partial(step, [batch], Key(0, task), 1e-3))
    return {task: counts[task] for task in tasks}


def _seconds(workloads: dict[int, Workload], device: str, repeats: int) -> dict[int, list[float]]:
    def ready(workload: Workload) -> Any:
        step = workload.step(workload.towers(device), World.alone(device))
        batch = workload.batch(step.towers.image_size)
        return lambda: step([batch], Key(0, 0), 1e-3)

    timed = interleaved({str(n): ready(workload) for n, workload in workloads.items()}, repeats, device)
    return {int(n): s for n, s in timed.items()}
