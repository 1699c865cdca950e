"""The ranks of a run: who am I, and the few exchanges that zeroth-order training needs. Accelerate starts the process group."""

# W ranks, n numbers

import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from dist_vlcl.dist.collectives import Collectives, is_of_the_network

if TYPE_CHECKING:
    from accelerate import Accelerator


@dataclass
class ClusterConfig:
    """How the run expects to be started. `num_processes`: what the user asked for, checked at start; null takes what is there."""

    num_processes: int | None = None
    device: str = "auto"  # or cpu, cuda
    timeout_s: float = 600.0
    direction_groups: int = 1  # data-parallel copies that share out the zeroth-order candidates of the whole batch among them
    threads: int | None = None  # CPU threads of a rank; default: the cores, shared among the ranks of this machine
    traceback: bool = False  # show where an error came from, not only what it says

    def check(self) -> None:
        if self.device not in ("auto", "cpu", "cuda"):
            raise ValueError(f"cluster.device={self.device!r}: choose from auto, cpu, cuda")
        if self.timeout_s <= 0:
            raise ValueError(f"cluster.timeout_s={self.timeout_s}: give a positive number of seconds")
        if self.direction_groups < 1:
            raise ValueError(f"cluster.direction_groups={self.direction_groups}: give a positive number that divides the number of ranks")
        if self.threads is not None and self.threads < 1:
            raise ValueError(f"cluster.threads={self.threads}: give a positive number, or null for the cores shared among the ranks")


@dataclass
class World:
    """Rank, size, device, and exchanges whose result has the same bits on every rank. All ranks call every exchange.

    The ranks are a grid of `direction_groups` rows: each row has the whole batch, cut into `data_size` parts, and evaluates its own
    share of the zeroth-order candidates.
    """

    rank: int = 0
    size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    accelerator: Any = None
    engine: str = "ddp"  # of first-order units; or zero0, zero1, zero2, zero3, zero3_offload
    direction_groups: int = 1
    timeout: timedelta = timedelta(seconds=ClusterConfig.timeout_s)  # of an exchange
    collectives: Collectives = field(
        default_factory=lambda: Collectives(0, ["this host"], 0)
    )  # `with world.collectives("all-gather of ..."):`

    @classmethod
    def alone(cls, device: str = "cpu") -> "World":
        return cls(device=torch.device(device))

    @classmethod
    def from_environment(cls, config: ClusterConfig) -> "World":
        """Join the process group that the launcher announced; refuse a launch that would silently train something else.

        Raises RuntimeError when accelerate's view differs from the launcher's: 2 processes without gradient sync both print success.
        """
        config.check()
        announced, timeout = int(os.environ.get("WORLD_SIZE", 1)), timedelta(seconds=config.timeout_s)
        check_launch(config, announced)
        accelerator, engine = join(config, announced, timeout)
        groups = config.direction_groups
        if groups > 1 and engine.startswith("zero3"):
            raise RuntimeError(
                "cluster.direction_groups: not under ZeRO-3, where ranks must evaluate the same candidates; take another engine"
            )
        world = cls(accelerator.process_index, accelerator.num_processes, accelerator.device, accelerator, engine, groups, timeout)
        world.collectives = Collectives(world.rank, ["?"] * world.size, config.timeout_s)
        world.collectives.hosts = world.gather_objects(socket.gethostname())
        return world

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def data_size(self) -> int:
        """Return into how many parts a batch is cut."""
        return self.size // self.direction_groups

    @property
    def data_rank(self) -> int:
        """Return which part of a batch this rank has."""
        return self.rank % self.data_size

    @property
    def direction_group(self) -> int:
        """Return which share of the candidates this rank evaluates."""
        return self.rank // self.data_size

    def take_peak_gib(self) -> float | None:
        """Return the most memory that this rank's accelerator has held since the last call, in GiB; None on a CPU."""
        if self.device.type != "cuda":
            return None
        peak = torch.cuda.max_memory_reserved(self.device) / 2**30  # a CUDA graph's memory is not allocated anew
        torch.cuda.reset_peak_memory_stats(self.device)
        return peak

    def gather(self, vector: Tensor, what: str = "numbers") -> Tensor:
        """Return every rank's vector `[W, n]`, for a vector `[n]` of one shape and dtype on all ranks."""
        if self.size == 1:
            return vector[None]
        vector = vector.to(self.device)
        rows = [torch.empty_like(vector) for _ in range(self.size)]
        with self.collectives(f"all-gather of {what}"):
            dist.all_gather(rows, vector)
            return torch.stack(rows).cpu()

    def sum(self, vector: Tensor, what: str = "numbers") -> Tensor:
        """Return the sum over ranks `[n]`, added in rank order: the same bits on every rank, whatever the network does."""
        return ordered_sum(self.gather(vector, what))

    def broadcast(self, tensor: Tensor, what: str = "a tensor") -> Tensor:
        """Overwrite a tensor with rank 0's, and return it."""
        if self.size > 1:
            moved = tensor.to(self.device)
            with self.collectives(f"broadcast of {what}"):
                dist.broadcast(moved, src=0)
            if moved is not tensor:
                tensor.copy_(moved)
        return tensor

    def share(self, value: Any, what: str = "rank 0's word") -> Any:
        """Return rank 0's value, a small picklable object."""
        if self.size == 1:
            return value
        box = [value]
        with self.collectives(f"broadcast of {what}"):
            dist.broadcast_object_list(box, src=0, device=self.device)
        return box[0]

    def gather_objects(self, value: Any, what: str = "what must agree") -> list[Any]:
        """Return every rank's value, in rank order."""
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
        """Leave the process group, so that an orderly end is not taken for a crash."""
        if dist.is_available() and dist.is_initialized():
            dist.destroy_process_group()
            self.collectives.let_them_read()


