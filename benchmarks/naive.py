"""The step as one would first write it, to compare with: every loss is one call of the whole CLIP.

First order is as in MoE-Adapters4CL: 77 tokens a prompt, one expert after the other, each on the samples that chose it. Zeroth order is
as in MeZO and ZO-LLM: parameters are perturbed in place, tensor by tensor, and noise is drawn again in each pass. Differences are
two-sided, and a conservative step takes five losses. One estimate serves both branches. A test compares the base loss with ours. Updates
differ: torch draws the noise here.
"""

# B samples, L tokens, D width, F features, k experts of a sample

from collections.abc import Callable, Iterator, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.common import Workload
from dist_vlcl.data.loader import Batch
from dist_vlcl.losses import sample_losses, step_noise
from dist_vlcl.model.activation import QuickGELU
from dist_vlcl.model.clip import TwoTowers
from dist_vlcl.model.moe import MoEConfig
from dist_vlcl.model.timm_tower import WholeBlock
from dist_vlcl.model.tower import AdaptedBlock
from dist_vlcl.model.units import UnitId, freeze
from dist_vlcl.orders import Order
from dist_vlcl.zo.noise import Key, StepNoise
from dist_vlcl.zo.update import ZerothOrderConfig


def refusal(towers: TwoTowers, zeroth: ZerothOrderConfig) -> str:
    """Return why the naive step is left out for a model or a strategy; "" if it knows both."""
    vision, text = towers.vision.block(1), towers.language.stem_and_head
    knows_model = isinstance(vision.adapter.config, MoEConfig) and not isinstance(vision, WholeBlock) and not text.has_class_token
    if knows_model and isinstance(zeroth.probes, int) and zeroth.lr_scale != "auto" and zeroth.granularity != "unit":
        return ""
    return (
        "The naive step is left out: it knows adapter=moe, open_clip's own blocks without a class token in the text, one number for "
        "zo.probes, a number for zo.lr_scale, and one estimate for all units (zo.granularity)."
    )


def naive_step(workload: Workload, device: str) -> "NaiveStep":
    """Return the naive step of a workload, in fp32 whatever our precision: two evaluations in bf16 do not give a slope.

    Raises ValueError for a model or a strategy that it does not know.
    """
    naive = workload.changed("model.precision=fp32", "model.checkpoint=false", "model.graphs=false", "model.context=full")
    towers = naive.towers(device)
    if reason := refusal(towers, naive.config.zo):
        raise ValueError(reason)
    return NaiveStep(towers, naive.orders(towers), naive.config.zo, naive.class_names)


