"""The step as one would first write it, to compare with: every loss is one call of the whole CLIP.

First order is as in MoE-Adapters4CL: 77 tokens a prompt, one expert after the other, each on the samples that chose it. Zeroth order is
as in MeZO and ZO-LLM: parameters are perturbed in place, tensor by tensor, and noise is drawn again in each pass. A conservative step
takes five losses. One estimate serves both branches. A test compares the base loss with ours. Updates differ: torch draws the noise here.
"""

# B samples, L tokens, D width, F features, k experts of a sample

from collections.abc import Callable, Iterator, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from dist_vlcl.data.loader import Batch
from dist_vlcl.model.activation import QuickGELU
from dist_vlcl.model.clip import TwoTowers
from dist_vlcl.model.moe import MoEConfig
from dist_vlcl.model.tower import AdaptedBlock
from dist_vlcl.model.units import UnitId, freeze
from dist_vlcl.orders import Order
from dist_vlcl.zo.noise import Key, StepNoise
from dist_vlcl.zo.update import ZerothOrderConfig


class NaiveStep:
    """One hybrid step whose losses share nothing. Build `towers` with model.context=full and adapter=moe."""

    def __init__(self, towers: TwoTowers, orders: Mapping[UnitId, Order], zeroth: ZerothOrderConfig, class_names: list[str]):
        assert isinstance(towers.vision.block(1).adapter.config, MoEConfig)
        if isinstance(zeroth.probes, Mapping) or zeroth.lr_scale == "auto":
            raise ValueError(f"zo={zeroth.name}: the naive step needs one number for zo.probes and for zo.lr_scale")
        self.towers, self.config = towers, zeroth
        self.device = towers.logit_scale.device
        self.tokens = towers.prompts(class_names).to(self.device)
        self.zeroth: dict[str, Tensor] = {}
        for id, unit in towers.units.items():
            if orders[id] is not Order.FIRST:
                freeze(unit)
            if orders[id] is Order.ZEROTH:
                self.zeroth |= {f"{id}/{name}": t for name, t in unit.tensors().items()}
        self.first = [p for p in towers.parameters() if p.requires_grad]
        self.adamw = torch.optim.AdamW(self.first, weight_decay=0.0) if self.first else None

    def __call__(self, batch: Batch, key: Key, lr: float) -> float:
        """Update, and return the base loss."""
        images, labels = batch.images.to(self.device), batch.labels.to(self.device)
        rows = {"vision": batch.positions.to(self.device), "language": torch.arange(len(self.tokens), device=self.device)}
        noise = StepNoise(key, rows)
        loss = self.loss(images, labels, noise)
        if self.adamw is not None:
            loss.backward()
            for group in self.adamw.param_groups:
                group["lr"] = lr
        if self.zeroth:
            with torch.no_grad():
                self._zeroth_order(lambda: float(self.loss(images, labels, noise)), key, lr, None if self.first else float(loss))
        if self.adamw is not None:
            self.adamw.step()
            self.adamw.zero_grad()
        return float(loss.detach())

    def _zeroth_order(self, loss: Callable[[], float], key: Key, lr: float, base: float | None) -> None:
        config, seed, step = self.config, key.seed, lr * self.config.lr_scale
        slopes = []
        for probe in range(config.probes):
            self._perturb(seed + probe, 1)
            plus = loss()
            if config.sides == 2:
                self._perturb(seed + probe, -2)
                slopes.append((plus - loss()) / 2)
                self._perturb(seed + probe, 1)
            else:
                self._perturb(seed + probe, -1)
                base = loss() if base is None else base
                slopes.append(plus - base)
                base = None
        if config.acceptance == "always":
            self._move(seed, slopes, -step)
            return
        losses = {0.0: loss()}
        for coefficient in (-step, step):
            self._move(seed, slopes, coefficient)
            losses[coefficient] = loss()
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

    def loss(self, images: Tensor, labels: Tensor, noise: StepNoise) -> Tensor:
        """Return the mean loss of the batch, from both towers."""
        image_BF, text_CF = self.features("vision", images, noise), self.features("language", self.tokens, noise)
        return F.cross_entropy(self.towers.logit_scale * image_BF @ text_CF.T, labels)

    def features(self, branch: str, inputs: Tensor, noise: StepNoise) -> Tensor:
        """Return unit features `[B, F]` of uint8 images or of tokens."""
        tower = self.towers.tower(branch)
        x_BLD = tower.stem_and_head.embed(inputs)
        mask_LL = None
        if branch == "language":
            length = x_BLD.shape[1]
            mask_LL = torch.full((length, length), float("-inf"), device=x_BLD.device, dtype=x_BLD.dtype).triu(1)
        for block in tower:
            random = block.adapter.draw(noise, branch, block.unit.id.layer, x_BLD.shape[1], True)
            x_BLD = self._block(block, x_BLD, mask_LL, *random)
        rows = tower.stem_and_head.reads(inputs)
        last = x_BLD[:, :1] if rows is None else x_BLD[torch.arange(len(x_BLD), device=x_BLD.device)[:, None], rows]
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