def ordered_sum(rows_Wn: Tensor | Sequence[Tensor]) -> Tensor:
    total = torch.zeros_like(rows_Wn[0])
    for row in rows_Wn:
        total = total + row
    return total


def runs_on_cpu(config: ClusterConfig) -> bool:
    """Whether ranks compute on the CPU: because they were told to, or for want of a GPU."""
    return config.device == "cpu" or (config.device == "auto" and not torch.cuda.is_available())


def check_launch(config: ClusterConfig, announced: int) -> None:
    """Refuse, before any rank waits for another, what the launcher's announcement shows to be wrong."""
    if config.device == "cuda" and not torch.cuda.is_available():
        raise RuntimeError("cluster.device=cuda: torch sees no GPU on this machine; use cluster.device=cpu or auto")
    if config.num_processes is not None and config.num_processes != announced:
        raise RuntimeError(
            f"cluster.num_processes={config.num_processes}, but the launcher started {announced}. On CPUs use\n"
            f"  accelerate launch --multi_gpu --num_processes {config.num_processes} -m dist_vlcl.train ...\n"
            "(`--cpu` starts a single process), or torchrun --nproc_per_node."
        )
    if announced % config.direction_groups:
        raise RuntimeError(f"cluster.direction_groups={config.direction_groups}: choose a divisor of the {announced} ranks")


def join(config: ClusterConfig, announced: int, timeout: timedelta) -> tuple["Accelerator", str]:
    """Meet the other ranks; return accelerate's view of them and the engine's name: ddp, or a ZeRO stage. All ranks call this.

    Sets torch's threads and turns TF32 off for the whole process. Raises RuntimeError when not all ranks come in time, or for a
    launch whose gradients would not be synchronised.
    """
    from accelerate import Accelerator
    from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs

    from dist_vlcl.dist import zero

    on_cpu, on_deepspeed = runs_on_cpu(config), zero.is_requested()
    if on_cpu:
        local = int(os.environ.get("LOCAL_WORLD_SIZE", announced))
        torch.set_num_threads(config.threads or max(1, len(os.sched_getaffinity(0)) // local))
    else:
        # Gradients have a communicator of their own (first_order.py); NCCL then launches both in one order on every rank.
        os.environ.setdefault("NCCL_LAUNCH_ORDER_IMPLICIT", "1")
    # Zeroth-order slopes drown in the rounding of bf16, fp16 and TF32 (METHOD 2.2), whatever the user's accelerate configuration says.
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    process_group = InitProcessGroupKwargs(timeout=timeout)
    if on_deepspeed:
        zero.make_ready(on_cpu)
        process_group.backend = "gloo" if on_cpu else "nccl"
    # Broadcasting buffers would ship the ZO units at each forward, and hide a rank that went astray.
    # Without find_unused_parameters DDP re-orders its buckets after the first backward: sums over three ranks and more
    # then differ in their last bits between a resumed run and one never stopped.
    # One bucket, of which gradients are views: it is exchanged while zeroth order goes on (dist/first_order.py).
    data_parallel = DistributedDataParallelKwargs(
        broadcast_buffers=False, find_unused_parameters=True, gradient_as_bucket_view=True, bucket_cap_mb=256
    )
    try:
        # With cpu=True accelerate would put DDP in DeepSpeed's place.
        accelerator = Accelerator(cpu=on_cpu and not on_deepspeed, mixed_precision="no", kwargs_handlers=[data_parallel, process_group])
    except RuntimeError as error:
        if not is_of_the_network(error):
            raise
        raise RuntimeError(f"not all {announced} ranks have met within cluster.timeout_s={config.timeout_s:g}: {error}") from error
    check_joined(accelerator, announced, on_cpu, on_deepspeed)
    return accelerator, zero.name_of(accelerator) if on_deepspeed else "ddp"


def check_joined(accelerator: "Accelerator", announced: int, on_cpu: bool, on_deepspeed: bool) -> None:
    """Refuse what accelerate made of the launch where gradients would not be synchronised, or not as announced."""
    from accelerate.utils import DistributedType

    kind = accelerator.distributed_type
    if accelerator.num_processes != announced or (announced > 1 and kind == DistributedType.NO):
        raise RuntimeError(
            f"the launcher announced {announced} processes, accelerate sees {accelerator.num_processes} "
            f"({kind}): gradients would not be synchronised. Start with accelerate launch --multi_gpu or torchrun."
        )
    plain = (DistributedType.NO, DistributedType.MULTI_GPU, DistributedType.MULTI_CPU)
    compiler = os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no")
    if kind not in ((DistributedType.DEEPSPEED,) if on_deepspeed else plain) or compiler.lower() != "no":
        raise RuntimeError(
            f"accelerate is configured for {kind} with dynamo backend {compiler}; there are plain data parallelism and DeepSpeed. "
            "Start with accelerate launch --multi_gpu --dynamo_backend no, or with a file of launch/."
        )
    backend = "gloo" if on_cpu else "nccl"
    if announced > 1 and backend not in dist.get_backend():
        raise RuntimeError(f"the process group runs on {dist.get_backend()!r}, not on {backend}: unset ACCELERATE_* backend settings")
