"""What a rank sends in a step: the collectives of torch.distributed and their bytes. Start it with a launcher.

torchrun --nproc-per-node=2 -m benchmarks.wire                            two ranks on this machine, the small CLIP
torchrun --nproc-per-node=2 -m benchmarks.wire model=vit_b16 --images 16
RANK=0 WORLD_SIZE=2 LOCAL_RANK=0 MASTER_ADDR=host1 MASTER_PORT=29501 python -m benchmarks.wire --interface eth0
    one rank on each of two hosts (RANK=1 on the second): also what this network interface sends. Nothing else may use it.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from benchmarks.common import Collectives, Row, Table, Workload, make_parser, positive, run, workloads_of
from dist_vlcl.dist.world import World
from dist_vlcl.zo.noise import Key

SMALL = ("model=small", "zo=mozo")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = make_parser(__doc__, images=16, classes=4, orders="first,dual_all,dual_hop_odd,language_all", options=SMALL)
    parser.add_argument("--interface", help="network interface of this host whose bytes and packets are read")
    parser.add_argument("--steps", type=positive, default=20, help="steps over which --interface takes the mean (default: %(default)s)")
    run(parser, measure, arguments)


def measure(args: argparse.Namespace) -> list[Table]:
    """Return what each order plan sends. All ranks call this."""
    pairs = workloads_of(args)
    world = World.from_environment(pairs[0][1].config.cluster)
    if world.size == 1:
        raise ValueError("one rank sends nothing; start at least two, with: torchrun --nproc-per-node=2 -m benchmarks.wire")
    try:
        rows = [{"orders": orders, **sent(world, workload, args.interface, args.steps)} for orders, workload in pairs]
    finally:
        world.close()
    config = pairs[0][1].config
    note = "Bytes are what a rank contributes. The interface also counts Ethernet, IP and TCP headers and acknowledgements."
    return [Table(f"What a rank sends in a step: {config.model.name}, {config.zo.name}, {world.size} ranks", rows, note)]


def sent(world: World, workload: Workload, interface: str | None, steps: int) -> Row:
    """Return what this rank sends in one step. All ranks call this."""
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
        world.barrier()
        before = interface_counters(interface)
        for number in range(3, 3 + steps):
            step([batch], Key(0, number), 1e-3)
        after = interface_counters(interface)
        world.barrier()
        row |= {f"{what} by {interface}": (after[what] - before[what]) / steps for what in before}
    return row


def interface_counters(interface: str) -> dict[str, int]:
    """Return how many bytes and packets a network interface of this host has sent. Raises ValueError if there is no such interface."""
    lines = [line.split(":") for line in Path("/proc/net/dev").read_text().splitlines()[2:]]
    counters = {name.strip(): values.split() for name, values in lines}
    if interface not in counters:
        raise ValueError(f"--interface {interface}: choose from {', '.join(counters)}")
    return {"bytes": int(counters[interface][8]), "packets": int(counters[interface][9])}


if __name__ == "__main__":
    main()
