"""CLIP from open_clip as two towers with adapters. Only this module imports open_clip."""

# B images, C classes, L tokens, D width, F features

import copy
import difflib
import functools
import importlib.util
import logging
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dist_vlcl.masking import explained
from dist_vlcl.model.activation import QuickGELU
from dist_vlcl.model.graphs import Graphs
from dist_vlcl.model.lora import LoRAConfig
from dist_vlcl.model.timm_tower import MLP_INPUT, TimmStemAndHead, WholeBlock
from dist_vlcl.model.tower import AdaptedBlock, ImageStemAndHead, Tower
from dist_vlcl.model.units import UnitId, Units
from dist_vlcl.options import option

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}
CONTEXTS, LOSSES = ("truncated", "full"), ("cross_entropy", "sigmoid")
SMALL = Path(__file__).parent / "small"


@dataclass
class ModelConfig:
    """Which CLIP model is adapted, and how it computes."""

    name: str = option("small_clip", "An architecture of open_clip (docs/models.md), or small_clip, which is part of dist_vlcl.")
    pretrained: str = option("shipped", "Its weights: a tag of open_clip such as openai, a file, random, or shipped (only for small_clip).")
    prompt: str = option("a bad photo of a {}.", "Text prompt of a class; {} is replaced by the class name.")
    context: str = option("truncated", "Text tokens: up to the longest prompt, or all 77; the features are equal.", choices=CONTEXTS)
    precision: str = option("fp32", "Precision of the vision blocks; bf16 needs half the memory.", choices=tuple(PRECISIONS))
    loss: str = option("cross_entropy", "Loss: cross_entropy over the classes of a task, or sigmoid as for SigLIP.", choices=LOSSES)
    graphs: bool = option(True, "Launch the kernels of a tower together, as CUDA graphs; only on a GPU under DDP.")
    checkpoint: bool = option(False, "Compute each block again in the backward pass: less memory, a third slower.")

    def check(self) -> None:
        if "{}" not in self.prompt:
            raise ValueError(f"model.prompt={self.prompt!r}: must contain {{}} where the class name goes")
        if self.pretrained == "shipped" and self.name != "small_clip":
            raise ValueError("model.pretrained=shipped: dist_vlcl has weights for model.name=small_clip only; give a tag or a file")


class AdapterConfig(Protocol):
    """The configuration of adapters: MoEConfig, LoRAConfig, or a user's own dataclass (docs/extending.md)."""

    label: str  # in the names of runs

    def make(self, width: int, generator: torch.Generator) -> nn.Module: ...


class VisionStemAndHead(ImageStemAndHead):
    """What comes before and after the vision blocks of open_clip's ViT: patches and class token, pooling and projection."""

    def __init__(self, visual: Any):
        super().__init__(visual)
        visual.conv1 = PatchProjection(visual.conv1)
        self.tokens = len(visual.positional_embedding)

    def embed(self, images: Tensor) -> Tensor:
        """Return the embedded class token and patches `[B, L, D]` of uint8 images `[B, 3, S, S]`."""
        # open_clip has no public function for the stem alone
        return self.visual._embeds(self.normalized(images))

    def reads(self, images: Tensor) -> Tensor | None:
        """Return the position of the class token `[B, 1]`, or None for a model that pools from all positions."""
        if self.visual.attn_pool is not None or self.visual.pool_type != "tok":
            return None
        return torch.zeros(len(images), 1, dtype=torch.long, device=images.device)

    def pool(self, hidden: Tensor) -> Tensor:
        """Return features `[B, F]` of the last block's output."""
        # open_clip has no public function for the pooling alone
        pooled = self.visual._pool(hidden)[0]
        return pooled if self.visual.proj is None else pooled @ self.visual.proj


