"""First-order units under DeepSpeed's ZeRO, by accelerate: optimiser state, gradients and, at stage 3, parameters are sharded.

Zeroth-order units are buffers, which no stage changes. The model is wrapped once for all tasks, because an engine's hooks stay on the
model when the engine is deleted.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from datetime import timedelta
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

from dist_vlcl.dist.first_order import MOMENTS, FirstOrder, FirstOrderConfig
from dist_vlcl.dist.world import World


def prepare_deepspeed(on_cpu: bool, timeout_s: float) -> None:
    """Make DeepSpeed usable on this machine. Call it before making an Accelerator. Raises RuntimeError if DeepSpeed is not installed.

    timeout_s: of DeepSpeed's own process groups.
    """
    if on_cpu:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "warning")
    try:
        import deepspeed
    except ImportError as error:
        raise RuntimeError("the launcher asks for DeepSpeed, which is not installed: pip install 'dist-vlcl[deepspeed]'") from error
    from accelerate.utils import DeepSpeedPlugin
    from deepspeed.comm.torch import TorchBackend

    # Without this, ranks would wait for a silent one for torch's 30 minutes (0.19.8). DeepSpeed has no option for it.
    TorchBackend.new_group = lambda self, ranks: dist.new_group(ranks, timeout=timedelta(seconds=timeout_s))
    # Use plain gloo. DeepSpeed would compile this op at the first start; a run killed during that leaves a lock that blocks later runs.
    # There is no public switch.
    if on_cpu:
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # This method passes the configuration to transformers, and fails if that is not installed. There is no public switch.
    DeepSpeedPlugin.set_deepspeed_weakref = lambda self: None  # type: ignore[method-assign]


def engine_name(accelerator: Any) -> str:
    """Return World.engine for an accelerator that uses DeepSpeed. Raises RuntimeError for a configuration that is not fp32."""
    config = accelerator.deepspeed_plugin.deepspeed_config
    for precision in ("fp16", "bf16", "torch_autocast"):
        if config.get(precision, {}).get("enabled") is True:
            raise RuntimeError(f"the DeepSpeed configuration enables {precision}: zeroth order needs fp32; use a file of launch/deepspeed/")
    if (steps := config.get("gradient_accumulation_steps", 1)) not in (1, "auto"):
        raise RuntimeError(f"the DeepSpeed configuration has gradient_accumulation_steps={steps}: give 1, and train.micro_batches={steps}")
    zero = config.get("zero_optimization", {})
    offloads = any(zero.get(what, {}).get("device", "none") != "none" for what in ("offload_optimizer", "offload_param"))
    return f"zero{zero.get('stage', 0)}{'_offload' if offloads else ''}"


def first_order(world: World, config: FirstOrderConfig, model: Any) -> FirstOrder:
    """Return the first-order engine that the launcher chose. Raises ValueError for an option that it does not have."""
    if world.engine != "ddp" and config.compression != "none":
        raise ValueError(f"first_order.compression={config.compression}: DeepSpeed sends whole gradients; give none, or use the engine ddp")
    kind = FirstOrder if world.engine == "ddp" else DeepSpeedFirstOrder if world.engine.startswith("zero0") else ZeroFirstOrder
    return kind(world, config, model)


class DeepSpeedFirstOrder(FirstOrder):
    """The model as wrapped by DeepSpeed. At stage 0 torch's own AdamW holds the state, with unsharded gradients."""

    has_gradients = False

    def begin(self) -> None:
        """Start a task: wrap the model if it is not wrapped, and set the moments to zero. All ranks call this."""
        if self.parameters and self.optimizer is None:
            self._wrap()
        if self.optimizer is not None:
            self._clear_moments()

    def _clear_moments(self) -> None:
        self.optimizer.state.clear()

    def _wrap(self) -> None:
        accelerator, model = self.world.accelerator, cast(Any, self.model)
        self.stage = accelerator.deepspeed_plugin.zero_stage
        accelerator.deepspeed_plugin.deepspeed_config["gradient_clipping"] = 0.0 if self.stage == 0 else self.config.max_grad_norm or 0.0
        with self.world.collectives("DeepSpeed's start"):
            self.wrapped, _ = accelerator.prepare(model, self._adamw())
        if self.stage == 3:
            import deepspeed

            model.vision.in_slices = model.language.in_slices = False
            # DeepSpeed's "leaf modules" fail here: their gradient hook finds parameters that are sharded again (0.19.8).
            for module in model.zero3_modules():
                for parameter in module.parameters():
                    deepspeed.zero.register_external_parameter(module, parameter)
        self.optimizer = self.wrapped.optimizer  # the optimiser that accelerate returns is a wrapper whose step does nothing

    def end(self) -> None:
        """Do nothing: the model stays wrapped until the run ends."""

    def accumulate(self, is_last: bool) -> AbstractContextManager:
        if self.optimizer is not None:
            self.wrapped.set_gradient_accumulation_boundary(is_last)
        return self.world.collectives("ZeRO's collectives in the forward and backward pass")

    def backward(self, loss: Tensor) -> None:
        if self.optimizer is not None:
            self.wrapped.backward(loss)
            self.has_gradients = True

    @contextmanager
    def gathered_parameters(self, writes: bool = False) -> Iterator[None]:
        """Gather the first-order parameters on every rank. With `writes`, rank 0's changes to them are kept. All ranks call this."""
        if self.optimizer is None:
            yield
            return
        import deepspeed
        from deepspeed.utils import safe_set_full_fp32_param

        with deepspeed.zero.GatheredParameters(self.parameters, modifier_rank=0 if writes else None):
            yield
            written = [p.detach().clone() for p in self.parameters] if writes and self.stage > 0 else []
        for parameter, value in zip(self.parameters, written, strict=False):
            safe_set_full_fp32_param(parameter, value)  # the fp32 copy that the next step starts from


