"""The scaling model: seconds of a step on many ranks, as compute, latency and bytes. docs/clusters.md quotes it.

    python tools/scaling_model.py                                   tables: efficiency by model, plan and network
    python tools/scaling_model.py --picture docs/images/scaling.png
    python tools/scaling_model.py --grids                           the best number of direction groups
    torchrun --nproc-per-node=2 tools/scaling_model.py --measure    time the collectives of a step on this network, beside the model
    python tools/scaling_model.py --measure --network "Ethernet 1 Gbit/s"      on each of several hosts, or of several network namespaces

The FLOPs are those of benchmarks/cost_model.py. The model knows two rates: FLOPs per second of a rank, and seconds a step that do not
depend on its size (kernel launches). It assumes NCCL, equally fast ranks, and data that arrive in time.
"""

import argparse
import math
import os
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.common import Row, Table, Workload, positive
from benchmarks.cost_model import Orders, Shapes, step_cost, tower_shapes
from dist_vlcl.dist.first_order import RANK
from dist_vlcl.dist.world import DIRECT_RANKS, World
from dist_vlcl.model.clip import TwoTowers
from dist_vlcl.model.tower import MIN_SAMPLES
from dist_vlcl.options import BRANCHES
from dist_vlcl.orders import Order
from dist_vlcl.zo.update import ZerothOrderConfig

MODELS = {"ViT-B/16": "vit_b16", "ViT-L/14": "vit_l14", "ViT-bigG/14": "vit_b16 model.name=ViT-bigG-14"}
PLANS = {"first order": "first", "hybrid hop_odd": "dual_hop_odd", "dual zeroth order": "dual_all"}


@dataclass(frozen=True)
class Network:
    """One-way latency in seconds, and bytes per second of a rank in each direction."""

    latency_s: float
    bytes_per_s: float


NETWORKS = {
    "NVLink": Network(3e-6, 450e9),
    "InfiniBand 400 Gbit/s": Network(5e-6, 50e9),
    "Ethernet 10 Gbit/s": Network(1e-4, 1.25e9),
    "Ethernet 1 Gbit/s": Network(1e-3, 125e6),
    "WAN 100 Mbit/s": Network(20e-3, 12.5e6),
    "WAN 10 Mbit/s": Network(100e-3, 1.25e6),
}


@dataclass(frozen=True)
class Rank:
    """How fast a rank computes. The default fits a first-order step of ViT-B/16 on an H100, fp32: 0.251 s, of which 0.231 s busy."""

    flops_per_s: float = 37e12
    fixed_s: float = 0.02


@dataclass(frozen=True)
class Plan:
    """A model's shapes, the orders of its units, and a zeroth-order strategy."""

    shapes: Shapes
    orders: Orders
    zo: ZerothOrderConfig
    gradients: tuple[int, ...]  # bytes of the all-reduces of gradients, one after another
    text_bytes: int  # of the features of all classes
    classes: int = 20

    @property
    def loss_bytes(self) -> int:
        """Bytes of an exchange of losses, at most: a number for each candidate, and a few counts."""
        return 8 * (self.zo.sides * sum(map(self.zo.probes_of, BRANCHES)) + 4)

    @classmethod
    def of(cls, model: str, orders: str, zo: str = "mozo", probes: int = 1) -> "Plan":
        """Return a plan of MODELS and PLANS."""
        options = f"model={MODELS[model]} model.pretrained=random zo={zo} zo.probes={probes} orders={PLANS[orders]}".split()
        return _plan(tuple(options))

    @classmethod
    def of_workload(cls, workload: Workload) -> "Plan":
        """Return the plan of a benchmark's workload."""
        towers = workload.towers("meta")
        orders = workload.orders(towers)
        shapes = tower_shapes(towers, towers.prompts(workload.class_names).shape[1])
        gradients = gradient_bytes(first_shapes(towers, orders), workload.config.first_order.compression)
        features = towers.features("language", towers.prompts(workload.class_names).to("meta"))
        return cls(shapes, orders, workload.config.zo, gradients, features.nbytes, workload.classes)

    @property
    def can_share_text(self) -> bool:
        """Whether ranks with few images compute a part of the text each: language has gradients, and no candidates (step.py)."""
        orders = {order for unit, order in self.orders.items() if unit.branch == "language"}
        return Order.FIRST in orders and Order.ZEROTH not in orders

    @property
    def exchanges(self) -> int:
        """All-reduces of losses, one after the other. Best-of-three chooses its candidates after the first."""
        return 2 if self.zo.acceptance == "best_of_three" and Order.ZEROTH in self.orders.values() else 1


