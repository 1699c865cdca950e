"""Steps a second on several ranks: weak scaling (the same images a rank) or strong (the same images in all)."""

import argparse
import os
from concurrent.futures import ThreadPoolExecutor
from statistics import mean

from dist_vlcl.bench.ranks import launch
from dist_vlcl.bench.result import Result, Table, median, spread
from dist_vlcl.bench.setup import add_orders, add_workload, device_of, settings_of, workload_of

EXAMPLES = """examples:
  python -m dist_vlcl.bench scale --processes 1,2                             weak scaling of the small CLIP, 64 images a rank
  python -m dist_vlcl.bench scale --strong --device cuda --processes 1,2,4,8 --model vit_b16
  python -m dist_vlcl.bench scale --processes 2 --apart                       what it brings that gradients travel beside the probes
  python -m dist_vlcl.bench scale --processes 1,2 --strangers                 is it the exchange, or the machine?
  python -m dist_vlcl.bench scale --processes 2 --trace trace.json            and a trace of one step for ui.perfetto.dev"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_workload(parser, model="small", images=64, classes=10, zo="mozo")
    add_orders(parser, "dual_all,dual_hop_odd")
    parser.add_argument("--processes", default="1,2", help="numbers of ranks with commas between (default: %(default)s)")
    parser.add_argument("--strong", action="store_true", help="--images are shared among the ranks, not for each")
    parser.add_argument("--steps", type=int, default=10, help="that are timed (default: %(default)s)")
    parser.add_argument("--threads", type=int, help="CPU threads of a rank (default: the cores, shared among the most ranks, for all rows)")
    parser.add_argument("--apart", action="store_true", help="also, in turn, steps that exchange their gradients before the probes begin")
    parser.add_argument("--strangers", action="store_true", help="also as many runs at once that exchange nothing, to compare with")
    parser.add_argument("--trace", help="write a trace of one step of rank 0, on the most ranks, to this file")


def run(args: argparse.Namespace) -> Result:
    try:
        sizes = [int(size) for size in args.processes.split(",")]
    except ValueError:
        raise ValueError(f"--processes {args.processes}: give numbers with commas between, such as 1,2,4") from None
    threads = args.threads or max(1, len(os.sched_getaffinity(0)) // max(sizes))
    rows, records = [], []
    for orders in settings_of(args):
        alone = None
        for size in sizes:
            images = args.images if args.strong else args.images * size
            trace = args.trace if size == max(sizes) else None
            answer = launch(size, workload_of(args, orders=orders, images=images), device_of(args), args.steps, trace, args.apart, threads)
            rate = images / median(answer["seconds"])
            cpu_rate = images / size / median(answer["cpu_seconds"])
            alone = alone or (rate / size, cpu_rate)
            equal = "yes" if answer["digest_is_equal"] else "NO"
            rows.append([orders, size, images, median(answer["seconds"]), rate, rate / size / alone[0], cpu_rate / alone[1]])
            if args.strangers:
                one = workload_of(args, orders=orders, images=images // size)
                with ThreadPoolExecutor(size) as pool:
                    others = list(pool.map(lambda _, w=one: launch(1, w, device_of(args), args.steps, threads=threads), range(size)))
                rows[-1].append(mean(median(other["seconds"]) for other in others) / median(answer["seconds"]))
                answer["strangers_seconds"] = [other["seconds"] for other in others]
            rows[-1].append(equal)
            if args.apart:
                rows[-1] += [median(answer["seconds_apart"]), spread(answer["seconds_apart"], answer["seconds"])]
            records.append({"orders": orders, "processes": size, "images": images, **answer})
    columns = ["orders", "ranks", "images", "s a step", "images/s", "efficiency", "by CPU seconds"]
    columns += ["against strangers"] * args.strangers + ["ranks agree bit for bit"]
    if args.apart:
        columns += ["s a step, gradients before the probes", "times faster beside them"]
    kind = "Strong" if args.strong else "Weak"
    note = (
        "Seconds are those of the slowest rank, by the clock on the wall; efficiency is images/s a rank, relative to the first row. By CPU "
        "seconds it leaves out what ranks wait for each other, and for a machine that others use."
    )
    if args.strangers:
        note += " Strangers are as many runs of one rank, at the same time, that exchange nothing: what the machine itself does to several."
    return Result([Table(f"{kind} scaling: {args.model}, {args.zo}", columns, rows)], records, [note])
