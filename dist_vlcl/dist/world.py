"""The ranks of a run: rank, size, device, and the few collectives that training needs. Accelerate starts the process group."""

# n numbers

import os
import socket
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dist_vlcl.dist.collectives import Collectives, is_network_error
from dist_vlcl.options import option

# So many ranks exchange losses directly over gloo: one round trip, where its all-reduce, a ring, takes two for 2 ranks and seven for 8. A
# rank sends at most so many bytes this way: two tenths of a second at 10 Mbit/s.
DIRECT_RANKS, DIRECT_BYTES = 256, 1 << 18
DEVICES = ("auto", "cpu", "cuda")


@dataclass
class ClusterConfig:
    """How the run expects to be started."""

    num_processes: int | None = option(None, "Number of ranks that the launcher must have started; null: any number.", min=1)
    device: str = option("auto", "Where to compute; auto: on CUDA GPUs if there are any. Apple's MPS is not supported.", choices=DEVICES)
    timeout_s: float = option(600.0, "Seconds after which a collective without an answer fails.", above=0, max=10**6)
    direction_groups: int = option(1, "Groups of ranks that share the zeroth-order candidates; each group has the whole batch.", min=1)
    exact_bits: bool | None = option(None, "Give zeroth order equal bits on any number of ranks: pad to 16 samples; null: where free.")
    threads: int | None = option(1, "CPU threads of a rank (last bits depend on them); null: its share of the cores.", min=1, max=1024)


