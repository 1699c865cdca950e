"""What the benchmarks share: the command line, the workload, time, counted costs, and the output as a table and as JSON."""

import argparse
import contextlib
import json
import os
import statistics
import sys
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from dist_vlcl import __version__
from dist_vlcl.config import Config, compose_config
from dist_vlcl.data.loader import Batch
from dist_vlcl.dist.first_order import FirstOrder
from dist_vlcl.dist.world import World
from dist_vlcl.losses import min_samples
from dist_vlcl.model.clip import TwoTowers, build_clip
from dist_vlcl.model.perturbed import difference, perturbable
from dist_vlcl.orders import PLAN_LAYERS, Order, assign
from dist_vlcl.step import HybridStep
from dist_vlcl.zo import noise

Row = dict[str, Any]

ORDER_PLANS = ("first", *(f"{branch}_{layers}" for branch in ("dual", "vision", "language") for layers in PLAN_LAYERS))


# command line and output


@dataclass
class Table:
    """Rows with the same keys, which are the columns. Cells are text or numbers."""

    title: str
    rows: list[Row]
    note: str = ""

    def markdown(self) -> str:
        lines = [list(self.rows[0]), ["---"] * len(self.rows[0]), *[[format_cell(cell) for cell in row.values()] for row in self.rows]]
        table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
        return f"**{self.title}**\n\n{table}" + (f"\n\n{self.note}" if self.note else "")


def format_cell(cell: Any) -> str:
    """Return text as it is, and a number with three digits."""
    if isinstance(cell, float):
        return f"{cell:#.3g}".rstrip(".") if abs(cell) < 1000 else f"{cell:,.0f}"
    return f"{cell:,}" if isinstance(cell, int) else str(cell)


def print_row(rows: Sequence[Row], total: int, started: float) -> None:
    """Print the newest of `total` rows on stderr, and the time that the others will take. started: time.monotonic() before the first."""
    left = (time.monotonic() - started) / len(rows) * (total - len(rows))
    cells = ", ".join(f"{name} {format_cell(cell)}" for name, cell in rows[-1].items())
    print(f"{len(rows)} of {total}, {left:.0f} s left: {cells}", file=sys.stderr, flush=True)


HELP = {
    "images": "images of the global batch",
    "classes": "classes of the task",
    "orders": "order plans with commas between, or all",
    "repeats": "turns that are timed; directions of a slope",
    "steps": "steps that are timed",
    "count": "only count FLOPs; any size on any machine",
    "slope": "measure rounding in slopes instead of speed",
    "strong": "all ranks together have --images; without it each rank has",
    "interface": "network interface of this host whose bytes and packets are read",
    "side": "side of the stored images in pixels",
    "size": "side that the model takes, in pixels",
    "format": "format of the original images: png or jpeg",
    "stored": "number of images that are stored",
}


def benchmark(
    measure: Callable[[argparse.Namespace], list[Table]], document: str | None, options: Sequence[str] = (), **arguments: Any
) -> Callable[..., None]:
    """Return the `main` of a benchmark: it measures, prints the tables, and writes them as JSON if asked to. A script starts at once.

    arguments: their defaults. With `orders` among them, the user can give options of dist_vlcl.train; `options` go before these. `main`
    ends with exit status 2 and one line for an error of the user.
    """

    def main(given: Sequence[str] | None = None) -> None:
        parser = argparse.ArgumentParser(description=document, formatter_class=argparse.RawDescriptionHelpFormatter)
        if "orders" in arguments:
            help_options = "any option of dist_vlcl.train, such as zo=mozo, model=small, model.precision=bf16 or cluster.device=cuda"
            parser.add_argument("options", nargs="*", metavar="OPTION=VALUE", help=help_options)
        for name, default in arguments.items():
            if default is False:
                parser.add_argument(f"--{name}", action="store_true", help=HELP[name])
            else:
                kind = positive if isinstance(default, int) else str
                parser.add_argument(f"--{name}", default=default, type=kind, help=f"{HELP[name]} (default: %(default)s)")
        parser.add_argument("--json", type=Path, metavar="FILE", help="also write the tables and the machine to this file")
        args = parser.parse_intermixed_args(given)
        args.options = [*options, *getattr(args, "options", [])]
        try:
            tables = measure(args)
            if os.environ.get("RANK", "0") != "0":
                return
            if args.json:
                args.json.parent.mkdir(parents=True, exist_ok=True)
                args.json.write_text(json.dumps({"tables": list(map(vars, tables)), "machine": machine()}, indent=1) + "\n")
        except (ValueError, RuntimeError, OSError) as error:
            print(f"error: {error}", file=sys.stderr)
            sys.exit(2)
        described = ", ".join(f"{name} {value}" for name, value in machine().items())
        print("\n\n".join([*[table.markdown() for table in tables], f"*{described}*"]))

    if measure.__module__ == "__main__":
        main()
    return main


