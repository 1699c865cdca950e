"""A real open_clip CLIP, tiny, as two towers; and the same CLIP in open_clip's own code with adapters hung on by hooks."""

# B images, C classes, L tokens, D width, F features, E experts, r bottleneck

import copy
import functools
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import open_clip
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dist_vlcl.data.loader import Batch
from dist_vlcl.model.clip import ModelConfig, TwoTowers, build_clip
from dist_vlcl.model.lora import LoRAConfig
from dist_vlcl.model.moe import MoEConfig
from dist_vlcl.model.units import Unit
from dist_vlcl.zo.noise import StepNoise

MOE = MoEConfig(bottleneck=4)
LORA = LoRAConfig(rank=3)
MLP_LORA = LoRAConfig(rank=3, targets=["mlp"], scale=0.1)
NAMES = ["cat", "very long winded otter of the river", "dog", "green frog", "x"]  # prompts of different lengths
IMAGE_SIZE, WIDTH, CONTEXT = 16, 32, 77


def tiny_clip(
    vision_layers: int = 4,
    language_layers: int = 3,
    adapter: MoEConfig | LoRAConfig = MOE,
    seed: int = 0,
    randomize: bool = True,
    double: bool = False,
    context: str = "truncated",
    precision: str = "fp32",
) -> TwoTowers:
    """Return towers whose weights are a function of the depths and the seed; randomised adapters act, and have gradients."""
    built = _build(vision_layers, language_layers, adapter, seed, precision)
    towers = copy.deepcopy(built, {id(built.tokenizer): built.tokenizer})
    towers.config.context = context
    if double:
        towers.double()
    if randomize:
        randomize_adapters(towers, seed)
    return towers


def randomize_adapters(towers: TwoTowers, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed + 1)
    for unit in towers.units.values():
        for name, tensor in unit.tensors().items():
            if not name.endswith("down") and name != "down_weight":
                std = 0.1 if name.endswith(("bias", "_up")) else 0.5
                tensor.detach().copy_(torch.randn(tensor.shape, generator=generator) * std)


def _build(vision_layers: int, language_layers: int, adapter: MoEConfig | LoRAConfig, seed: int, precision: str) -> TwoTowers:
    """Build once what many tests take copies of."""
    key = repr((vision_layers, language_layers, adapter, seed, precision))
    if key not in _built:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = ModelConfig(name=architecture(vision_layers, language_layers), pretrained="random", precision=precision)
            _built[key] = build_clip(model, adapter, seed)
    return _built[key]


_built: dict[str, TwoTowers] = {}


@functools.lru_cache
def architecture(vision_layers: int, language_layers: int) -> str:
    """Make the architecture known to open_clip and return its name."""
    name = f"tiny-{vision_layers}-{language_layers}"
    text = {"context_length": CONTEXT, "vocab_size": 49408, "width": WIDTH, "heads": 2, "layers": language_layers}
    vision = {"image_size": IMAGE_SIZE, "patch_size": 8, "layers": vision_layers, "width": WIDTH, "head_width": 16}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"{name}.json"
        path.write_text(json.dumps({"embed_dim": WIDTH, "vision_cfg": vision, "text_cfg": text}))
        open_clip.add_model_config(path)
    return name


