"""Every family of CLIP that open_clip has, tiny: its own configuration and classes, with few blocks and small widths."""

import copy
import functools
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import open_clip
import timm
import torch
from timm.models.vision_transformer_hybrid import ConvStem, _create_vision_transformer_hybrid
from timm.models.vitamin import VitCfg, VitConvCfg
from torch import Tensor

from dist_vlcl.model.clip import ModelConfig, TwoTowers, build_clip
from dist_vlcl.model.lora import LoRAConfig
from dist_vlcl.zo.noise import StepNoise
from tests.helpers.tiny_clip import MOE, WIDTH, moe_by_loop, randomize_adapters

VIT = {"depth": 3, "embed_dim": WIDTH, "num_heads": 2, "img_size": 32}
CONVOLUTIONS = VitCfg(
    embed_dim=(16, 16, WIDTH), depths=(1, 1, 1), stem_width=16, conv_cfg=VitConvCfg(norm_layer="layernorm2d"), head_type="1d"
)

# family: (an architecture of open_clip, what is smaller in its timm model)
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "siglip": ("ViT-B-16-SigLIP", VIT | {"patch_size": 8}),
    "siglip2": ("ViT-gopt-16-SigLIP2-256", VIT | {"patch_size": 8}),
    "eva01": ("EVA01-g-14", VIT | {"patch_size": 8}),
    "eva02": ("EVA02-B-16", VIT | {"patch_size": 8}),
    "eva02_post_norm": ("EVA02-E-14", VIT | {"patch_size": 8}),
    "pe_core": ("PE-Core-T-16-384", VIT | {"patch_size": 8}),
    "vitamin": ("ViTamin-S", VIT | {"embed_cfg": CONVOLUTIONS}),
    "mobileclip": ("MobileCLIP-B", VIT),
    "mobileclip2": ("MobileCLIP2-L-14", VIT | {"patch_size": 8}),
    "vit_medium": ("vit_medium_patch16_gap_256", VIT | {"patch_size": 8, "init_values": 0.5}),
    "vit_relpos": ("vit_relpos_medium_patch16_cls_224", VIT | {"patch_size": 8, "init_values": 0.5}),
    "clipa": ("ViT-L-14-CLIPA", {}),
    "metaclip2": ("ViT-L-14-worldwide", {}),
    "coca": ("coca_ViT-B-32", {}),
}
TIMM = [family for family, (_, smaller) in FAMILIES.items() if smaller]


@functools.cache
def architecture(family: str) -> str:
    """Make the tiny architecture known to open_clip and return its name."""
    real, smaller = FAMILIES[family]
    name = f"tiny-{family.replace('siglip', 'sigmoid')}"  # open_clip takes another tokenizer for names with siglip
    config = open_clip.get_model_config(real)
    text, vision = config["text_cfg"], config["vision_cfg"]
    config["embed_dim"] = WIDTH
    text |= {"width": WIDTH, "heads": 2, "layers": 2, "vocab_size": 49408, "eos_id": 49407}
    if family == "metaclip2":
        text["eos_id"] = 269  # the full stop: the end that pooling looks for is another than the largest token
    text.pop("hf_tokenizer_name", None)  # the tokenizer of open_clip instead, which needs no download
    text.pop("tokenizer_kwargs", None)
    vision["image_size"] = 32
    if smaller:
        vision["timm_model_name"] = _tiny(vision["timm_model_name"], smaller)
    else:
        vision |= {"layers": 3, "width": WIDTH, "head_width": 16, "patch_size": 8}
    if "multimodal_cfg" in config:
        config["multimodal_cfg"] |= {"width": WIDTH, "heads": 2, "layers": 1}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"{name}.json"
        path.write_text(json.dumps(config))
        open_clip.add_model_config(path)
    return name


def _tiny(name: str, smaller: dict[str, Any]) -> str:
    """Make a smaller model known to timm and return its name."""

    def model(pretrained: bool = False, **options: Any) -> Any:
        if name == "vit_base_mci_224":
            stem = ConvStem(channels=(8, 8, WIDTH), stride=(4, 2, 2), kernel_size=(4, 2, 2), padding=0, act_layer=torch.nn.GELU)
            options |= {"backbone": stem, "embed_args": {"proj": False}, "no_embed_class": True}
            trunk = _create_vision_transformer_hybrid(name, **smaller, **options)
        else:
            trunk = timm.create_model(name, **smaller, **options)
        with torch.no_grad():
            for parameter in trunk.blocks.parameters():
                if parameter.ndim == 1:  # biases are zero otherwise, and scales one
                    parameter.add_(torch.randn_like(parameter) * 0.2)
        return trunk

    model.__name__ = f"tiny_{name}"
    timm.models.register_model(model)
    return model.__name__


