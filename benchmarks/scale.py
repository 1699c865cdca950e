"""Steps a second on several ranks: weak scaling (the same images a rank) or strong (the same images in all)."""

import argparse
import os

from benchmarks.ranks import launch
from benchmarks.result import Result, Table, median, spread
from benchmarks.setup import add_orders, add_workload, device_of, numbers, positive, settings_of, workload_of

EXAMPLES = """examples:
  python -m benchmarks scale --processes 1,2                             weak scaling of the small CLIP, 64 images a rank
  python -m benchmarks scale --strong --device cuda --processes 1,2,4,8 --model vit_b16
  python -m benchmarks scale --processes 2 --apart                       what it brings that gradients travel beside the probes
  python -m benchmarks scale --processes 2 --trace trace.json            and a trace of one step for ui.perfetto.dev"""

NOTE = (
    "In turn, in the same processes: a step of all ranks; of each rank by itself at the same time (strangers, who exchange nothing); of "
    "rank 0 alone, while the others wait. Seconds are those of the slowest rank, on the wall clock. Efficiency: images a second of all "
    "ranks, divided by ranks times those of one alone; median over the turns (lowest to highest). Against strangers leaves out what ranks "
    "on one machine take from each other, and that the slowest of several is slower than one. A row of one rank is a step beside itself "
    "(on a CPU, first-order units in DDP and without): how restless the machine is."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_workload(parser, model="small", images=64, classes=10, zo="mozo")
    add_orders(parser, "dual_all,dual_hop_odd")
    parser.add_argument("--processes", type=numbers, default="1,2", help="numbers of ranks with commas between (default: %(default)s)")
    parser.add_argument("--strong", action="store_true", help="--images are shared among the ranks, not for each")
    parser.add_argument("--steps", type=positive, default=10, help="that are timed (default: %(default)s)")
    parser.add_argument("--threads", type=positive, help="CPU threads of a rank (default: cores shared among the most ranks, for all rows)")
    parser.add_argument("--apart", action="store_true", help="also, in turn, steps that exchange their gradients before the probes begin")
    parser.add_argument("--trace", help="write a trace of one step of rank 0, on the most ranks, to this file")


def run(args: argparse.Namespace) -> Result:
    threads = args.threads or max(1, len(os.sched_getaffinity(0)) // max(args.processes))
    rows, records = [], []
    for orders in settings_of(args):
        for size in args.processes:
            images, alone = (args.images, args.images) if args.strong else (args.images * size, args.images)
            trace = args.trace if size == max(args.processes) else None
            workload = workload_of(args, orders=orders, images=images)
            answer = launch(size, workload, device_of(args), args.steps, trace, args.apart, threads=threads, alone=alone)
            together = answer["seconds"]
            ideal = [seconds * images / (alone * size) for seconds in answer["seconds_alone"]]
            rows.append([orders, size, images, median(together), images / median(together), spread(ideal, together)])
            rows[-1] += [spread(answer["seconds_strangers"], together), "yes" if answer["digest_is_equal"] else "NO"]
            if args.apart:
                rows[-1] += [median(answer["seconds_apart"]), spread(answer["seconds_apart"], together)]
            records.append({"orders": orders, "processes": size, "images": images, **answer})
    columns = ["orders", "ranks", "images", "s a step", "images/s", "efficiency", "against strangers", "ranks agree bit for bit"]
    if args.apart:
        columns += ["s a step, gradients before the probes", "times faster beside them"]
    return Result([Table(f"{'Strong' if args.strong else 'Weak'} scaling: {args.model}, {args.zo}", columns, rows)], records, [NOTE])
