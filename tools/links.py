"""Measure steps over slow links: steps per second, bytes and exchanges of a step, beside the scaling model. docs/clusters.md quotes it.

    sudo python tools/links.py                                          two hosts, four networks, all plans
    sudo python tools/links.py --images 1200 --plans "dual MoZO,dual conservative"                        longer steps
    sudo python tools/links.py --hosts 8 --plans "dual MoZO,dual conservative"

Hosts are network namespaces of this machine with one rank each. A small relay in this process carries their frames. It delays each frame
and spaces them by the rate of the sender's link (`tc netem` would do the same; small kernels lack it). It carries about 1 Gbit/s itself.

Exchanges are the trainer's own, with ViT-B/16's sizes: gradients by DDP and its hooks, losses by World.sum_exact, AdamW. A pause stands for
the rest of the computation. It is as long as the scaling model says for an H100 with --images on each rank, so that a busy CPU changes
little. The networks take turns. Needs root and iproute2. Exit status 3 if this machine cannot make the hosts.
"""

import argparse
import fcntl
import heapq
import json
import os
import select
import shutil
import signal
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import psutil
import torch
from torch import nn

from benchmarks.common import Collectives, Row, Table, Workload, positive
from dist_vlcl.dist.first_order import FirstOrder
from dist_vlcl.dist.world import ClusterConfig, World
from dist_vlcl.model.tower import MIN_SAMPLES
from tools.scaling_model import NETWORKS, Network, Plan, compute_s, first_shapes, step_s

PLANS = {
    "dual MoZO": "orders=dual_all zo=mozo",
    "dual conservative": "orders=dual_all zo=conservative",
    "hop_odd MoZO": "orders=dual_hop_odd zo=mozo",
    "hop_odd MoZO bf16": "orders=dual_hop_odd zo=mozo first_order.compression=bf16",
    "hop_odd MoZO powersgd": "orders=dual_hop_odd zo=mozo first_order.compression=powersgd",
    "first": "orders=first",
    "first bf16": "orders=first first_order.compression=bf16",
    "first powersgd": "orders=first first_order.compression=powersgd",
}
TUNSETIFF, IFF_TAP, IFF_NO_PI = 0x400454CA, 0x0002, 0x1000  # linux/if_tun.h
MTU, JUMBO_MTU = 1500, 65000  # jumbo frames on fast links, because the relay needs about 20 us a frame
QUEUE_S = 1.0  # a frame that would wait longer for its link is lost, as in a full switch


def ip(*words: object) -> None:
    subprocess.run(["ip", *map(str, words)], check=True)


class Hosts:
    """Network namespaces with a TAP interface each, and the relay between the TAPs."""

    def __init__(self, count: int, folder: Path):
        self.spaces, self.taps = [f"ln{os.getpid()}-{k}" for k in range(count)], list[int]()
        os.mkfifo(folder / "network")
        self.orders = os.open(folder / "network", os.O_RDWR | os.O_NONBLOCK)  # rank 0 writes the network's name there
        self.network = NETWORKS["Ethernet 10 Gbit/s"]
        self.free_at = [0.0] * count  # when each host's link has sent all that waits for it

    def __enter__(self) -> "Hosts":
        for k, space in enumerate(self.spaces):
            ip("netns", "add", space)
            tap, name = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK), f"tap{os.getpid()}-{k}"
            fcntl.ioctl(tap, TUNSETIFF, struct.pack("16sH22x", name.encode(), IFF_TAP | IFF_NO_PI))
            self.taps.append(tap)
            ip("link", "set", name, "netns", space)
            ip("-n", space, "link", "set", name, "name", "eth0", "address", f"02:00:00:00:00:{k:02x}", "mtu", JUMBO_MTU)
            ip("-n", space, "link", "set", "eth0", "addrgenmode", "none")  # no IPv6: an idle host sends nothing
            ip("-n", space, "addr", "add", f"198.18.10.{k + 1}/24", "dev", "eth0")
            for device in ("lo", "eth0"):
                ip("-n", space, "link", "set", device, "up")
            # bbr would keep the round trip of the network before for ten seconds, and send too little
            ip("netns", "exec", space, "sh", "-c", "echo reno > /proc/sys/net/ipv4/tcp_congestion_control")
        return self

    def __exit__(self, *_: object) -> None:
        for space in self.spaces:
            subprocess.run(["ip", "netns", "del", space], check=False)

    def relay(self, ranks: Sequence[subprocess.Popen]) -> None:
        """Carry frames until the ranks have ended, or one has failed. Rank 0 orders another network through the FIFO."""
        waiting: list[tuple[float, int, int, bytes]] = []  # when a frame is due, its number, host, and the frame
        number = 0
        while any(rank.poll() is None for rank in ranks) and not any(rank.poll() for rank in ranks):
            now = time.monotonic()
            while waiting and waiting[0][0] <= now:
                _, _, host, frame = heapq.heappop(waiting)
                os.write(self.taps[host], frame)
            readable, _, _ = select.select([*self.taps, self.orders], [], [], waiting[0][0] - now if waiting else 0.5)
            if self.orders in readable:
                self.change(NETWORKS[os.read(self.orders, 4096).decode().splitlines()[-1]])
            for host in (host for host, tap in enumerate(self.taps) if tap in readable):
                frame, now = os.read(self.taps[host], 70_000), time.monotonic()
                sent = max(now, self.free_at[host]) + len(frame) / self.network.bytes_per_s
                if sent > now + QUEUE_S:
                    continue
                self.free_at[host] = sent
                for to in range(len(self.taps)) if frame[0] & 1 else [frame[5]]:  # a broadcast; or the last byte of the address
                    if to != host:
                        heapq.heappush(waiting, (sent + self.network.latency_s, number := number + 1, to, frame))

    def change(self, network: Network) -> None:
        self.network = network
        for space in self.spaces:
            ip("-n", space, "link", "set", "eth0", "mtu", JUMBO_MTU if network.bytes_per_s > 50e6 else MTU)