@dataclass
class World:
    """Rank, size, device, and collectives whose result is bit-identical on every rank. All ranks call every collective.

    The ranks form a grid of `direction_groups` rows. Each row has the whole batch, divided into `data_size` parts, and evaluates its own
    share of the zeroth-order candidates.
    """

    rank: int = 0
    size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    accelerator: Any = None
    engine: str = "ddp"  # of the first-order units; or zero0, zero1, zero2, zero3, zero3_offload
    direction_groups: int = 1
    collectives: Collectives = field(default_factory=lambda: Collectives(0, ["this host"], 0))

    @classmethod
    def alone(cls, device: str = "cpu") -> "World":
        """Return a world of one rank, without a process group."""
        return cls(device=torch.device(device))

    @classmethod
    def announced(cls) -> "World":
        """Return the rank and size that the launcher has announced, to name this rank in an error before it has met the others."""
        size = int(os.environ.get("WORLD_SIZE", 1))
        return cls(int(os.environ.get("RANK", 0)) if size > 1 else 0, size)  # a shell may have either of its own

    @classmethod
    def from_environment(cls, config: ClusterConfig, backend: str = "") -> "World":
        """Join the process group of the launcher. All ranks call this.

        backend: of the process group; by default nccl on GPUs. With gloo, several ranks can share a GPU, for a check on one machine.
        Raises RuntimeError if accelerate sees another launch than the launcher made: without gradient synchronisation, every process would
        train alone and report success.
        """
        announced = int(os.environ.get("WORLD_SIZE", 1))
        check_launch(config, announced)
        accelerator, engine = join(config, announced, backend)
        if config.direction_groups > 1 and engine.startswith("zero3"):
            raise RuntimeError("cluster.direction_groups: not possible under ZeRO-3, which evaluates on all ranks; use another engine")
        world = cls(accelerator.process_index, accelerator.num_processes, accelerator.device, accelerator, engine, config.direction_groups)
        world.collectives = Collectives(world.rank, ["?"] * world.size, config.timeout_s)
        world.collectives.hosts = world.gather_objects(socket.gethostname(), "host names")
        return world

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def data_size(self) -> int:
        """Return the number of parts into which a batch is divided."""
        return self.size // self.direction_groups

    @property
    def data_rank(self) -> int:
        """Return the number of this rank's part of a batch."""
        return self.rank % self.data_size

    def take_peaks_gib(self) -> dict[str, float]:
        """Return the peak GPU memory of this rank since the last call in GiB, reserved (`peak_gib`) and allocated; nothing on a CPU.

        Memory of CUDA graphs counts as reserved only.
        """
        if self.device.type != "cuda":
            return {}
        reserved, allocated = torch.cuda.max_memory_reserved(self.device), torch.cuda.max_memory_allocated(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        return {"peak_gib": reserved / 2**30, "allocated_gib": allocated / 2**30}

    def sum_exact(self, vector: Tensor, what: str = "numbers") -> Tensor:
        """Return the sum over ranks of an int64 vector `[n]`. Integer sums are exact, so every rank gets the same result."""
        if self.size == 1:
            return vector
        with self.collectives(f"all-reduce of {what}"):
            if dist.get_backend() == "gloo" and self.size <= DIRECT_RANKS and vector.nbytes * self.size <= DIRECT_BYTES:
                # One round trip. gloo's all-reduce is a ring: two round trips for two ranks, five for four.
                sent = vector.cpu().repeat(self.size, 1)
                received = torch.empty_like(sent)
                dist.all_to_all_single(received, sent)
                return received.sum(0)
            total = vector.to(self.device, copy=True)
            dist.all_reduce(total)
            return total.cpu()  # a GPU has finished then

    def gather_rows(self, own_nF: Tensor, counts: list[int], what: str = "text features") -> Tensor:
        """Return the rows `[sum(counts), F]` of all ranks, in rank order. counts: the number of rows of each rank, which may be 0.

        The gradient of a rank's rows is the sum of their gradients on all ranks: all ranks call the backward pass, too.
        """
        with self.collectives(f"all-gather of {what}"):
            return _GatherRows.apply(own_nF, counts) if self.size > 1 else own_nF

    def on_main(self, work: Callable[[], Any], what: str) -> Any:
        """Return rank 0's result of `work`, a picklable object, on every rank.

        Every rank raises an OSError, ValueError or RuntimeError of rank 0.
        """
        outcome: list[Any] = [None]
        if self.is_main:
            try:
                outcome = [work()]
            except (OSError, ValueError, RuntimeError) as error:
                outcome = [error]  # the other ranks wait for an answer
        if self.size > 1:
            with self.collectives(f"broadcast of {what}"):
                dist.broadcast_object_list(outcome, src=0, device=self.device)
        if isinstance(outcome[0], Exception):
            raise outcome[0]
        return outcome[0]

    def gather_objects(self, value: Any, what: str = "objects") -> list[Any]:
        """Return every rank's value, a small picklable object, in rank order."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        with self.collectives(f"all-gather of {what}"):
            dist.all_gather_object(values, value)
        return values

    def barrier(self) -> None:
        if self.size > 1:
            with self.collectives("barrier"):
                dist.barrier()

    def close(self) -> None:
        """Leave the process group. Without this, the end of this process would look like a crash to the others."""
        if dist.is_initialized():
            dist.destroy_process_group()
            self.collectives.wait_for_readers()


class _GatherRows(torch.autograd.Function):
    """One all-to-all each way: a single round trip with gloo, whose all-gather is a ring."""

    @staticmethod
    def forward(context: Any, own_nF: Tensor, counts: list[int]) -> Tensor:
        context.sent, context.counts = [len(own_nF)] * len(counts), counts
        rows = own_nF.new_empty(sum(counts), own_nF.shape[1])
        dist.all_to_all_single(rows, own_nF.repeat(len(counts), 1), counts, context.sent)
        return rows

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor, None]:
        received = gradient.new_empty(sum(context.sent), gradient.shape[1])
        dist.all_to_all_single(received, gradient.contiguous(), context.sent, context.counts)
        return received.unflatten(0, (len(context.counts), context.sent[0])).sum(0), None


def check_launch(config: ClusterConfig, announced: int) -> None:
    """Raise RuntimeError if the launcher's number of ranks or the device is wrong, before any rank waits for another."""
    if config.device == "cuda" and not torch.cuda.is_available():
        raise RuntimeError("cluster.device=cuda: torch sees no GPU on this machine; use cluster.device=cpu or auto")
    if config.num_processes is not None and config.num_processes != announced:
        advice = f"use accelerate launch --multi_gpu --num_processes {config.num_processes} (--cpu starts a single process), or torchrun"
        raise RuntimeError(f"cluster.num_processes={config.num_processes}, but the launcher started {announced}; {advice}")
    if announced % config.direction_groups:
        raise RuntimeError(f"cluster.direction_groups={config.direction_groups}: choose a divisor of the {announced} ranks")


def join(config: ClusterConfig, announced: int, backend: str = "") -> tuple[Any, str]:
    """Meet the other ranks; return the Accelerator and the engine's name: ddp, or a ZeRO stage. All ranks call this.

    Sets torch's number of threads and turns TF32 off for the whole process. Raises RuntimeError if a rank is missing after
    `cluster.timeout_s`, or for a launch whose gradients would not be synchronised.
    """
    from accelerate import Accelerator
    from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs

    from dist_vlcl.dist import zero

    on_cpu = config.device == "cpu" or (config.device == "auto" and not torch.cuda.is_available())
    # accelerate launch sets it, with a file such as launch/accelerate_zero2.yaml
    on_deepspeed = os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true"
    backend = backend or ("gloo" if on_cpu else "nccl")
    if on_cpu:
        torch.set_num_threads(config.threads or max(1, len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", announced))))
    else:
        # Gradients have their own communicator (first_order.py). With this, NCCL launches both in the same order on every rank.
        os.environ.setdefault("NCCL_LAUNCH_ORDER_IMPLICIT", "1")
    # The rounding of TF32, bf16 and fp16 would hide the finite differences (concepts.md 2.3), so accelerate's own settings are overridden.
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    process_group = InitProcessGroupKwargs(timeout=timedelta(seconds=config.timeout_s))
    if on_deepspeed or announced > 1:  # one process without DeepSpeed has no process group
        process_group.backend = backend
    if on_deepspeed:
        zero.prepare_deepspeed(on_cpu, config.timeout_s)
    # broadcast_buffers would send the zeroth-order units in every forward pass, and overwrite a replica that diverged.
    # Without find_unused_parameters DDP reorders its buckets after the first backward pass. Sums over three or more ranks would then differ
    # in the last bits between a resumed run and an uninterrupted one.
    # One bucket, with gradients as views of it: its all-reduce runs while candidates are evaluated (first_order.py).
    warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated")  # torch's new name for it is not known to accelerate
    data_parallel = DistributedDataParallelKwargs(
        broadcast_buffers=False, find_unused_parameters=True, gradient_as_bucket_view=True, bucket_cap_mb=256
    )
    try:
        # With cpu=True accelerate would use DDP instead of DeepSpeed.
        accelerator = Accelerator(cpu=on_cpu and not on_deepspeed, mixed_precision="no", kwargs_handlers=[data_parallel, process_group])
    except RuntimeError as error:
        if not is_network_error(error):
            raise
        raise RuntimeError(f"not all {announced} ranks joined within cluster.timeout_s={config.timeout_s:g}: {error}") from error
    check_joined(accelerator, announced, backend, on_deepspeed)
    return accelerator, zero.engine_name(accelerator) if on_deepspeed else "ddp"


def check_joined(accelerator: Any, announced: int, backend: str, on_deepspeed: bool) -> None:
    """Raise RuntimeError unless accelerate sees all processes, plain data parallelism or DeepSpeed, no compiler, and our backend."""
    several = ("MULTI_GPU", "MULTI_CPU")
    kinds = ("DEEPSPEED",) if on_deepspeed else several if announced > 1 else ("NO", *several)
    size, kind = accelerator.num_processes, accelerator.distributed_type.value
    compiler = os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no").lower()
    group = dist.get_backend() if announced > 1 and dist.is_initialized() else backend
    wrong = [f"{size} processes, but the launcher announced {announced}"] * (size != announced)
    wrong += [f"processes of kind {kind}, but they must be of kind {' or '.join(kinds)}"] * (kind not in kinds)
    wrong += [f"dynamo backend {compiler}, but it must be no"] * (compiler != "no")
    wrong += [f"process group {group}, but it must be {backend}"] * (backend not in group)
    if wrong:
        advice = "accelerate launch --multi_gpu --dynamo_backend no, torchrun, or a file of launch/, and unset other ACCELERATE_* settings"
        raise RuntimeError(f"accelerate sees {'; '.join(wrong)}: start with {advice}")
