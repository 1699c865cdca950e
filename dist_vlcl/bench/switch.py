"""What a change of task costs, in steps: prompts, fresh optimisers, a new loader; and the first step of a run, after the imports."""

import argparse
import time

from dist_vlcl.bench.result import Result, Table, median
from dist_vlcl.bench.setup import add_orders, add_workload, device_of, settings_of, workload_of
from dist_vlcl.dist.world import World
from dist_vlcl.zo.noise import Key

EXAMPLES = """examples:
  python -m dist_vlcl.bench switch
  python -m dist_vlcl.bench switch --model vit_b16 --images 8"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_workload(parser, model="small", images=64, classes=10, zo="mozo")
    add_orders(parser, "dual_hop_odd")
    parser.add_argument("--repeats", type=int, default=5, help="tasks (default: %(default)s)")


def run(args: argparse.Namespace) -> Result:
    device, rows, records = device_of(args), [], []
    clock = time.process_time if device == "cpu" else time.perf_counter
    for orders in settings_of(args):
        workload, start = workload_of(args, orders=orders), clock()
        step = workload.step(workload.towers(device), World.alone(device))
        batch = workload.batch(step.towers.image_size)

        def one_step(k: int, step=step, batch=batch) -> float:
            begun = clock()
            step([batch], Key(0, k), 1e-3).loss  # noqa: B018  reading a loss waits for the device
            return clock() - begun

        one_step(0)
        first = clock() - start
        steps, switches, after = [], [], []
        for task in range(args.repeats):
            steps.append(one_step(1 + 2 * task))
            begun = clock()
            step.begin([f"{name} of task {task}" for name in workload.class_names])
            switches.append(clock() - begun)
            after.append(one_step(2 + 2 * task))
        cost = median([s + max(0.0, a - b) for s, a, b in zip(switches, after, steps, strict=True)])
        rows.append([orders, median(steps), cost, cost / median(steps), first])
        records.append({"orders": orders, "step_s": steps, "begin_s": switches, "step_after_s": after, "first_s": first})
    columns = ["orders", "s a step", "s a switch", "in steps", "s from the model's construction to the end of the first step"]
    return Result([Table(f"Change of task: {args.model}, {args.images} images", columns, rows)], records)