def pictures(count: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 256, (count, 3, IMAGE_SIZE, IMAGE_SIZE), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def batch_of(count: int = 6, classes: int = len(NAMES), seed: int = 0) -> Batch:
    labels = torch.randint(0, classes, (count,), generator=torch.Generator().manual_seed(seed))
    return Batch(pictures(count, seed), labels, torch.arange(count), count, 0, [str(k) for k in range(count)])


def moe_by_loop(u: Tensor, values: Mapping[str, Tensor], config: MoEConfig, noise: Tensor | None, dropout_mask: Tensor | None) -> Tensor:
    """Return sum_e gate_e A_e(u) for u `[B, L, D]`, sample by sample and expert by expert, as concepts.md 1.1 and 1.2 write it."""
    rows = []
    for b, u_LD in enumerate(u):
        logits = u_LD[0] @ values["router"]
        if noise is not None:
            logits = logits + (torch.log(1 + torch.exp(u_LD[0] @ values["noise"])) + 0.01) * noise[b]
        best = sorted(range(config.experts), key=lambda e: -float(logits[e].detach()))[: config.top_k]
        total = sum(logits[e].exp() for e in best)
        y = torch.zeros_like(u_LD)
        for place, e in enumerate(sorted(best)):
            hidden = torch.clamp(u_LD @ values["down_weight"][e].T + values["down_bias"][e], min=0)
            if dropout_mask is not None:
                hidden = hidden * dropout_mask[b, :, place * config.bottleneck : (place + 1) * config.bottleneck] / (1 - config.dropout)
            y = y + logits[e].exp() / total * config.scale * (hidden @ values["up_weight"][e] + values["up_bias"][e])
        rows.append(y)
    return torch.stack(rows)


class WholeCLIP:
    """open_clip's CLIP with the weights of `tiny_clip(...)` and adapters on hooks: the twin that shares no code with the towers.

    Call it with values `{"vision.3/router": ...}`; text is always 77 tokens, everything is computed again at each call.
    """

    def __init__(self, adapter: Any = MOE, vision_layers: int = 4, language_layers: int = 3, seed: int = 0, double: bool = False):
        name = architecture(vision_layers, language_layers)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.clip = open_clip.create_model(name).eval().requires_grad_(False)
        if double:
            self.clip.double()
        self.adapter, self.tokenizer = adapter, open_clip.get_tokenizer(name)
        self.values: Mapping[str, Tensor] = {}
        self.noise: StepNoise | None = None
        self.training = True
        for branch, transformer in (("vision", self.clip.visual.transformer), ("language", self.clip.transformer)):
            for layer, block in enumerate(transformer.resblocks, start=1):
                block.register_forward_hook(functools.partial(self._add, branch, layer), with_kwargs=True)

    def _add(self, branch: str, layer: int, block: nn.Module, args: tuple, kwargs: dict, out: Tensor) -> Tensor:
        """Return x + Attn(LN1 x) + MLP(LN2 u) + MoE(u); `out` lacks the last term only."""
        prefix = f"{branch}.{layer}/"
        own = {name.removeprefix(prefix): value for name, value in self.values.items() if name.startswith(prefix)}
        if not own:
            return out
        u = args[0] + block.attention(block.ln_1(args[0]), attn_mask=kwargs.get("attn_mask"))
        if isinstance(self.adapter, LoRAConfig):
            return out + u @ own["mlp_down"].T @ own["mlp_up"].T * self.adapter.scale
        config, tokens = self.adapter, u.shape[1]
        router = dropout_mask = None
        if self.noise is not None and config.router_noise:
            router = self.noise.router(branch, layer, config.experts)
        if self.noise is not None and self.training and config.dropout > 0:
            dropout_mask = self.noise.dropout_mask(branch, layer, tokens, config.top_k * config.bottleneck, config.dropout)
        return out + moe_by_loop(u, own, config, router, dropout_mask)

    def features(self, branch: str, inputs: Any, values: Mapping[str, Tensor], noise: StepNoise | None = None) -> Tensor:
        """Return unit features of uint8 images `[B, 3, S, S]`, or of class names."""
        self.values, self.noise = values, noise
        if branch == "language":
            return F.normalize(self.clip.encode_text(self.tokenizer([f"a bad photo of a {name}." for name in inputs])), dim=-1)
        dtype = self.clip.logit_scale.dtype
        mean, std = (torch.tensor(self.clip.visual.preprocess_cfg[k]).view(3, 1, 1).to(dtype) for k in ("mean", "std"))
        return F.normalize(self.clip.encode_image(((inputs / 255).to(dtype) - mean) / std), dim=-1)

    def loss(self, values: Mapping[str, Tensor], batch: Batch, names: list[str], noise: StepNoise | None) -> Tensor:
        """Return the mean cross-entropy over the classes `names`."""
        image_BF = self.features("vision", batch.images, values, noise)
        text_CF = self.features("language", names, values, noise)
        logits_BC = self.clip.logit_scale.exp() * image_BF @ text_CF.T
        return -logits_BC.log_softmax(-1)[torch.arange(len(image_BF)), batch.labels].mean()


def merged_lora(whole: WholeCLIP, units: Mapping[Any, Unit], config: LoRAConfig) -> WholeCLIP:
    """Add up @ down * scale to open_clip's own projection weights: what LoRA on q, k, v means."""
    scale = config.scale if config.alpha is None else config.alpha / config.rank
    for id, unit in units.items():
        transformer = whole.clip.visual.transformer if id.branch == "vision" else whole.clip.transformer
        weight = transformer.resblocks[id.layer - 1].attn.in_proj_weight
        for target in config.targets:
            rows = slice("qkv".index(target) * WIDTH, ("qkv".index(target) + 1) * WIDTH)
            weight[rows] += unit.tensors()[f"{target}_up"].detach() @ unit.tensors()[f"{target}_down"].detach() * scale
    return whole


def adapter_values(towers: TwoTowers) -> dict[str, Tensor]:
    """Return a copy of every adapter tensor by name."""
    return {name: tensor.clone() for name, tensor in towers.units.state_dict().items()}
