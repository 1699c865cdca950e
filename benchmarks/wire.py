"""What a step sends: the exchanges of the process group and their bytes, counted on two ranks, or measured on a network interface."""

import argparse
import sys
from pathlib import Path

from benchmarks.count import Collectives
from benchmarks.ranks import launch, share_of
from benchmarks.result import Result, Table
from benchmarks.setup import Workload, add_orders, add_workload, device_of, positive, settings_of, workload_of
from dist_vlcl.dist.world import ClusterConfig, World
from dist_vlcl.zo.noise import Key

EXAMPLES = """examples:
  python -m benchmarks wire                             the small CLIP on two CPU ranks; bytes scale with its parameters
  python -m benchmarks wire --model vit_b16 --images 4 --orders dual_all,dual_hop_odd
  RANK=0 WORLD_SIZE=2 MASTER_ADDR=host1 MASTER_PORT=29501 python -m benchmarks wire --interface eth0      on host1; RANK=1 on host2:
      what the interface counts. Nothing else may use it: two network namespaces, say"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_workload(parser, model="small", images=16, classes=4, zo="mozo")
    add_orders(parser, "first,dual_all,dual_hop_odd,language_all")
    parser.add_argument("--processes", type=positive, default=2, help="ranks (default: %(default)s)")
    parser.add_argument("--interface", help="be one rank of those that a launcher has started, one a host; count what this interface sends")
    parser.add_argument("--steps", type=positive, default=20, help="steps that --interface counts (default: %(default)s)")


def run(args: argparse.Namespace) -> Result:
    if args.interface:
        return measured(args)
    rows, records = [], []
    for orders in settings_of(args):
        answer = launch(args.processes, workload_of(args, orders=orders), device_of(args), steps=1)
        sent = {"scalars": 0, "gradients": 0}
        for name, size in answer["exchanges"]:
            sent["gradients" if name.startswith("allreduce") else "scalars"] += size
        rows.append([orders, len(answer["exchanges"]), sent["scalars"], sent["gradients"], 4 * answer["first_order_parameters"]])
        records.append({"orders": orders, **answer})
    columns = ["orders", "exchanges a step", "bytes of losses", "bytes of gradients", "first-order parameters, bytes"]
    note = "Bytes are those that a rank hands over. DDP's own all-reduces carry the gradients and a few bytes that say which are used."
    return Result([Table(f"What a rank sends a step: {args.model}, {args.zo}, {args.processes} ranks", columns, rows)], records, [note])


def measured(args: argparse.Namespace) -> Result:
    """Take steps as one rank a host, and count what the interface sends meanwhile. All ranks call this; all but rank 0 end here."""
    world = World.from_environment(ClusterConfig(device=device_of(args)))
    rows, records = [], []
    try:
        for orders in settings_of(args):
            record = steps_on_the_wire(world, workload_of(args, orders=orders), args.interface, args.steps)
            records.append({"orders": orders, **record})
            rows.append([orders, record["exchanges"], record["payload"], round(record["bytes"]), round(record["packets"], 1)])
    finally:
        world.close()
    if not world.is_main:
        sys.exit(0)
    columns = ["orders", "exchanges a step", "bytes handed over", "bytes sent by the interface", "packets sent"]
    title = f"What the interface of rank 0's host sends a step: {args.model}, {args.zo}, {world.size} hosts, mean of {args.steps} steps"
    return Result([Table(title, columns, rows)], records, ["The interface counts Ethernet, IP and TCP headers and acknowledgements too."])


def steps_on_the_wire(world: World, workload: Workload, interface: str, steps: int) -> dict[str, float]:
    """Return exchanges, bytes handed over, and what the interface sends, a step. All ranks call this."""
    step = workload.step(workload.towers(str(world.device)), world)
    batch = share_of(workload.batch(step.towers.image_size), world.rank, world.size)
    for k in range(2):  # connections are made, DDP has looked at its buckets
        step([batch], Key(0, k), 1e-3)
    world.barrier()
    before = sent_by(interface)
    for k in range(2, 2 + steps):
        step([batch], Key(0, k), 1e-3)
    after = sent_by(interface)
    world.barrier()
    with Collectives() as exchanges:
        step([batch], Key(0, 2 + steps), 1e-3)
    payload = sum(size for _, size in exchanges.found)
    sent, packets = ((b - a) / steps for a, b in zip(before, after, strict=True))
    return {"exchanges": len(exchanges.found), "payload": payload, "bytes": sent, "packets": packets}


def sent_by(interface: str) -> tuple[int, int]:
    """Return how many bytes and packets an interface of this host has sent. Raises ValueError for one that is not there."""
    lines = [line.split(":") for line in Path("/proc/net/dev").read_text().splitlines()[2:]]
    counters = {name.strip(): values.split() for name, values in lines}
    if interface not in counters:
        raise ValueError(f"--interface {interface}: choose from {', '.join(counters)}")
    return int(counters[interface][8]), int(counters[interface][9])
