"""First-order units: AdamW and gradient synchronisation, by accelerate."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState, powerSGD_hook
from torch.nn.parallel import DistributedDataParallel

from dist_vlcl.dist.world import World
from dist_vlcl.options import option

COMPRESSIONS = ("none", "bf16", "powersgd")
MOMENTS = ("exp_avg", "exp_avg_sq")  # AdamW's, as torch and DeepSpeed call them
RANK = 2  # of PowerSGD's products


@dataclass
class FirstOrderConfig:
    """AdamW (concepts.md 1.6). It is made anew for each task."""

    lr: float = option(1e-3, "Peak learning rate.", above=0)
    weight_decay: float = option(0.0, "AdamW's weight decay.", min=0)
    betas: list[float] = option([0.9, 0.999], "AdamW's decay rates of the two moments.", min=0, below=1)
    max_grad_norm: float | None = option(None, "Gradients with a larger norm are scaled down to it; null: no clipping.", above=0)
    compression: str = option("none", "How gradients are sent: whole, as bf16, or by PowerSGD. Not with DeepSpeed.", choices=COMPRESSIONS)

    def check(self) -> None:
        if len(self.betas) != 2:
            raise ValueError(f"first_order.betas={self.betas}: give two numbers")


class FirstOrder:
    """The model as wrapped for training. Without first-order parameters it is not wrapped, because DDP refuses such a model.

    The all-reduce of gradients runs while zeroth order evaluates its candidates, which use the values from before the update. The backward
    pass starts it, and `wait_for_gradients` ends it. The results are bit-identical to plain DDP's; a test compares the two.
    """

    def __init__(self, world: World, config: FirstOrderConfig, model: nn.Module):
        self.world, self.config, self.model = world, config, model
        self.group: Any = None  # of the gradients' all-reduce
        self.power_sgd: PowerSGDState | None = None
        self.under_way: list[dist.Work | torch.futures.Future[Tensor]] = []
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.wrapped: Any = model
        self.optimizer: Any = None  # AdamW, as accelerate or DeepSpeed has wrapped it

    def begin(self) -> None:
        """Start a task: make a new AdamW and wrap the model again. All ranks call this."""
        self.end()
        if not self.parameters:
            return
        self.optimizer = self._adamw()
        if self.world.accelerator is not None:
            # The ranks compared the frozen weights at the start. DDP would send them again for each task: 600 MB for ViT-B/16.
            frozen = [name for name, p in self.model.named_parameters() if not p.requires_grad]
            DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(self.model, frozen)
            with self.world.collectives("DDP's check of the parameters"):
                self.wrapped, self.optimizer = self.world.accelerator.prepare(self.model, self.optimizer)
        self.power_sgd = None  # gradients of another task have other errors
        if isinstance(self.wrapped, DistributedDataParallel):
            # The all-reduce has its own group. Collectives of one group run one after another, so DDP's own would wait for the gradients.
            self.group = self.group or dist.new_group(timeout=timedelta(seconds=self.world.collectives.timeout_s))
            self.wrapped.register_comm_hook(self, _start_all_reduce)

    def _adamw(self) -> torch.optim.AdamW:
        config = self.config
        options: dict[str, Any] = {"betas": (config.betas[0], config.betas[1]), "weight_decay": config.weight_decay}
        on_gpu = self.parameters[0].is_cuda and self.world.engine == "ddp"  # fused: one kernel launch instead of many small ones
        return torch.optim.AdamW(self.parameters, lr=config.lr, fused=True if on_gpu else None, **options)

    def end(self) -> None:
        """Unwrap the model and drop the optimiser."""
        if self.optimizer is not None and self.world.accelerator is not None:
            self.world.accelerator.free_memory()
        self.wrapped, self.optimizer = self.model, None

    def accumulate(self, is_last: bool) -> AbstractContextManager:
        """Return the context of one micro-batch's forward and backward pass. Only the last one synchronises gradients."""
        return nullcontext() if is_last or self.wrapped is self.model else self.world.accelerator.no_sync(self.wrapped)

    def backward(self, loss: Tensor) -> None:
        """Back-propagate, and start the all-reduce of gradients."""
        if self.parameters:
            with self.world.collectives("all-reduce of gradients"):
                loss.backward()

    def wait_for_gradients(self) -> None:
        """Wait until the gradients of all ranks are added. On a GPU the stream waits, not the process."""
        with self.world.collectives("all-reduce of gradients"):
            while self.under_way:
                self.under_way.pop().wait()

    def gradients(self) -> list[Tensor]:
        """Return the gradient of every parameter, in the order of `parameters`. It is the same on all ranks."""
        self.wait_for_gradients()
        return [torch.zeros_like(p) if p.grad is None else p.grad for p in self.parameters]

    def update(self, lr: float) -> float | None:
        """Take AdamW's step and return the norm of the gradient. If the norm is not finite, change nothing and return None.

        The gradients are equal on all ranks, so all ranks decide the same.
        """
        if self.optimizer is None:
            return 0.0
        self.wait_for_gradients()
        norm = torch.nn.utils.get_total_norm([p.grad for p in self.parameters if p.grad is not None])
        if not norm.isfinite():
            return None
        if self.config.max_grad_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(self.parameters, self.config.max_grad_norm, norm)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.model.zero_grad()
        return float(norm)

    def zero_grad(self) -> None:
        """Drop the gradients of a skipped step, and what PowerSGD remembers: it may not be finite."""
        self.wait_for_gradients()
        self.power_sgd = None
        self.model.zero_grad()

    def gathered_parameters(self, writes: bool = False) -> AbstractContextManager:
        """Gather sharded parameters for reading or, with `writes`, writing. DDP does not shard them. All ranks call this."""
        return nullcontext()

    def state_dict(self, names: Sequence[str]) -> dict[str, Tensor]:
        """Return AdamW's moments under `name/exp_avg` and so on. `names` are those of `parameters`."""
        if self.optimizer is None:
            return {}
        state = self.optimizer.state_dict()["state"]
        return {f"{names[k]}/{key}": torch.as_tensor(value) for k, entry in state.items() for key, value in entry.items()}

    def load_state_dict(self, state: dict[str, Tensor], names: Sequence[str]) -> None:
        """Restore what `state_dict` returned."""
        if self.optimizer is None or not state:
            return
        own = self.optimizer.state_dict()
        saved = {k: name for k, name in enumerate(names) if f"{name}/step" in state}
        own["state"] = {k: {key: state[f"{name}/{key}"].clone() for key in ("step", *MOMENTS)} for k, name in saved.items()}
        self.optimizer.load_state_dict(own)


