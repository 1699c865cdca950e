"""Every family of CLIP that open_clip has, tiny: its own configuration and classes, with few blocks and small widths."""

import functools
import json
import tempfile
from pathlib import Path
from typing import Any

import open_clip
import timm
import torch
from timm.models.vision_transformer_hybrid import ConvStem, _create_vision_transformer_hybrid
from timm.models.vitamin import VitCfg, VitConvCfg
from torch import Tensor

from dist_vlcl.model.clip import ModelConfig, TwoTowers, build_clip
from tests.helpers.tiny_clip import CONTEXT, MOE, WIDTH, randomize_adapters

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
    "vit_medium": ("vit_medium_patch16_gap_256", VIT | {"patch_size": 8}),
    "vit_relpos": ("vit_relpos_medium_patch16_cls_224", VIT | {"patch_size": 8}),
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
        if name != "vit_base_mci_224":
            return timm.create_model(name, **smaller, **options)
        stem = ConvStem(channels=(8, 8, WIDTH), stride=(4, 2, 2), kernel_size=(4, 2, 2), padding=0, act_layer=torch.nn.GELU)
        return _create_vision_transformer_hybrid(name, backbone=stem, embed_args={"proj": False}, no_embed_class=True, **smaller, **options)

    model.__name__ = f"tiny_{name}"
    timm.models.register_model(model)
    return model.__name__


def tiny(
    family: str, adapter: Any = MOE, randomize: bool = True, double: bool = False, precision: str = "fp32", **options: Any
) -> TwoTowers:
    towers = build_clip(ModelConfig(name=architecture(family), pretrained="random", precision=precision, **options), adapter)
    if double:
        towers.double()
    if randomize:
        randomize_adapters(towers)
    return towers


def library_model(family: str, double: bool = False) -> Any:
    """Return open_clip's own model with the same weights."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        clip = open_clip.create_model(architecture(family)).eval().requires_grad_(False)
    return clip.double() if double else clip


def normalized(clip: Any, images: Tensor) -> Tensor:
    mean, std = (torch.tensor(clip.visual.preprocess_cfg[k]).view(3, 1, 1) for k in ("mean", "std"))
    return ((images.float() / 255 - mean) / std).to(clip.logit_scale.dtype)


def images_of(towers: TwoTowers, count: int, seed: int = 0) -> Tensor:
    size = (count, 3, towers.image_size, towers.image_size)
    return torch.randint(0, 256, size, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


__all__ = ["CONTEXT", "FAMILIES", "TIMM", "images_of", "library_model", "normalized", "tiny"]