@cache
def _plan(options: tuple[str, ...]) -> Plan:
    return Plan.of_workload(Workload(options, classes=20))


def first_shapes(towers: TwoTowers, orders: Orders) -> list[tuple[int, ...]]:
    """Return the shapes of the first-order tensors."""
    units = [unit for id, unit in towers.units.items() if orders[id] is Order.FIRST]
    return [tuple(tensor.shape) for unit in units for tensor in unit.tensors().values()]


def gradient_bytes(shapes: Sequence[tuple[int, ...]], compression: str) -> tuple[int, ...]:
    """Return the bytes of each all-reduce of gradients. PowerSGD has three: what it does not compress, then two factors of low rank."""
    whole = sum(map(math.prod, shapes))
    if not whole:
        return ()
    if compression != "powersgd":
        return (whole * (2 if compression == "bf16" else 4),)
    rest, left, right = whole, 0, 0
    for *stack, rows, columns in (shape for shape in shapes if len(shape) > 1):
        count, rank = math.prod(stack), min(rows, columns, RANK)
        if 2 * rank * (rows + columns) < rows * columns:  # else torch does not compress it
            rest, left, right = rest - count * rows * columns, left + count * rank * rows, right + count * rank * columns
    return 4 * rest, 4 * left, 4 * right


def all_reduce_s(network: Network, ranks: int, size: int, backend: str = "nccl") -> float:
    """Return the seconds of an all-reduce of `size` bytes.

    A ring has 2 (W - 1) hops with 1 / W of the bytes each, a binary tree 2 log2(W) hops with all of them. NCCL takes the faster one. gloo
    has the ring only. It sends after the receiver has announced its buffer: two latencies a hop. It sends two segments of 1 MiB at a time,
    which costs one more latency a MiB.
    """
    if ranks == 1:
        return 0.0
    hops, sent = 2 * (ranks - 1), 2 * (ranks - 1) / ranks * size
    if backend == "gloo":
        return (2 * hops + sent / 2**20) * network.latency_s + sent / network.bytes_per_s
    tree = 2 * math.ceil(math.log2(ranks)) * (network.latency_s + size / network.bytes_per_s)
    return min(hops * network.latency_s + sent / network.bytes_per_s, tree)


def losses_s(network: Network, ranks: int, size: int, backend: str = "nccl") -> float:
    """Return the seconds of one exchange of losses: an all-reduce by NCCL. With gloo and few ranks each sends them to every other."""
    if backend != "gloo" or not 1 < ranks <= DIRECT_RANKS:
        return all_reduce_s(network, ranks, size, backend)
    return 2 * network.latency_s + (ranks - 1) * size / network.bytes_per_s


def text_s(plan: Plan, network: Network, ranks: int, backend: str = "nccl") -> float:
    """Return the seconds of exchanging text features or their gradients: a rank sends those of its classes to every other."""
    sent = math.ceil(plan.classes / ranks) * plan.text_bytes / plan.classes * (ranks - 1)
    return (2 if backend == "gloo" else 1) * network.latency_s + sent / network.bytes_per_s


def compute_s(plan: Plan, share: int, rank: Rank = Rank(), groups: int = 1, classes: int | None = None) -> tuple[float, float]:
    """Return the seconds that a rank with `share` images and the text of `classes` (all) computes: base and backward, then candidates."""
    classes = classes or plan.classes
    config = replace(plan.zo, probes={branch: math.ceil(plan.zo.probes_of(branch) / groups) for branch in BRANCHES})
    first_only = {u: o if o is Order.FIRST else Order.FROZEN for u, o in plan.orders.items()}
    base = step_cost(plan.shapes, first_only, config, share, classes)
    candidates = step_cost(plan.shapes, plan.orders, config, share, classes) - base
    return rank.fixed_s + base / rank.flops_per_s, candidates / rank.flops_per_s