def tiny(
    family: str, adapter: Any = MOE, randomize: bool = True, double: bool = False, precision: str = "fp32", loss: str = "cross_entropy"
) -> TwoTowers:
    """Return towers whose weights are a function of the family; randomised adapters act, and have gradients."""
    key = repr((family, adapter, precision, loss))
    if key not in _built:
        model = ModelConfig(name=architecture(family), pretrained="random", precision=precision, loss=loss)
        _built[key] = build_clip(model, adapter)
    towers = _built[key].copy()
    if double:
        towers.double()
    if randomize:
        randomize_adapters(towers)
    return towers


_built: dict[str, TwoTowers] = {}


@functools.cache
def _library_model(family: str) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return open_clip.create_model(architecture(family)).eval().requires_grad_(False)


def images_of(towers: TwoTowers, count: int, seed: int = 0) -> Tensor:
    size = (count, 3, towers.image_size, towers.image_size)
    return torch.randint(0, 256, size, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


class LibraryCLIP:
    """open_clip's own model with the weights of `tiny(family)` and adapters on hooks: the twin that shares no code with the towers.

    Experts are hung on every block. LoRA is added to the weights of the projections.
    """

    def __init__(self, family: str, adapter: Any = MOE, double: bool = False):
        self.clip = copy.deepcopy(_library_model(family))
        if double:
            self.clip.double()
        self.adapter, self.tokenizer = adapter, open_clip.get_tokenizer(architecture(family))
        self.values: Mapping[str, Tensor] = {}
        self.noise: StepNoise | None = None
        visual, text = self.clip.visual, getattr(self.clip, "text", self.clip)
        self.blocks = {"vision": visual.trunk.blocks if hasattr(visual, "trunk") else visual.transformer.resblocks}
        self.blocks["language"] = text.transformer.resblocks
        for branch, blocks in self.blocks.items():
            for layer, block in enumerate(blocks, start=1):
                block.register_forward_hook(functools.partial(self._add, branch, layer), with_kwargs=True)

    def features(self, branch: str, inputs: Any, values: Mapping[str, Tensor], noise: StepNoise | None = None) -> Tensor:
        """Return unit features of uint8 images, or of class names, from the library's own function."""
        if values and isinstance(self.adapter, LoRAConfig) and self.adapter.targets != ["mlp"]:
            return self._merged(values).features(branch, inputs, {}, noise)
        self.values, self.noise = values, noise
        if branch == "language":
            return self.clip.encode_text(self.tokenizer([f"a bad photo of a {name}." for name in inputs]), normalize=True)
        config, dtype = self.clip.visual.preprocess_cfg, self.clip.logit_scale.dtype
        mean, std = (torch.tensor(config[k]).view(3, 1, 1).to(dtype) for k in ("mean", "std"))
        return self.clip.encode_image((inputs.float() / 255 - mean) / std, normalize=True)

    def _add(self, branch: str, layer: int, block: Any, inputs: tuple, options: dict, out: Tensor) -> Tensor:
        prefix = f"{branch}.{layer}/"
        own = {name.removeprefix(prefix): value for name, value in self.values.items() if name.startswith(prefix)}
        if not own:
            return out
        u = inputs[0] + self._attention(block, inputs[0], options)
        if isinstance(self.adapter, LoRAConfig):
            return out + u @ own["mlp_down"].T @ own["mlp_up"].T * self.adapter.scale
        config, router, dropout_mask = self.adapter, None, None
        if self.noise is not None:
            router = self.noise.router(branch, layer, config.experts)
            dropout_mask = self.noise.dropout_mask(branch, layer, u.shape[1], config.top_k * config.bottleneck, config.dropout)
        return out + moe_by_loop(u, own, config, router, dropout_mask)

    def _attention(self, block: Any, x: Tensor, options: dict) -> Tensor:
        """Return what a block adds to its input before its MLP."""
        kind = type(block).__name__
        if kind == "ResidualAttentionBlock":
            return block.ls_1(block.attention(block.ln_1(x), attn_mask=options.get("attn_mask")))
        if kind == "EvaBlockPostNorm":
            return block.norm1(block.attn(x, **options))
        y = block.attn(block.norm1(x), **options)
        if kind == "EvaBlock":
            return y if block.gamma_1 is None else block.gamma_1 * y
        return block.ls1(y)

    def _merged(self, values: Mapping[str, Tensor]) -> "LibraryCLIP":
        """Return a copy with LoRA in the weights of its projections."""
        merged = copy.deepcopy(self, {id(self.tokenizer): self.tokenizer})
        for name in [name for name in values if name.endswith("_down")]:
            place, target = name.removesuffix("_down").split("/")
            branch, layer = place.split(".")
            attention = merged.blocks[branch][int(layer) - 1].attn
            separate = getattr(attention, f"{target}_proj", None)
            fused = attention.in_proj_weight if hasattr(attention, "in_proj_weight") else attention.qkv and attention.qkv.weight
            weight = fused if separate is None else separate.weight
            rows = slice(None) if separate is not None else slice("qkv".index(target) * WIDTH, ("qkv".index(target) + 1) * WIDTH)
            weight[rows] += values[f"{place}/{target}_up"] @ values[name] * self.adapter.scale
        return merged
