"""Steps per second of several ranks against one rank alone. Start it with a launcher, once for each number of ranks.

    torchrun --nproc-per-node=2 -m benchmarks.scaling                                 weak scaling: 64 images a rank
    torchrun --nproc-per-node=8 -m benchmarks.scaling --strong model=vit_b16          strong scaling: 64 images in all

Three kinds of steps alternate in the same processes. In "together", all ranks take one step. In "independent", each rank takes a step by
itself at the same time, without collectives. In "alone", rank 0 takes a step while the others wait. Seconds are those of the slowest rank.
Efficiency is the throughput of all ranks, divided by the number of ranks times the throughput of one alone. The comparison with
independent ranks leaves out what ranks on one machine take from each other.
"""

import argparse
import statistics
import time
from collections.abc import Sequence
from dataclasses import replace

import torch

from benchmarks.common import Row, Table, Workload, make_parser, positive, ratio, run, workloads_of
from benchmarks.wire import SMALL
from dist_vlcl.dist.agree import digest
from dist_vlcl.dist.world import World
from dist_vlcl.zo.noise import Key


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = make_parser(__doc__, images=64, classes=10, orders="dual_all,dual_hop_odd", options=SMALL)
    parser.add_argument("--strong", action="store_true", help="all ranks together have --images; without it each rank has")
    parser.add_argument("--steps", type=positive, default=10, help="steps that are timed (default: %(default)s)")
    run(parser, measure, arguments)


def measure(args: argparse.Namespace) -> list[Table]:
    """Return one row per order plan. All ranks call this."""
    pairs = workloads_of(args)
    config = pairs[0][1].config
    world = World.from_environment(config.cluster)
    rows = []
    try:
        for orders, alone in pairs:
            together = alone if args.strong else replace(alone, images=alone.images * world.size)
            rows.append({"orders": orders, "ranks": world.size, **time_ranks(world, together, alone, args.steps)})
    finally:
        world.close()
    return [Table(f"{'Strong' if args.strong else 'Weak'} scaling: {config.model.name}, {config.zo.name}", rows)]


def time_ranks(world: World, together: Workload, alone: Workload, steps: int) -> Row:
    """Return throughput and efficiency. All ranks call this."""
    device, single = str(world.device), World.alone(str(world.device))
    step = together.step(together.towers(device), world)
    batch = together.batch(step.towers, world.rank, world.size)
    variants = {
        "together": (step, batch),
        "independent": (together.step(together.towers(device), single), batch),
        "alone": (alone.step(alone.towers(device), single), alone.batch(step.towers)),
    }
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for number in range(3 + steps):
        for name, (one, images) in variants.items():
            world.barrier()
            start = time.perf_counter()
            if name != "alone" or world.is_main:
                one([images], Key(0, number), 1e-3)
            if world.device.type == "cuda":
                torch.cuda.synchronize()
            seconds[name].append(time.perf_counter() - start)
    measured = world.gather_objects({name: s[3:] for name, s in seconds.items()})  # the first three build buckets and graphs
    slowest = {name: [max(turn) for turn in zip(*(of[name] for of in measured), strict=True)] for name in variants}
    ideal = [s * together.images / (alone.images * world.size) for s in slowest["alone"]]
    median = statistics.median(slowest["together"])
    agree = len(set(world.gather_objects(digest(step.towers.units.state_dict())))) == 1
    return {
        "images": together.images,
        "s": median,
        "images/s": together.images / median,
        "efficiency": ratio(ideal, slowest["together"]),
        "against independent": ratio(slowest["independent"], slowest["together"]),
        "ranks bit-identical": "yes" if agree else "NO",
    }


if __name__ == "__main__":
    main()