def step_s(plan: Plan, ranks: int, images: int, network: Network, rank: Rank = Rank(), groups: int = 1, backend: str = "nccl") -> float:
    """Return the seconds of a step on a global batch of `images`.

    Every rank computes the text of all classes, or with a small share a part of it; then the text features and their gradients are
    exchanged. Gradients of the adapters travel while candidates are evaluated. Each direction group has the whole batch and evaluates its
    share of the probes.
    """
    share = math.ceil(images * groups / ranks)  # the slowest rank's
    shares_text = ranks > 1 and plan.can_share_text and images * groups // ranks < MIN_SAMPLES
    base, candidates = compute_s(plan, share, rank, groups, math.ceil(plan.classes / ranks) if shares_text else None)
    if shares_text:
        base += 2 * text_s(plan, network, ranks, backend)
    losses = plan.exchanges * losses_s(network, ranks, plan.loss_bytes, backend)
    gradients = sum(all_reduce_s(network, ranks, size, backend) for size in plan.gradients)
    return base + max(candidates + losses, gradients)


def efficiency(plan: Plan, ranks: int, images: int, network: Network, strong: bool, rank: Rank = Rank(), groups: int = 1) -> float:
    """Return the throughput of the ranks over that many times one rank's. Strong: `images` in all; weak: on each rank."""
    total = images if strong else images * ranks
    return step_s(plan, 1, images, network, rank) * total / images / (ranks * step_s(plan, ranks, total, network, rank, groups))


def best_groups(plan: Plan, ranks: int, images: int, network: Network, rank: Rank = Rank()) -> int:
    """Return the number of direction groups with the fastest step: a divisor of the ranks, at most one probe for each group."""
    choices = [g for g in range(1, max(map(plan.zo.probes_of, BRANCHES)) + 1) if ranks % g == 0]
    return min(choices, key=lambda g: step_s(plan, ranks, images, network, rank, g))


def stops_paying(plan: Plan, images: int, network: Network, rank: Rank) -> int:
    """Return the number of ranks (a power of two, up to 4,096) beyond which a step on `images` in all gains less than a fifth."""
    ranks = 1
    while ranks < 4096 and step_s(plan, ranks, images, network, rank) > 1.2 * step_s(plan, 2 * ranks, images, network, rank):
        ranks *= 2
    return ranks


def tables(rank: Rank) -> list[Table]:
    """Return efficiencies at 64 ranks, and where strong scaling stops paying."""
    rows: list[Row] = []
    for model in MODELS:
        for orders in PLANS:
            plan = Plan.of(model, orders)
            cells = {
                name: f"{efficiency(plan, 64, 128, net, False, rank):.2f} / {stops_paying(plan, 8192, net, rank):,}"
                for name, net in NETWORKS.items()
            }
            rows.append({"model": model, "orders": orders, "one rank, s": step_s(plan, 1, 128, NETWORKS["NVLink"], rank), **cells})
    title = "Weak efficiency at 64 ranks of 128 images / ranks at which strong scaling of 8,192 images stops paying"
    return [Table(title, rows, "Stops paying: twice as many ranks make a step less than 1.2 times faster.")]


def grids(rank: Rank) -> list[Table]:
    """Return the best number of direction groups for a batch of 128 images."""
    rows: list[Row] = []
    plans = {f"dual_all, zo.probes={probes}": Plan.of("ViT-B/16", "dual zeroth order", probes=probes) for probes in (1, 4, 16)}
    plans["language_late, zo=many_probes"] = _plan(("model=vit_b16", "model.pretrained=random", "orders=language_late", "zo=many_probes"))
    network = NETWORKS["InfiniBand 400 Gbit/s"]
    for name, plan in plans.items():
        row: Row = {"plan": name}
        for ranks in (4, 16, 64, 256):
            groups = best_groups(plan, ranks, 128, network, rank)
            gain = step_s(plan, ranks, 128, network, rank) / step_s(plan, ranks, 128, network, rank, groups)
            row[f"{ranks} ranks"] = f"{groups} ({gain:.1f} times faster)"
        rows.append(row)
    return [Table("Best cluster.direction_groups, ViT-B/16, 128 images in all, InfiniBand", rows)]