class NaiveStep:
    """One hybrid step whose losses share nothing."""

    def __init__(self, towers: TwoTowers, orders: Mapping[UnitId, Order], zeroth: ZerothOrderConfig, class_names: list[str]):
        self.towers, self.config = towers, zeroth
        self.tokens = towers.prompts(class_names).to(towers.logit_scale.device)
        self.zeroth: dict[str, Tensor] = {}
        for id, unit in towers.units.items():
            if orders[id] is not Order.FIRST:
                freeze(unit)
            if orders[id] is Order.ZEROTH:
                self.zeroth |= {f"{id}/{name}": t for name, t in unit.tensors().items()}
        self.first = [p for p in towers.parameters() if p.requires_grad]
        self.adamw = torch.optim.AdamW(self.first, weight_decay=0.0) if self.first else None

    def __call__(self, batch: Batch, key: Key, lr: float) -> None:
        """Update on a batch."""
        loss = self.loss_of(batch, key)
        if self.adamw is not None:
            loss().backward()
            for group in self.adamw.param_groups:
                group["lr"] = lr
        if self.zeroth:
            with torch.no_grad():
                self._zeroth_order(loss, key, lr)
        if self.adamw is not None:
            self.adamw.step()
            self.adamw.zero_grad()

    def loss_of(self, batch: Batch, key: Key) -> Callable[[], Tensor]:
        """Return a function that computes the mean loss of a batch from both towers."""
        noise = step_noise(self.towers, torch.arange(len(self.tokens), device=self.tokens.device), batch.positions, key)

        def loss() -> Tensor:
            logits_BC = self.towers.logits(self.features("vision", batch.images, noise), self.features("language", self.tokens, noise))
            return sample_losses(logits_BC, batch.labels, self.towers.config.loss).mean()

        return loss

    def _zeroth_order(self, loss: Callable[[], Tensor], key: Key, lr: float) -> None:
        config, seed, step = self.config, key.seed, lr * self.config.lr_scale
        slopes = []
        for probe in range(config.probes):
            self._perturb(seed + probe, 1)
            plus = float(loss())
            self._perturb(seed + probe, -2)
            slopes.append((plus - float(loss())) / 2)
            self._perturb(seed + probe, 1)
        if config.acceptance == "always":
            self._move(seed, slopes, -step)
            return
        losses = {0.0: float(loss())}
        for coefficient in (-step, step):
            self._move(seed, slopes, coefficient)
            losses[coefficient] = float(loss())
            self._move(seed, slopes, -coefficient)
        self._move(seed, slopes, min(losses, key=losses.__getitem__))

    def _perturb(self, seed: int, times: int) -> None:
        """Add times * epsilon * z in place: MeZO's pass over the parameters."""
        for name, tensor, z in self._noise(seed):
            tensor.data = tensor.data + z * (times * self.config.epsilon[name.split(".")[0]])

    def _move(self, seed: int, slopes: list[float], coefficient: float) -> None:
        for probe, slope in enumerate(slopes):
            for name, tensor, z in self._noise(seed + probe):
                direction = z * (slope / self.config.epsilon[name.split(".")[0]])
                tensor.data = tensor.data + (direction.sign() if self.config.transform == "sign" else direction) * coefficient

    def _noise(self, seed: int) -> Iterator[tuple[str, Tensor, Tensor]]:
        """Yield every tensor with its noise, drawn again from the seed."""
        torch.manual_seed(seed)
        for name, tensor in self.zeroth.items():
            yield name, tensor, torch.normal(0.0, 1.0, tensor.shape, device=tensor.device)

    def features(self, branch: str, inputs: Tensor, noise: StepNoise) -> Tensor:
        """Return unit features `[B, F]` of uint8 images or of tokens."""
        tower = self.towers.tower(branch)
        x_BLD = tower.stem_and_head.embed(inputs)
        causal_mask = nn.Transformer.generate_square_subsequent_mask
        mask_LL = causal_mask(x_BLD.shape[1], x_BLD.device, x_BLD.dtype) if tower.block(1).causal else None
        for block in tower:
            random = block.adapter.draw(noise, branch, block.unit.id.layer, x_BLD.shape[1], True)
            x_BLD = self._block(block, x_BLD, mask_LL, *random)
        rows = tower.stem_and_head.reads(inputs)
        last = x_BLD if rows is None else x_BLD[torch.arange(len(x_BLD), device=x_BLD.device)[:, None], rows]
        return F.normalize(tower.stem_and_head.pool(last), dim=-1)

    def _block(self, block: AdaptedBlock, x: Tensor, mask: Tensor | None, router: Tensor | None, dropout_mask: Tensor | None) -> Tensor:
        clip = block.block
        u = x + clip.ls_1(clip.attention(q_x=clip.ln_1(x), attn_mask=mask))
        return u + clip.ls_2(self._mlp(clip.mlp, clip.ln_2(u))) + self._experts(block.adapter, u, router, dropout_mask)

    def _mlp(self, mlp, x: Tensor) -> Tensor:
        hidden = mlp.c_fc(x)
        return mlp.c_proj(hidden * torch.sigmoid(1.702 * hidden) if isinstance(mlp.gelu, QuickGELU) else mlp.gelu(hidden))

    def _experts(self, adapter, u: Tensor, noise: Tensor | None, dropout_mask: Tensor | None) -> Tensor:
        """Return the gated sum `[B, L, D]`, one expert after the other, each on the samples that chose it."""
        config = adapter.config
        logits = u[:, 0] @ adapter.router
        logits = logits + (F.softplus(u[:, 0] @ adapter.noise) + 0.01) * (noise if noise is not None else 0.0)
        best_Bk = logits.topk(config.top_k, dim=-1).indices.sort(-1).values
        gates_Bk = logits.gather(-1, best_Bk).softmax(-1)
        y = torch.zeros_like(u)
        for e in range(config.experts):
            samples, place = self._who_chose(e, best_Bk)
            hidden = F.relu(F.linear(u[samples], adapter.down_weight[e], adapter.down_bias[e]))
            if dropout_mask is not None:
                mask = dropout_mask.unflatten(-1, (config.top_k, -1))[samples, :, place]
                hidden = hidden * mask / (1 - config.dropout)
            out = F.linear(hidden, adapter.up_weight[e].T, adapter.up_bias[e]) * config.scale
            y = y.index_add(0, samples, out * gates_Bk[samples, place][:, None, None])
        return y

    def _who_chose(self, expert: int, best_Bk: Tensor) -> tuple[Tensor, Tensor]:
        if best_Bk.device.type == "meta":  # without numbers: on average B k / E samples
            share = torch.zeros(best_Bk.numel() // self.towers.vision.block(1).adapter.config.experts, dtype=torch.long, device="meta")
            return share, share
        samples, place = torch.nonzero(best_Bk == expert, as_tuple=True)
        return samples, place