def start(args: argparse.Namespace, arguments: Sequence[str]) -> list[Row]:
    """Make the hosts, start a rank on each, carry their frames, and return the rows that rank 0 measured."""
    shared = {"WORLD_SIZE": str(args.hosts), "MASTER_ADDR": "198.18.10.1", "MASTER_PORT": "29500", "OMP_NUM_THREADS": "1"}
    shared |= {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "GLOO_SOCKET_IFNAME": "eth0", "PYTHONPATH": str(Path(__file__).parents[1])}
    with tempfile.TemporaryDirectory(prefix="links-") as folder, Hosts(args.hosts, Path(folder)) as hosts:
        command = [sys.executable, "-W", "ignore", __file__, *arguments, "--folder", folder]
        ranks = [
            subprocess.Popen(["ip", "netns", "exec", space, *command], env={**os.environ, **shared, "RANK": str(rank)})
            for rank, space in enumerate(hosts.spaces)
        ]
        try:
            hosts.relay(ranks)
        finally:
            for rank in ranks:
                rank.kill()
                rank.wait()
        rows = Path(folder) / "rows.json"
        return json.loads(rows.read_text()) if rows.exists() else []


class Adapters(nn.Module):
    """First-order parameters of given shapes, and a loss that uses them all."""

    def __init__(self, shapes: Sequence[tuple[int, ...]]):
        super().__init__()
        self.tensors = nn.ParameterList([nn.Parameter(torch.zeros(shape)) for shape in shapes])

    def forward(self) -> torch.Tensor:
        return torch.stack([tensor.sum() for tensor in self.tensors]).sum()


