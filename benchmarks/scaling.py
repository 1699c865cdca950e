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
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from benchmarks.common import Row, Table, Workload, benchmark, interleaved, measured_by_ranks, ratio
from benchmarks.wire import SMALL
from dist_vlcl.dist.agree import digest
from dist_vlcl.dist.world import World
from dist_vlcl.zo.noise import Key


def measure(args: argparse.Namespace) -> list[Table]:
    """Return one row per order plan. All ranks call this."""

    def measured(world: World, alone: Workload) -> Row:
        together = alone if args.strong else replace(alone, images=alone.images * world.size)
        return {"ranks": world.size, **time_ranks(world, together, alone, args.steps)}

    config, _, rows = measured_by_ranks(args, measured)
    return [Table(f"{'Strong' if args.strong else 'Weak'} scaling: {config.model.name}, {config.zo.name}", rows)]


def time_ranks(world: World, together: Workload, alone: Workload, steps: int) -> Row:
    """Return throughput and efficiency. All ranks call this."""
    device, single = str(world.device), World.alone(str(world.device))
    step = together.step(together.towers(device), world)
    batch = together.batch(step.towers, world.rank, world.size)
    independent, by_itself = (each.step(each.towers(device), single) for each in (together, alone))
    independent.min_samples = step.min_samples  # both pad, or do not
    own = alone.batch(step.towers)
    variants: dict[str, Callable[[], Any]] = {
        "together": lambda: step([batch], Key(0, 0), 1e-3),
        "independent": lambda: independent([batch], Key(0, 0), 1e-3),
        "alone": lambda: by_itself([own], Key(0, 0), 1e-3) if world.is_main else None,
    }
    measured = world.gather_objects(interleaved(variants, steps, world.device.type, world.barrier))
    slowest = {name: [max(turn) for turn in zip(*(seconds[name] for seconds in measured), strict=True)] for name in variants}
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


main = benchmark(measure, __doc__, SMALL, images=64, classes=10, orders="dual_all,dual_hop_odd", strong=False, steps=10)
