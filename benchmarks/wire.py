"""What a rank sends in a step: the collectives of torch.distributed and their bytes. Start it with a launcher.

torchrun --nproc-per-node=2 -m benchmarks.wire                            two ranks on this machine, the small CLIP
torchrun --nproc-per-node=2 -m benchmarks.wire model=vit_b16 --images 16
RANK=0 WORLD_SIZE=2 LOCAL_RANK=0 MASTER_ADDR=host1 MASTER_PORT=29501 python -m benchmarks.wire --interface eth0
    one rank on each of two hosts (RANK=1 on the second): also what this network interface sends, with headers and acknowledgements.
    Nothing else may use it.
"""

import argparse

import psutil

from benchmarks.common import Collectives, Row, Table, Workload, benchmark, measured_by_ranks
from dist_vlcl.dist.world import World
from dist_vlcl.zo.noise import Key

SMALL = ("model=small", "zo=mozo")


def measure(args: argparse.Namespace) -> list[Table]:
    """Return what each order plan sends. All ranks call this."""
    config, world, rows = measured_by_ranks(args, lambda world, workload: sent(world, workload, args.interface, args.steps))
    return [Table(f"What a rank sends in a step: {config.model.name}, {config.zo.name}, {world.size} ranks", rows)]


def sent(world: World, workload: Workload, interface: str, steps: int) -> Row:
    """Return what this rank sends in one step. All ranks call this."""
    if world.size == 1:
        raise ValueError("one rank sends nothing; start at least two, with: torchrun --nproc-per-node=2 -m benchmarks.wire")
    step = workload.step(workload.towers(str(world.device)), world)
    batch = workload.batch(step.towers, world.rank, world.size)
    for number in range(2):  # connections are opened, and DDP builds its buckets
        step([batch], Key(0, number), 1e-3)
    with Collectives() as counter:
        step([batch], Key(0, 2), 1e-3)
    total = sum(size for _, size in counter.found)
    row: Row = {
        "collectives": len(counter.found),
        "bytes": total,
        "of these gradients": counter.gradient_bytes,
        "first-order parameters, bytes": 4 * sum(p.numel() for p in step.first.parameters),
    }
    if interface:
        if interface not in (known := psutil.net_io_counters(pernic=True)):
            raise ValueError(f"--interface {interface}: choose from {', '.join(known)}")
        world.barrier()
        before = psutil.net_io_counters(pernic=True)[interface]
        for number in range(3, 3 + steps):
            step([batch], Key(0, number), 1e-3)
        after = psutil.net_io_counters(pernic=True)[interface]
        world.barrier()
        row[f"bytes by {interface}"] = (after.bytes_sent - before.bytes_sent) / steps
        row[f"packets by {interface}"] = (after.packets_sent - before.packets_sent) / steps
    return row


main = benchmark(measure, __doc__, SMALL, images=16, classes=4, orders="first,dual_all,dual_hop_odd,language_all", interface="", steps=20)