class PatchProjection(nn.Module):
    """The convolution that projects the patches of an image. On a GPU it is a matrix product, which is faster there."""

    def __init__(self, convolution: nn.Conv2d):
        super().__init__()
        self.weight, self.side = convolution.weight, convolution.stride[0]

    def forward(self, images: Tensor) -> Tensor:
        """Return `[B, D, S / side, S / side]` for images `[B, 3, S, S]`."""
        if not images.is_cuda:
            return F.conv2d(images, self.weight, stride=self.side)
        rows, columns = (length // self.side for length in images.shape[-2:])
        grid = images.unflatten(3, (columns, self.side)).unflatten(2, (rows, self.side))  # [B, 3, rows, side, columns, side]
        patches = grid.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
        return F.linear(patches, self.weight.flatten(1)).mT.unflatten(2, (rows, columns))


class TextStemAndHead(nn.Module):
    """What comes before and after the language blocks: token embedding, and projection of the state at one position."""

    def __init__(self, clip: Any):
        super().__init__()
        self.clip: Any = clip
        self.has_class_token = getattr(self.text, "cls_emb", None) is not None

    @property
    def text(self) -> Any:
        """Return the module of the text tower. In open_clip's class CLIP that is the whole model."""
        return getattr(self.clip, "text", self.clip)

    def embed(self, tokens: Tensor) -> Tensor:
        """Return the embedding of tokens `[C, T]`, `[C, L, D]`. CoCa appends a class token: L = T + 1."""
        x = self.text.token_embedding(tokens)
        if self.has_class_token:
            x = torch.cat([x, self.text.cls_emb.expand(len(x), 1, -1)], 1)
        return x + self.text.positional_embedding[: x.shape[1]]

    def length(self, tokens: Tensor) -> int:
        """Return L."""
        return tokens.shape[1] + self.has_class_token

    def reads(self, tokens: Tensor) -> Tensor:
        """Return the first position and the pooled one `[C, 2]`. The router looks at the first."""
        from open_clip.transformer import text_global_pool

        positions_CL = torch.arange(self.length(tokens), device=tokens.device).expand(len(tokens), -1)
        owner, prefix = (self.clip.text, "") if hasattr(self.clip, "text") else (self.clip, "text_")
        pool_type, end_of_text = (getattr(owner, f"{prefix}{name}") for name in ("pool_type", "eos_id"))
        pooled_C = text_global_pool(positions_CL, tokens, "last" if self.has_class_token else pool_type, end_of_text)
        return torch.stack([torch.zeros_like(pooled_C), pooled_C], 1)

    def visible(self, tokens: Tensor) -> Tensor | None:
        """Return which positions each position sees `[C, L, L]`: CoCa's class token does not see the padding. None: see `causal`."""
        if not self.has_class_token:
            return None
        # open_clip has no public function for this mask
        return self.text._build_additive_mask(tokens, self.length(tokens), torch.float32)[:: self.text.heads] + self.text.attn_mask == 0

    def forward(self, tokens: Tensor, hidden: Tensor | None = None) -> Tensor:
        return self.embed(tokens) if hidden is None else self.pool(hidden)

    def pool(self, hidden: Tensor) -> Tensor:
        """Return features `[C, F]` of the last block's output."""
        last_CD = self.text.ln_final(hidden[:, -1])
        projection = self.text.text_projection
        if projection is None:
            return last_CD
        return projection(last_CD) if isinstance(projection, nn.Module) else last_CD @ projection


class TwoTowers(nn.Module):
    """CLIP as a vision and a language tower that meet only in the logits."""

    def __init__(self, vision: Tower, language: Tower, tokenizer: Any, config: ModelConfig, preprocessing: Mapping[str, Any]):
        super().__init__()
        self.vision, self.language = vision, language
        self.tokenizer, self.config = tokenizer, config
        size = preprocessing["size"]
        self.image_size: int = size[0] if isinstance(size, tuple | list) else size
        self.resizing: tuple[str, str] = preprocessing["resize_mode"], preprocessing["interpolation"]  # of test images
        self.units = Units([block.unit for tower in (vision, language) for block in tower])

    def frozen_weights(self) -> dict[str, Tensor]:
        """Return CLIP's own tensors by name."""
        return {name: tensor for name, tensor in self.state_dict().items() if ".adapter." not in name}

    def zero3_modules(self) -> list[nn.Module]:
        """Return the modules that ZeRO-3 gathers one at a time. Each parameter is read inside the call of one of them."""
        return [module for tower in (self.vision, self.language) for module in (tower.stem_and_head, *tower)]

    def record(self) -> None:
        """Replay CUDA graphs from now on. The model must be on a GPU and not sharded."""
        self.vision.graphs, self.language.graphs = Graphs(), Graphs()

    def copy(self) -> "TwoTowers":
        """Return a copy of the model with its own tensors, without graphs."""
        return copy.deepcopy(self, {id(self.tokenizer): self.tokenizer})

    def tower(self, branch: str) -> Tower:
        return self.vision if branch == "vision" else self.language

    @property
    def logit_scale(self) -> Tensor:
        """Return the factor of the cosine similarities, ()."""
        return self.language.stem_and_head.clip.logit_scale.exp()

    def logits(self, image_BF: Tensor, text_CF: Tensor) -> Tensor:
        """Return the logits `[B, C]` of unit features. SigLIP's bias counts for the sigmoid loss only: it changes no softmax."""
        logits_BC = self.logit_scale * image_BF @ text_CF.T
        bias = self.language.stem_and_head.clip.logit_bias if self.config.loss == "sigmoid" else None
        return logits_BC if bias is None else logits_BC + bias

    def prompts(self, names: Sequence[str], multiple: int = 1) -> Tensor:
        """Return the tokens `[C, L]` of one prompt per class name. L is the longest length, rounded up to a multiple of `multiple`.

        Truncation changes no feature, because a causal tower does not read beyond the pooled position. CoCa pools at the end, and towers
        without a causal mask read all tokens, so they keep them.
        """
        tokens = self.tokenizer([self.config.prompt.replace("{}", name) for name in names])
        if self.config.context == "full" or not self.language.block(1).causal:
            return tokens
        longest = min(int(self.language.stem_and_head.reads(tokens).max()) + 1, tokens.shape[1])
        return tokens[:, : -(-longest // multiple) * multiple]

    def forward(self, inputs: dict[str, Tensor], noise: Any = None, cache_layers: Mapping[str, Sequence[int]] = {}) -> dict[str, tuple]:
        """Return (unit features `[1, B, F]`, cached inputs of the blocks `cache_layers[branch]` by layer) per branch.

        This is the base evaluation of a step.

        inputs: uint8 images `[B, 3, S, S]` under `vision`, tokens `[C, L]` under `language`.
        """
        runs = ((branch, self.tower(branch), x) for branch, x in inputs.items())
        return {branch: tower.run(tower.embed(x), x, noise=noise, cache_layers=cache_layers.get(branch, ())) for branch, tower, x in runs}

    @torch.no_grad()
    def features(self, branch: str, inputs: Tensor, noise: Any = None) -> Tensor:
        """Return unit features `[B, F]` for evaluation: without dropout, and with router noise only if `adapter.noise_at_eval` is set."""
        tower = self.tower(branch)
        return tower.run(tower.embed(inputs), inputs, noise=noise, training=False)[0][0]


def build_clip(model: ModelConfig, adapter: AdapterConfig, seed: int = 0) -> TwoTowers:
    """Return CLIP with new adapters in every block of both towers. Everything but the adapters is frozen.

    Raises ValueError if a tower has no transformer blocks that we know, RuntimeError if the weights cannot be loaded.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # the same random weights on every rank
        clip, tokenizer = _load(model)
    clip.eval().float().requires_grad_(False)
    for name in ("logit_scale", "logit_bias"):
        # Buffers, because ZeRO-3 shards parameters, and these are read outside a module's call. Only SigLIP has a bias.
        value = getattr(clip, name, None)
        delattr(clip, name)
        clip.register_buffer(name, None if value is None else value.detach())
    clip.text_decoder = None  # CoCa's captions
    generator = torch.Generator().manual_seed(seed)

    def adapted(branch: str, transformer: Any, causal: bool) -> list[AdaptedBlock]:
        blocks, transformer.resblocks = transformer.resblocks, nn.ModuleList()  # so that each parameter has one name
        if odd := {type(block).__name__ for block in blocks} - {"ResidualAttentionBlock"}:
            raise _without_blocks(model.name, branch, f"open_clip's {odd.pop()}")
        return [AdaptedBlock(b, adapter.make(b.attn.embed_dim, generator), UnitId(branch, k), causal) for k, b in enumerate(blocks, 1)]

    _replace_activations(clip)
    visual, precision = clip.visual, PRECISIONS[model.precision]
    del clip.visual
    # Language stays fp32. It is a fortieth of the work, and the rounding of its features would be a fifth of a vision slope (docs/LOG.md).
    if hasattr(visual, "trunk"):
        stem: Any = TimmStemAndHead(visual)
        blocks: list[AdaptedBlock] = [
            WholeBlock(block.to(precision), adapter.make(stem.width, generator), UnitId("vision", layer), constants)
            for layer, (block, constants) in enumerate(stem.take_blocks(), start=1)
        ]
    else:
        blocks, stem = adapted("vision", visual.transformer.to(precision), causal=False), VisionStemAndHead(visual)
    text = TextStemAndHead(clip)
    language = Tower("language", adapted("language", text.text.transformer, text.text.attn_mask is not None), text, model.checkpoint)
    return TwoTowers(Tower("vision", blocks, stem, model.checkpoint), language, tokenizer, model, visual.preprocess_cfg)


def merge_lora(model: ModelConfig, lora: LoRAConfig, adapters: Mapping[str, Tensor], seed: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Merge LoRA on attention into the weights of open_clip's own CLIP. Return them and their configuration for open_clip.

    adapters: tensors under the names of Units.state_dict. seed: of the run's weights if they are random. Raises ValueError for other
    adapters: these compute something that CLIP's own weights cannot.
    """
    import open_clip

    if not isinstance(lora, LoRAConfig) or "mlp" in lora.targets:
        raise ValueError("these adapters lie beside the MLP and cannot be merged; only adapter=lora can. Use --to adapters")
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        clip = _load(model)[0].float()
        for name in (name for name in adapters if name.endswith("_up")):
            unit, _, target = name.removesuffix("_up").partition("/")
            weight = _projection(clip, UnitId.parse(unit), target)
            weight += adapters[name] @ adapters[name.replace("_up", "_down")] * lora.factor
    preprocessing = {key: clip.visual.preprocess_cfg[key] for key in ("mean", "std", "interpolation", "resize_mode")}
    return clip.state_dict(), {"model_cfg": open_clip.get_model_config(model.name), "preprocess_cfg": preprocessing}


def _projection(clip: Any, unit: UnitId, target: str) -> Tensor:
    """Return the weights that project the input of a block's attention to its target q, k or v, `[D, D]`."""
    tower = clip.visual if unit.branch == "vision" else getattr(clip, "text", clip)
    attention = (tower.trunk.blocks if hasattr(tower, "trunk") else tower.transformer.resblocks)[unit.layer - 1].attn
    if (separate := getattr(attention, f"{target}_proj", None)) is not None:  # some of timm's
        return separate.weight
    fused = attention.in_proj_weight if isinstance(attention, nn.MultiheadAttention) else attention.qkv.weight
    return fused.chunk(3)["qkv".index(target)]


def unit_ids(model: ModelConfig) -> list[UnitId]:
    """Return the units of a model without building it. Raises ValueError for a model that is unknown, or cannot be adapted here."""
    depths = tower_depths(model.name)
    if needs_transformers(model.name) and importlib.util.find_spec("transformers") is None:
        raise ValueError(f"model.name={model.name!r}: its tokenizer needs the package transformers: pip install 'dist-vlcl[transformers]'")
    return [UnitId(branch, layer) for branch, depth in depths.items() for layer in range(1, depth + 1)]


def tower_depths(name: str) -> dict[str, int]:
    """Return the number of blocks of the language and the vision tower of an architecture.

    Raises ValueError with the reason if the architecture is unknown or has other blocks.
    """
    import open_clip

    open_clip.add_model_config(SMALL / "small_clip.json")
    if name not in open_clip.list_models():
        near = difflib.get_close_matches(name, open_clip.list_models(), 3)
        raise ValueError(f"model.name={name!r}: open_clip has no such architecture{'; did you mean ' + ', '.join(near) if near else ''}?")
    config = open_clip.get_model_config(name)
    text, vision = config["text_cfg"], config["vision_cfg"]
    if text.get("hf_model_name"):
        raise _without_blocks(name, "language", f"{text['hf_model_name']} of the package transformers")
    depth = vision.get("layers", 12)
    if trunk := vision.get("timm_model_name"):
        kind, depth, blocks = _timm_blocks(trunk)
        if not blocks or blocks - MLP_INPUT.keys():
            raise _without_blocks(name, "vision", f"timm's {kind}")
    elif not isinstance(depth, int):
        raise _without_blocks(name, "vision", "a ResNet")
    return {"language": text.get("layers", 12), "vision": depth}


def needs_transformers(name: str) -> bool:
    """Return whether the tokenizer of an architecture comes from the package transformers."""
    import open_clip

    return bool(open_clip.get_model_config(name)["text_cfg"].get("hf_tokenizer_name"))


@functools.cache
def _timm_blocks(name: str) -> tuple[str, int, set[str]]:
    """Return the class of a model of timm, and the number and the classes of its blocks. It is built without memory."""
    import timm

    with torch.device("meta"):
        trunk = timm.create_model(name)
    blocks = getattr(trunk, "blocks", ())
    return type(trunk).__name__, len(blocks), {type(block).__name__ for block in blocks}


def _load(model: ModelConfig) -> tuple[Any, Any]:
    """Return open_clip's model and tokenizer. Raises RuntimeError that says how to get the weights."""
    import open_clip

    unit_ids(model)  # raises for an unknown architecture
    needs_quick = open_clip.get_pretrained_cfg(model.name, model.pretrained).get("quick_gelu")
    if needs_quick and not (open_clip.get_model_config(model.name) or {}).get("quick_gelu"):
        raise ValueError(f"model.name={model.name!r}: the weights {model.pretrained} need QuickGELU; use model.name={model.name}-quickgelu")
    source = {"shipped": str(SMALL / "small_clip.safetensors"), "random": None}.get(model.pretrained, model.pretrained)
    what = f"model.pretrained={model.pretrained!r}: could not load the weights or the tokenizer of {model.name}"
    logging.disable(logging.ERROR)  # open_clip logs errors on the root logger; users get one line from us instead
    try:
        with explained(what, _how_to_get_weights(model), Exception, RuntimeError), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            clip = open_clip.create_model(model.name, pretrained=source, require_pretrained=source is not None)
            return clip, open_clip.get_tokenizer(model.name)
    finally:
        logging.disable(logging.NOTSET)


def _how_to_get_weights(model: ModelConfig) -> str:
    import open_clip

    tags = open_clip.list_pretrained_tags_by_model(model.name)
    advice = f"open_clip has {'weights of it as ' + ', '.join(tags) if tags else 'no weights of it'}"
    if model.pretrained in tags:
        command = f"import open_clip; open_clip.create_model('{model.name}', pretrained='{model.pretrained}')"
        advice = f'run python -c "{command}" on a machine with internet, and copy its Hugging Face cache to this machine'
    return f"{advice}; or give a safetensors file: model.pretrained=/path/to/weights.safetensors"


def _replace_activations(clip: nn.Module) -> None:
    """Replace open_clip's QuickGELU by ours, which keeps half as much for the backward pass. open_clip has no option for this."""
    from open_clip.transformer import QuickGELU as OpenClipQuickGELU

    for module in list(clip.modules()):
        for name, child in module.named_children():
            if isinstance(child, OpenClipQuickGELU):
                setattr(module, name, QuickGELU())


# A model that works for those that do not, by the beginning of the name
NEAR = {"MobileCLIP2": "MobileCLIP2-B", "MobileCLIP": "MobileCLIP-B", "coca": "coca_ViT-B-32", "roberta": "ViT-B-32"}
NEAR |= dict.fromkeys(("nllb", "mt5", "xlm"), "ViT-B-16-SigLIP-i18n-256")


def _without_blocks(name: str, branch: str, kind: str) -> ValueError:
    near = next((model for start, model in NEAR.items() if name.startswith(start)), "ViT-B-16-quickgelu")
    reason = f"its {branch} tower is {kind}, and adapters need transformer blocks of open_clip or timm"
    return ValueError(f"model.name={name!r}: {reason}; use a model such as {near}")