def _start_all_reduce(first: FirstOrder, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    """DDP's communication hook: start to average a bucket in place, and report it as done. Gradients are views of it (see World)."""
    average = bucket.buffer()
    if first.config.compression == "bf16":
        first.under_way.append(bf16_compress_hook(first.group, bucket))
    elif first.config.compression == "powersgd":
        first.power_sgd = first.power_sgd or _power_sgd(first.group)
        first.under_way.append(powerSGD_hook(first.power_sgd, _Matrices(bucket)))  # type: ignore[arg-type]
    else:
        first.under_way.append(dist.all_reduce(average.mul_(1 / first.world.size), group=first.group, async_op=True))
    done: torch.futures.Future[Tensor] = torch.futures.Future(devices=[average.device] if average.is_cuda else None)
    done.set_result(average)
    return done


def _power_sgd(group: Any) -> PowerSGDState:
    """Return PowerSGD's settings and memory. Its first two steps are not compressed."""
    # An expert without a sample has columns of zeros: their norm must not be a divisor.
    return PowerSGDState(group, RANK, start_powerSGD_iter=2, orthogonalization_epsilon=1e-8, batch_tensors_with_same_shape=True)


class _Matrices:
    """A bucket in which each expert has its own matrix. PowerSGD would make one of all experts, too narrow to compress."""

    def __init__(self, bucket: dist.GradBucket):
        self.index, self.buffer, self.is_last, self._stacked = bucket.index, bucket.buffer, bucket.is_last, bucket.gradients

    def gradients(self) -> list[Tensor]:
        return [matrix for stack in self._stacked() for matrix in (stack.unbind() if stack.dim() == 3 else [stack])]
