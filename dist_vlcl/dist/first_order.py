"""First-order units: AdamW and gradient synchronisation, by accelerate."""

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import record_function

from dist_vlcl.dist.world import World


@dataclass
class FirstOrderConfig:
    """AdamW of METHOD 1.6, re-created for each task."""

    lr: float = 1e-3
    weight_decay: float = 0.0
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    max_grad_norm: float | None = None

    def check(self) -> None:
        if not self.lr > 0:
            raise ValueError(f"first_order.lr={self.lr}: give a positive number")
        if len(self.betas) != 2 or not all(0 <= b < 1 for b in self.betas):
            raise ValueError(f"first_order.betas={self.betas}: give two numbers in [0, 1)")
        if self.max_grad_norm is not None and not self.max_grad_norm > 0:
            raise ValueError(f"first_order.max_grad_norm={self.max_grad_norm}: give a positive number, or null")


class FirstOrder:
    """The model as wrapped for training. With no first-order parameter nothing is wrapped: DDP refuses such a model.

    Gradients travel while zeroth order evaluates its candidates, which read the values of before the update: the backward pass starts the
    exchange, `wait_for_gradients` ends it. overlap=False is the twin that ends it in the backward pass, as DDP does: the same bits.
    """

    def __init__(self, world: World, config: FirstOrderConfig, model: nn.Module, overlap: bool = True):
        config.check()
        self.overlap = overlap
        self.group: Any = None
        self.under_way: list[dist.Work] = []
        self.world, self.config, self.model = world, config, model
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.wrapped: nn.Module = model
        self.optimizer: torch.optim.Optimizer | None = None

    def begin(self) -> None:
        """Make a fresh AdamW, and wrap the model again. All ranks call this."""
        self.end()
        if not self.parameters:
            return
        optimizer: Any = self._adamw()
        if self.world.accelerator is not None:
            with self.world.collectives("first look at the parameters by DDP"):
                self.wrapped, optimizer = self.world.accelerator.prepare(self.model, optimizer)
        self.optimizer = optimizer
        if self.overlap and isinstance(self.wrapped, DistributedDataParallel):
            # A group of its own: in the default one, exchanges queue up, and what DDP itself waits for would stand behind the gradients.
            self.group = self.group or dist.new_group(timeout=self.world.timeout)
            self.wrapped.register_comm_hook(self, _start_exchange)

    def _adamw(self) -> torch.optim.AdamW:
        config = self.config
        options: dict[str, Any] = {"betas": (config.betas[0], config.betas[1]), "weight_decay": config.weight_decay}
        on_gpu = self.parameters[0].is_cuda and self.world.engine == "ddp"  # where its many small operations would be launched one by one
        return torch.optim.AdamW(self.parameters, lr=config.lr, fused=True if on_gpu else None, **options)

    def end(self) -> None:
        """Unwrap the model and drop the optimiser."""
        if self.optimizer is not None and self.world.accelerator is not None:
            self.world.accelerator.free_memory()
        self.wrapped, self.optimizer = self.model, None

    @contextlib.contextmanager
    def accumulate(self, is_last: bool) -> Iterator[None]:
        """Forward and backward of one micro-batch; gradients are exchanged with the last one only."""
        if is_last or self.wrapped is self.model or self.world.accelerator is None:
            yield
        else:
            with self.world.accelerator.no_sync(self.wrapped):
                yield

    def backward(self, loss: Tensor) -> None:
        if self.parameters:
            with self.world.collectives("all-reduce of gradients"):
                loss.backward()

    @record_function("first order: wait for gradients")
    def wait_for_gradients(self) -> None:
        """Wait until the gradients of all ranks are added up; on a GPU the stream waits, not the process."""
        with self.world.collectives("all-reduce of gradients"):
            while self.under_way:
                self.under_way.pop().wait()

    def gradients(self) -> list[Tensor]:
        """Return the gradient of every parameter, the same on all ranks, in the order of `parameters`."""
        self.wait_for_gradients()
        return [torch.zeros_like(p) if p.grad is None else p.grad for p in self.parameters]

    def update(self, lr: float, gradient_scale: float = 1.0) -> float | None:
        """Take the step at this learning rate and return the gradient's norm; None, with nothing changed, if it is not finite.

        The gradients are equal on all ranks by now, so all decide alike. `gradient_scale` multiplies them first.
        """
        if self.optimizer is None:
            return 0.0
        self.wait_for_gradients()
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        if gradient_scale != 1.0:
            torch._foreach_mul_(gradients, gradient_scale)
        norm = float(torch.nn.utils.get_total_norm(gradients))
        if not math.isfinite(norm):
            self.zero_grad()
            return None
        if self.config.max_grad_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(self.parameters, self.config.max_grad_norm, torch.tensor(norm))
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.zero_grad()
        return norm

    def zero_grad(self) -> None:
        self.wait_for_gradients()
        for p in self.parameters:
            p.grad = None

    @contextlib.contextmanager
    def gathered_parameters(self, writes: bool = False) -> Iterator[None]:
        """Have the first-order parameters whole, for reading or writing, on every rank: here they always are. All ranks call this."""
        yield

    def state_dict(self, names: Sequence[str]) -> dict[str, Tensor]:
        """Return AdamW's moments under `name/exp_avg` and so on, for the names of `parameters`."""
        if self.optimizer is None:
            return {}
        state = self.optimizer.state_dict()["state"]
        return {f"{names[k]}/{key}": torch.as_tensor(value) for k, entry in state.items() for key, value in entry.items()}

    def load_state_dict(self, state: dict[str, Tensor], names: Sequence[str]) -> None:
        """Restore what `state_dict` returned."""
        if self.optimizer is None or not state:
            return
        own = self.optimizer.state_dict()
        own["state"] = {
            k: {key: state[f"{name}/{key}"].clone() for key in ("step", "exp_avg", "exp_avg_sq")}
            for k, name in enumerate(names)
            if f"{name}/step" in state
        }
        self.optimizer.load_state_dict(own)


def _start_exchange(first: FirstOrder, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    """DDP's communication hook: start to average a bucket, in place, and call it done. Gradients are views of it (see World)."""
    average = bucket.buffer().mul_(1 / first.world.size)
    first.under_way.append(dist.all_reduce(average, group=first.group, async_op=True))
    done: torch.futures.Future[Tensor] = torch.futures.Future(devices=[average.device] if average.is_cuda else None)
    done.set_result(average)
    return done