class Step:
    """A step's exchanges in the trainer's order, and a pause for each computation."""

    def __init__(self, world: World, workload: Workload, images: int):
        self.world, self.plan = world, Plan.of_workload(workload)
        towers = workload.towers("meta")
        self.first = FirstOrder(world, workload.config.first_order, Adapters(first_shapes(towers, workload.orders(towers))))
        self.base_s, self.candidates_s = compute_s(self.plan, images)
        self.losses = torch.zeros(self.plan.loss_bytes // 8, dtype=torch.int64)
        self.update_s = 0.0  # of AdamW in the last step, which is a part of the next step's pause
        self.first.begin()

    def __call__(self) -> None:
        time.sleep(max(0.0, self.base_s - self.update_s))
        if self.first.parameters:
            self.first.backward(self.first.wrapped())
        for _ in range(self.plan.exchanges):
            time.sleep(self.candidates_s / self.plan.exchanges)
            self.world.sum_exact(self.losses, "losses")
        self.first.wait_for_gradients()
        begin = time.perf_counter()
        self.first.update(1e-3)
        self.update_s = time.perf_counter() - begin


def measure(args: argparse.Namespace) -> None:
    """Measure every plan on every network, and leave the rows in the folder. The rank of each host calls this."""
    world = World.from_environment(ClusterConfig(device="cpu"))
    rows: list[Row] = []
    for name in map(str.strip, args.plans.split(",")):
        choose_network(args, world, "Ethernet 10 Gbit/s")  # a connection keeps the frame size of the network on which it began
        workload = Workload(tuple(f"model=vit_b16 model.pretrained=random {PLANS[name]}".split()), classes=20)
        rows += measure_plan(args, world, Step(world, workload, args.images), name)
        if world.is_main:
            (args.folder / "rows.json").write_text(json.dumps(rows))
    world.close()


def choose_network(args: argparse.Namespace, world: World, name: str) -> None:
    if world.is_main:
        (args.folder / "network").write_text(f"{name}\n")
    time.sleep(0.2)
    world.barrier()


def measure_plan(args: argparse.Namespace, world: World, step: Step, name: str) -> list[Row]:
    """Return a row per network. All ranks call this."""
    networks = [network.strip() for network in args.networks.split(",")]
    seconds: dict[str, list[float]] = {network: [] for network in networks}
    sent: dict[str, float] = {}
    for turn in range(args.turns):
        for network in networks:
            choose_network(args, world, network)
            for _ in range(1 if turn else 2):  # TCP adapts to the network; PowerSGD compresses after its first two steps
                with Collectives() as counter:  # it does not see two more of PowerSGD, which run in another thread
                    step()
            world.barrier()
            before, begin = psutil.net_io_counters(pernic=True)["eth0"].bytes_sent, time.perf_counter()
            for _ in range(args.steps):
                step()
            seconds[network].append((time.perf_counter() - begin) / args.steps)
            sent[network] = (psutil.net_io_counters(pernic=True)["eth0"].bytes_sent - before) / args.steps
            if world.is_main:
                print(f"{name}, {network}, turn {turn + 1}: {seconds[network][-1]:.3f} s", file=sys.stderr, flush=True)
    rows: list[Row] = []
    median = {network: statistics.median(found) for network, found in seconds.items()}
    for network, found in seconds.items():
        model = step_s(step.plan, world.size, args.images * world.size, NETWORKS[network], backend="gloo")
        row: Row = {"plan": name, "network": network, "steps/s": 1 / median[network], "of the first": median[networks[0]] / median[network]}
        row |= {"kB a step": sent[network] / 1e3, "exchanges": len(counter.found), "s": median[network]}
        row |= {"lowest to highest": f"{min(found):.3g} to {max(found):.3g}"}
        rows.append({**row, "model s": model, "measured / model": median[network] / model})
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hosts", type=positive, default=2, help="(default: %(default)s)")
    parser.add_argument("--plans", default=",".join(PLANS), help="with commas between (default: %(default)s)")
    parser.add_argument("--networks", default=",".join(list(NETWORKS)[2:]), help="with commas between (default: %(default)s)")
    parser.add_argument("--images", type=positive, default=128, help="of a rank, which the pauses follow (default: %(default)s)")
    parser.add_argument("--steps", type=positive, default=2, help="steps on a network in a turn (default: %(default)s)")
    parser.add_argument("--turns", type=positive, default=3, help="times that the networks take turns (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the rows to this file")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)  # of a rank
    args = parser.parse_args(arguments)
    if args.images < MIN_SAMPLES:
        parser.error(
            f"--images {args.images}: give {MIN_SAMPLES} or more; with fewer, ranks also exchange text, which is not measured here"
        )
    if args.folder:
        measure(args)
        return 0
    if os.geteuid() or not shutil.which("ip") or not os.path.exists("/dev/net/tun"):
        print("needs root, iproute2's `ip` and /dev/net/tun: it makes network namespaces")
        return 3
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the hosts are removed
    rows = start(args, sys.argv[1:] if arguments is None else arguments)
    if not rows:
        return 1
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")
    print(Table(f"{args.hosts} hosts, ViT-B/16, {args.images} images a rank", rows).markdown())
    return 0


if __name__ == "__main__":
    sys.exit(main())