def draw(path: Path, rank: Rank) -> None:
    """Draw efficiency against ranks: ViT-B/16, weak and strong, one line per plan and network."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.6), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    counts = [2**k for k in range(13)]
    for axis, strong, images in ((axes[0], False, 128), (axes[1], True, 8192)):
        for color, orders in enumerate(PLANS):
            plan = Plan.of("ViT-B/16", orders)
            for style, name in (("-", "InfiniBand 400 Gbit/s"), ("--", "Ethernet 1 Gbit/s"), (":", "WAN 10 Mbit/s")):
                values = [efficiency(plan, ranks, images, NETWORKS[name], strong, rank) for ranks in counts]
                axis.plot(counts, values, style, color=f"C{color}", label=f"{orders}, {name}")
        axis.set(
            xscale="log",
            xlabel="ranks",
            title=f"{images:,} images {'in all (strong)' if strong else 'on each rank (weak)'}",
            ylim=(0, 1.05),
        )
        axis.set_xscale("log", base=2)
    axes[0].set_ylabel("efficiency")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8)
    figure.savefig(path, dpi=110)


def measure(network: Network, repeats: int) -> list[Table]:
    """Time the collectives of one step at ViT-B/16's sizes between the ranks of this launch, beside the model. All ranks call this."""
    dist.init_process_group("gloo")
    world = World(dist.get_rank(), dist.get_world_size())
    rows: list[Row] = []
    for orders in PLANS:
        plan = Plan.of("ViT-B/16", orders)
        gradients = torch.zeros(sum(plan.gradients) // 4)
        exchanges: Any = (("losses", torch.zeros(5, dtype=torch.int64), world.sum_exact, losses_s),)
        exchanges += (("gradients", gradients, dist.all_reduce, all_reduce_s),)
        for what, tensor, exchange, model_of in exchanges:
            seconds = []
            for _ in range(repeats + 1 if tensor.numel() else 0):
                dist.barrier()
                start = time.perf_counter()
                exchange(tensor)
                seconds.append(time.perf_counter() - start)
            if seconds:
                model = model_of(network, world.size, tensor.nbytes, "gloo")
                found = statistics.median(seconds[1:])
                rows.append(
                    {
                        "orders": orders,
                        "what": what,
                        "bytes": tensor.nbytes,
                        "s": found,
                        "model s": model,
                        "measured / model": found / model,
                    }
                )
    dist.destroy_process_group()
    return [Table(f"Exchanges between {os.environ['WORLD_SIZE']} ranks", rows)] if world.is_main else []


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tflops", type=float, default=37.0, help="1e12 FLOPs per second of a rank (default: %(default)s)")
    parser.add_argument(
        "--fixed-s", type=float, default=0.02, help="seconds of a step that do not depend on its size (default: %(default)s)"
    )
    parser.add_argument("--picture", type=Path, metavar="FILE", help="draw efficiency from 1 to 4,096 ranks")
    parser.add_argument("--grids", action="store_true", help="print the best number of direction groups")
    parser.add_argument("--measure", action="store_true", help="time the collectives of a step between the ranks of this launch")
    parser.add_argument("--network", choices=tuple(NETWORKS), default="Ethernet 10 Gbit/s", help="of --measure (default: %(default)s)")
    parser.add_argument("--repeats", type=positive, default=3, help="of --measure (default: %(default)s)")
    args = parser.parse_args(arguments)
    rank = Rank(args.tflops * 1e12, args.fixed_s)
    if args.picture:
        draw(args.picture, rank)
        return
    found = measure(NETWORKS[args.network], args.repeats) if args.measure else grids(rank) if args.grids else tables(rank)
    print("\n\n".join(table.markdown() for table in found))


if __name__ == "__main__":
    main()