class ZeroFirstOrder(DeepSpeedFirstOrder):
    """Stages 1 to 3: a ZeRO optimiser holds the state. Stage 3 gathers the modules of `model.zero3_modules()` one at a time."""

    updates = 0  # in this task

    def begin(self) -> None:
        self.updates = 0
        super().begin()

    def gradients(self) -> list[Tensor]:
        from deepspeed.utils import safe_get_full_grad

        shapes = [getattr(p, "ds_shape", p.shape) for p in self.parameters]  # ds_shape: of a parameter that stage 3 has sharded
        found = map(safe_get_full_grad, self.parameters)
        return [torch.zeros(shape, device=self.world.device) if g is None else g for g, shape in zip(found, shapes, strict=True)]

    def update(self, lr: float) -> float | None:
        if self.optimizer is None:
            return 0.0
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        with self.world.collectives("ZeRO's collectives in its step"):
            self.wrapped.step()
        self.has_gradients = False
        if self.optimizer.overflow:
            return None
        self.updates += 1
        return float(self.wrapped.get_global_grad_norm())

    def zero_grad(self) -> None:
        """Drop the gradients: take a step of the engine in which AdamW does nothing.

        `ZeROOptimizer.zero_grad` leaves gradients in the partitions of stages 2 and 3, and nothing public clears those. So AdamW's step is
        replaced for the time of this call.
        """
        if self.has_gradients:
            self.optimizer.optimizer.step = lambda *_, **__: None
            try:
                self.wrapped.step()
            finally:
                del self.optimizer.optimizer.step  # this uncovers the method of the class
            self.has_gradients = False

    def state_dict(self, names: Sequence[str]) -> dict[str, Tensor]:
        if self.updates == 0:
            return {}
        from deepspeed.utils import safe_get_full_optimizer_state

        state = {f"{name}/step": torch.tensor(float(self.updates)) for name in names}
        for name, parameter in zip(names, self.parameters, strict=True):
            state |= {f"{name}/{key}": safe_get_full_optimizer_state(parameter, key) for key in MOMENTS}
        return state

    def load_state_dict(self, state: dict[str, Tensor], names: Sequence[str]) -> None:
        if not state:
            return
        from deepspeed.utils import safe_set_full_optimizer_state

        self.updates = int(state[f"{names[0]}/step"])
        self._clear_moments()
        for name, parameter in zip(names, self.parameters, strict=True):
            for key in MOMENTS:
                safe_set_full_optimizer_state(parameter, state[f"{name}/{key}"].to(self.world.device), key)

    def _clear_moments(self) -> None:
        """Set AdamW's moments to zero, after `updates` updates. AdamW would make them only in its first step."""
        zero: Any = self.optimizer
        for flat in zero.fp32_partitioned_groups_flat if self.stage == 3 else zero.single_partition_of_fp32_groups:
            moments = {key: torch.zeros_like(flat, requires_grad=False) for key in MOMENTS}
            zero.optimizer.state[flat] = {"step": torch.tensor(float(self.updates)), **moments}
        if self.stage != 3:  # make the views of the state that belong to each parameter; only DeepSpeed's first step does that
            zero._hp_optimizer_states_linked = False
            zero._lazy_init_hp_params_optimizer_state()
