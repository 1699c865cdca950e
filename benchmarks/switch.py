"""What a change of task costs, in steps: prompts, fresh optimisers, the first batch; and the first step of a run, after the imports."""

import argparse
import subprocess
import sys
import tempfile
import time

from benchmarks.result import Result, Table, median
from benchmarks.setup import add_orders, add_workload, device_of, positive, settings_of, workload_of
from dist_vlcl.data.loader import Loader
from dist_vlcl.data.settings import DataConfig
from dist_vlcl.data.shards import open_index
from dist_vlcl.data.tasks import TaskStream
from dist_vlcl.data.transforms import TrainTransform
from dist_vlcl.dist.world import World
from dist_vlcl.zo.noise import Key

EXAMPLES = """examples:
  python -m benchmarks switch
  python -m benchmarks switch --model vit_b16 --images 8"""

# A real run, timed from its imports to the record of its first step, where it is left.
FIRST_STEP = """
import os, sys, time
import accelerate, open_clip
from dist_vlcl import train
begun = {clock}()
def leave(*_):
    print({clock}() - begun, flush=True)
    os._exit(0)
train.log_step = leave
train.main()
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_workload(parser, model="small", images=64, classes=10, zo="mozo")
    add_orders(parser, "dual_hop_odd")
    parser.add_argument("--repeats", type=positive, default=5, help="tasks (default: %(default)s)")


def run(args: argparse.Namespace) -> Result:
    device, rows, records = device_of(args), [], []
    clock = time.process_time if device == "cpu" else time.perf_counter
    with tempfile.TemporaryDirectory() as folder:
        index = open_index(DataConfig(root=folder))
        tasks = TaskStream(index.class_names, increment=2)
        for orders in settings_of(args):
            workload = workload_of(args, orders=orders)
            step = workload.step(workload.towers(device), World.alone(device))
            batch, loader = workload.batch(step.towers.image_size), Loader(index, device=device)

            def one_step(k: int, step=step, batch=batch) -> float:
                begun = clock()
                step([batch], Key(0, k), 1e-3).loss  # noqa: B018  reading a loss waits for the device
                return clock() - begun

            def first_batch(number: int, loader=loader, size=step.towers.image_size) -> float:
                begun = clock()
                options = {"batch_size": args.images, "seed": 0, "epoch": number // len(tasks), "transform": TrainTransform(size)}
                next(iter(loader.train(tasks[number % len(tasks)], **options)))
                return clock() - begun

            for _ in range(3):  # of which the second is recorded on a GPU
                one_step(0)
            steps, begins, batches, after, second = [], [], [], [], []
            for task in range(args.repeats):
                steps.append(one_step(1 + 3 * task))
                begun = clock()
                step.begin([f"{name}{' of the last task' * (task % 3)}" for name in workload.class_names])  # 0, 4, 8 tokens more
                begins.append(clock() - begun)
                batches.append(first_batch(task))
                after.append(one_step(2 + 3 * task))
                second.append(one_step(3 + 3 * task))  # in which new shapes are recorded on a GPU
            extra = [max(0.0, a - b) + max(0.0, c - b) for a, c, b in zip(after, second, steps, strict=True)]
            cost = median([sum(parts) for parts in zip(begins, batches, extra, strict=True)])
            first = _first_step(args, orders, folder, device)
            rows.append([orders, median(steps), median(begins), median(batches), median(extra), cost / median(steps), first])
            records.append(
                {
                    "orders": orders,
                    "step_s": steps,
                    "begin_s": begins,
                    "batch_s": batches,
                    "after_s": after,
                    "second_s": second,
                    "first_s": first,
                }
            )
    columns = [
        "orders",
        "s a step",
        "s prompts, optimisers",
        "s first batch",
        "s more, first two steps",
        "together, in steps",
        "s to a run's first step",
    ]
    note = "The last column is a run of its own, on digits: from the end of the imports to the record of its first step."
    return Result([Table(f"Change of task: {args.model}, {args.images} images", columns, rows)], records, [note])


def _first_step(args: argparse.Namespace, orders: str, folder: str, device: str) -> float:
    options = [
        f"data.root={folder}",
        f"run.root={folder}/runs",
        f"model={args.model}",
        "model.pretrained=random",
        f"cluster.device={device}",
    ]
    options += [f"orders={orders}", f"zo={args.zo}", f"adapter={args.adapter}", f"train.batch_size={args.images}", "eval.zero_shot=false"]
    options += [f"run.name={orders}", "run.wandb=off", "run.progress=false", "cluster.threads=1"]
    script = FIRST_STEP.format(clock="time.process_time" if device == "cpu" else "time.perf_counter")
    done = subprocess.run([sys.executable, "-c", script, *options], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"a run that was to show its first step ended with {done.returncode}: {done.stderr[-2000:]}")
    return float(done.stdout.split()[-1])