def positive(text: str) -> int:
    """Read a positive number from a command line."""
    if not (text.isdecimal() and int(text) > 0):
        raise argparse.ArgumentTypeError(f"{text}: give a positive number")
    return int(text)


def machine() -> dict[str, Any]:
    """Return what a reader needs to judge a time."""
    return {
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else torch.backends.cpu.get_cpu_capability(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 1),
        "torch": torch.__version__,
        "dist_vlcl": __version__,
    }


# the workload


_on_meta: dict[str, TwoTowers] = {}  # models without numbers, each built once: drawing random weights takes seconds
_newest: dict[str, TwoTowers] = {}  # the two newest models with numbers


@dataclass(frozen=True)
class Workload:
    """What a step works on: options of dist_vlcl.train, `images` of the global batch, `classes` of the task; random weights."""

    options: tuple[str, ...] = ()
    images: int = 128
    classes: int = 20

    def changed(self, *options: str, **sizes: int) -> "Workload":
        """Return this workload with more options, which replace earlier ones of the same name, and other sizes."""
        return replace(self, options=self.options + options, **sizes)

    @cached_property
    def config(self) -> Config:
        """The composed configuration. Raises ValueError for an option that does not exist."""
        options = {o.split("=")[0]: o for o in ("model=vit_b16", "model.pretrained=random", "zo=conservative", *self.options)}
        return compose_config(options.values())

    @property
    def device(self) -> str:
        """cpu or cuda. Turns TF32 off, which zeroth-order estimates cannot bear."""
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
        wanted, has_gpu = self.config.cluster.device, torch.cuda.is_available()
        if wanted == "cuda" and not has_gpu:
            raise ValueError("cluster.device=cuda: torch finds no GPU on this machine; use cluster.device=cpu or auto")
        return "cuda" if wanted != "cpu" and has_gpu else "cpu"

    @property
    def class_names(self) -> list[str]:
        return [f"class {number}" for number in range(self.classes)]

    def towers(self, device: str) -> TwoTowers:
        """Return a fresh model. Its adapters are not zero, as after some training; speed and memory do not depend on the weights."""
        model, built = self.config.model, _on_meta if device == "meta" else _newest
        name = f"{model.name} {model.pretrained} {model.precision} {self.config.adapter}"
        if name not in built:
            if built is _newest and len(built) > 1:
                del built[next(iter(built))]
            built[name] = build_clip(model, self.config.adapter).to("meta" if device == "meta" else "cpu")
        towers = built[name].copy()
        towers.config = model
        towers.vision.checkpoint = towers.language.checkpoint = model.checkpoint
        if device == "meta":
            return towers
        generator = torch.Generator().manual_seed(1)
        for unit in towers.units.values():
            for tensor in unit.tensors().values():
                tensor.detach().add_(torch.randn(tensor.shape, generator=generator) * 0.02)
        return towers.to(device)

    def orders(self, towers: TwoTowers) -> dict[Any, Order]:
        return assign(towers.units, self.config.orders)

    def step(self, towers: TwoTowers, world: World) -> HybridStep:
        """Return the hybrid step of dist_vlcl, in a task with this workload's classes."""
        config = self.config
        least = min_samples(config.cluster.exact_bits, self.images // world.data_size)
        first_of = lambda model: FirstOrder(world, config.first_order, model)  # noqa: E731
        step = HybridStep(towers, self.orders(towers), config.zo, first_of, world, max_skips=1 << 30, min_samples=least)
        step.precision.is_checked = True  # the check costs time, and the slope benchmark measures precisions that it would refuse
        step.begin(self.class_names)
        return step

    def batch(self, towers: TwoTowers, rank: int = 0, size: int = 1) -> Batch:
        """Return a rank's part of a batch of random images, on the device of a model."""
        generator = torch.Generator().manual_seed(0)
        images = torch.randint(0, 256, (self.images, 3, towers.image_size, towers.image_size), generator=generator, dtype=torch.uint8)
        labels = torch.randint(0, self.classes, (self.images,), generator=generator)
        part = slice(self.images * rank // size, self.images * (rank + 1) // size)
        return Batch(images[part], labels[part], torch.arange(self.images)[part], self.images, 0, []).to(towers.logit_scale.device)


def workloads_of(args: argparse.Namespace) -> list[tuple[str, Workload]]:
    """Return (name, workload) of every order plan on the command line."""
    plans = ORDER_PLANS if args.orders == "all" else args.orders.split(",")
    return [(orders, Workload((*args.options, f"orders={orders}"), args.images, args.classes)) for orders in plans]


def measured_by_ranks(args: argparse.Namespace, measured: Callable[[World, Workload], Row]) -> tuple[Config, World, list[Row]]:
    """Return the configuration, and one row per order plan. All ranks call this."""
    pairs = workloads_of(args)
    config = pairs[0][1].config
    world = World.from_environment(config.cluster)
    try:
        return config, world, [{"orders": orders, **measured(world, workload)} for orders, workload in pairs]
    finally:
        world.close()


# time


def interleaved(
    variants: Mapping[str, Callable[[], Any]], repeats: int, device: str, barrier: Callable[[], None] | None = None
) -> dict[str, list[float]]:
    """Return the seconds of each variant, one after the other in each turn, so that other work on the machine slows all of them.

    Seconds are CPU seconds of all threads on a CPU, and elapsed time on a GPU or with a `barrier`, where ranks wait before each work. The
    first turn is not counted. On a GPU or with a barrier it is the first three: they build buckets and record CUDA graphs.
    """
    clock, warm = (time.process_time, 1) if device == "cpu" and barrier is None else (time.perf_counter, 3)
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for turn in range(warm + repeats):
        for name, work in variants.items():
            if barrier:
                barrier()
            start = clock()
            work()
            if device == "cuda":
                torch.cuda.synchronize()
            if turn >= warm:
                seconds[name].append(clock() - start)
    return seconds


def ratio(slow: Sequence[float], fast: Sequence[float]) -> str:
    """Return slow / fast as `median (lowest to highest)` over the turns in which the two ran side by side."""
    ratios = sorted(s / f for s, f in zip(slow, fast, strict=True))
    return f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"


# counted costs, the same on any machine. They need shapes only: any size can be counted on the meta device, `without_numbers`


class Observer(TorchDispatchMode):
    """Sees every operator that runs within it."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.observe(function, args, kwargs or {}, result)
        return result


class Flops(Observer):
    """Counts the FLOPs (two for a multiplication with addition) of matrix products, convolutions and attention in `total`.

    torch's FlopCounterMode also assigns them to modules. Its hooks fail on views of parameters that were made under no_grad.
    """

    total = 0

    def observe(self, function, args, kwargs, result) -> None:
        formula = flop_registry.get(function.overloadpacket)
        if formula is not None:
            if function._overloadname == "dtype":  # products that accumulate in fp32 (model/perturbed.py); torch's formula does not know it
                args = args[:2]
            self.total += formula(*args, **kwargs, out_val=result)


def flops(work: Callable[[], Any]) -> int:
    """Return the FLOPs that `work` executes."""
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # the fast path of open_clip's attention is one operator without a formula
    try:
        with Flops() as counter:
            work()
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
    return counter.total


def saved_bytes(work: Callable[[], Any], besides: Iterable[Tensor] = ()) -> int:
    """Return the bytes that the graph of `work()` saves for the backward pass: each storage once, without those of `besides` (weights)."""
    known = {t.untyped_storage()._cdata for t in besides}
    saved: dict[int, Tensor] = {}  # holding the tensors keeps the addresses unique

    def pack(tensor: Tensor) -> Tensor:
        saved.setdefault(tensor.untyped_storage()._cdata, tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        _alive = work()
    return sum(t.untyped_storage().nbytes() for address, t in saved.items() if address not in known)


class PeakBytes(Observer):
    """Tracks bytes of tensors that are made within it: `alive` now, and `peak`. An operator's own workspace is not seen."""

    def __init__(self) -> None:
        super().__init__()
        self.alive = self.peak = 0
        self._known: set[int] = set()

    def observe(self, function, args, kwargs, result) -> None:
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        for storage in (t.untyped_storage() for t in tree_leaves(result) if isinstance(t, Tensor)):
            address, size = storage._cdata, storage.nbytes()
            if address not in self._known | given:
                self._known.add(address)
                self.alive += size
                self.peak = max(self.peak, self.alive)
                weakref.finalize(storage, self._drop, address, size)

    def _drop(self, address: int, size: int) -> None:
        self._known.discard(address)
        self.alive -= size


class Collectives(Observer):
    """Lists the collectives of torch.distributed in `found`: (operation, bytes that this rank contributes). DDP's are among them."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, int]] = []
        self.gradient_bytes = 0  # all-reduced in floating point; losses are added as integers

    def observe(self, function, args, kwargs, result) -> None:
        if function.namespace == "c10d":
            name = function.overloadpacket.__name__.rstrip("_")
            given = tree_leaves(args[1] if name.startswith(("allgather", "alltoall")) else args[0])  # these name their output first
            tensors = [t for t in given if isinstance(t, Tensor)]
            size = sum(t.nbytes for t in tensors)
            if name.startswith("alltoall"):
                size //= torch.distributed.get_world_size()  # World sends a part to every rank, itself included: the mean part
            self.found.append((name, size))
            if name.startswith("allreduce") and all(t.is_floating_point() for t in tensors):
                self.gradient_bytes += size


class _Zeros(TorchDispatchMode):
    """Every number that is read from the meta device is zero."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is torch.ops.aten._local_scalar_dense.default and args[0].device.type == "meta":
            return 0 if not args[0].is_floating_point() else 0.0
        if function is torch.ops.aten._to_copy.default and args[0].device.type == "meta":
            target = kwargs.get("device")
            if target is not None and torch.device(target).type != "meta":
                return torch.zeros(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)
        return function(*args, **kwargs)


@perturbable(difference)
def _fused_attention(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0, is_causal: bool = False):
    """Attention on the meta device as on real devices: without a matrix of all pairs."""
    fused: Any = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return fused(q, k, v, dropout_p, is_causal, attn_mask=None if attn_mask is None else attn_mask.to(q.dtype))[0]


@contextlib.contextmanager
def without_numbers() -> Iterator[None]:
    """Let training code run on the meta device: every loss is zero, and noise is drawn in one operation, as by the kernel for GPUs."""
    with (
        _Zeros(),
        mock.patch.object(torch.nn.functional, "scaled_dot_product_attention", _fused_attention),
        mock.patch.object(noise, "philox4x32", _words),
    ):
        yield


def _words(counter: tuple[Tensor | int, ...], seed: int) -> Tensor:
    shape = torch.broadcast_shapes(*[c.shape for c in counter if isinstance(c, Tensor)])
    return torch.empty(*shape, 4, dtype=torch.int32, device="meta")
