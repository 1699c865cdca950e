"""The cost model: the fewest FLOPs that a step needs, and those of the naive step. docs/performance.md explains it.

One FLOP is an addition or a multiplication: a product of `[n, d]` and `[d, m]` has 2 n d m. The model counts matrix products and
convolutions. It leaves out what is linear in the activations: norms, GELU, softmax, noise.
"""

# n tokens, p positions that are read, d width, c columns of the adapter's bottleneck, B images, C classes

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch

from benchmarks.common import flops
from dist_vlcl.model.clip import TwoTowers
from dist_vlcl.model.lora import LoRAConfig
from dist_vlcl.model.moe import MoEConfig
from dist_vlcl.model.timm_tower import TimmStemAndHead
from dist_vlcl.model.units import BRANCHES, UnitId
from dist_vlcl.orders import Order
from dist_vlcl.zo.update import ZerothOrderConfig

CONTEXT = 77  # tokens of a prompt in the naive step


@dataclass(frozen=True)
class Block:
    """A transformer block with an adapter: keys and values at all tokens, output at the positions that are read."""

    tokens: int
    read: int
    width: int
    columns: int
    site: str  # of the adapter: mlp (beside the MLP) or attention (at the projections)
    mlp: int  # weights of the MLP

    @property
    def projections(self) -> int:
        """Keys and values of all tokens, queries of the positions that are read."""
        return 2 * (2 * self.tokens + self.read) * self.width**2

    @property
    def attention(self) -> int:
        """Similarities, and the weighted sum of values."""
        return 4 * self.read * self.tokens * self.width

    @property
    def rest(self) -> int:
        """Output projection and MLP."""
        return 2 * self.read * (self.width**2 + self.mlp)

    @property
    def adapter(self) -> int:
        """Down and up."""
        return 4 * (self.read if self.site == "mlp" else self.tokens) * self.width * self.columns

    @property
    def forward(self) -> int:
        return self.projections + self.attention + self.rest + self.adapter

    @property
    def forward_from_adapter(self) -> int:
        """The part of the block that depends on its adapter. The rest is cached."""
        return self.adapter + (self.attention + self.rest if self.site == "attention" else 0)

    def backward(self, learns: bool) -> int:
        """Gradient of the input: each product once, those of attention twice; and of the adapter's weights if it learns."""
        return self.projections + 2 * self.attention + self.rest + self.adapter * (2 if learns else 1)

    @property
    def backward_to_adapter(self) -> int:
        """The lowest block that learns: gradients of the adapter's two matrices and of its hidden units."""
        return self.adapter + self.adapter // 2 + (2 * self.attention + self.rest if self.site == "attention" else 0)


@dataclass(frozen=True)
class TowerShape:
    """The sizes that a tower's FLOPs depend on."""

    width: int
    depth: int
    tokens: int
    read: int
    columns: int
    site: str
    mlp: int
    embed: int  # FLOPs of the patch embedding of a sample
    features: int
    head: int = 0  # FLOPs of a sample in the head, beside a projection to the features

    @cached_property
    def blocks(self) -> list[Block]:
        inner = Block(self.tokens, self.tokens, self.width, self.columns, self.site, self.mlp)
        return [inner] * (self.depth - 1) + [replace(inner, read=self.read)]

    @property
    def project(self) -> int:
        return 2 * self.width * self.features + self.head

    @property
    def forward(self) -> int:
        return self.embed + sum(block.forward for block in self.blocks) + self.project

    def forward_from(self, layer: int) -> int:
        """One evaluation that restarts at the adapter of `layer` (from 1)."""
        return self.blocks[layer - 1].forward_from_adapter + sum(block.forward for block in self.blocks[layer:]) + self.project

    def delta_from(self, layers: set[int]) -> int:
        """Delta-forward's additional FLOPs: products whose two factors both change, of attention and of perturbed adapters, twice."""
        above = sum(block.attention for block in self.blocks[min(layers) :])
        lowest = self.blocks[min(layers) - 1]
        own = sum(self.blocks[layer - 1].adapter for layer in layers) - lowest.adapter // 2  # the lowest adapter's input does not change
        return above + own + (lowest.attention if self.site == "attention" else 0)

    def backward(self, learning: set[int]) -> int:
        """Back-propagate from the features to the lowest of the `learning` layers."""
        if not learning:
            return 0
        lowest = min(learning)
        above = sum(self.blocks[layer - 1].backward(layer in learning) for layer in range(lowest + 1, self.depth + 1))
        return self.project + above + self.blocks[lowest - 1].backward_to_adapter


def tower_shapes(towers: TwoTowers, prompt_tokens: int) -> dict[str, TowerShape]:
    """Return the shapes of a model's towers, for prompts of `prompt_tokens`."""
    visual = towers.vision.stem_and_head.visual
    ends = _timm_ends(towers) if isinstance(towers.vision.stem_and_head, TimmStemAndHead) else _open_clip_ends(visual)
    text = {"tokens": prompt_tokens, "read": 2, "embed": 0, "features": ends["features"]}
    result = {}
    for branch, sizes in (("vision", ends), ("language", text)):
        tower = towers.tower(branch)
        block, adapter = tower.block(1).block, tower.block(1).adapter
        config: MoEConfig | LoRAConfig = adapter.config
        result[branch] = TowerShape(
            width=(block.ln_1 if branch == "language" or hasattr(block, "ln_1") else block.norm1).weight.shape[0],
            depth=tower.depth,
            columns=config.rank * len(config.targets) if isinstance(config, LoRAConfig) else config.top_k * config.bottleneck,
            site=adapter.site,
            mlp=sum(p.numel() for p in block.mlp.parameters() if p.ndim == 2),
            **sizes,
        )
    return result


def _open_clip_ends(visual: Any) -> dict[str, int]:
    patches = len(visual.positional_embedding) - 1
    read = 1 if visual.pool_type == "tok" else patches + 1
    return {
        "tokens": patches + 1,
        "read": read,
        "embed": 2 * patches * visual.conv1.weight.numel(),
        "features": visual.proj.shape[1],
    }


def _timm_ends(towers: TwoTowers) -> dict[str, int]:
    """Count stem and head of timm, with one image. A model that pools its class token could do with that position of the last block."""
    stem, size = towers.vision.stem_and_head, towers.image_size
    image = torch.zeros(1, 3, size, size, dtype=torch.uint8, device=towers.logit_scale.device)
    hidden: list[torch.Tensor] = []
    with torch.no_grad():
        embed = flops(lambda: hidden.append(stem.embed(image)))
        head = flops(lambda: hidden.append(stem.pool(hidden[0])))
    features = hidden[1].shape[-1]
    read = 1 if stem.visual.trunk.global_pool == "token" else stem.tokens
    return {"tokens": stem.tokens, "read": read, "embed": embed, "features": features, "head": head - 2 * stem.width * features}


Shapes = Mapping[str, TowerShape]
Orders = Mapping[UnitId, Order]


def evaluations(config: ZerothOrderConfig, branch: str) -> int:
    """Return how many perturbed losses a branch needs beside the base loss (granularity branch)."""
    return config.probes_of(branch) * config.sides + (2 if config.acceptance == "best_of_three" else 0)


def naive_evaluations(config: ZerothOrderConfig) -> int:
    """Return the losses of the naive step: two a probe as MeZO, five for a conservative step as ZO-LLM."""
    return 2 * max(map(config.probes_of, BRANCHES)) + (3 if config.acceptance == "best_of_three" else 0)


def step_cost(
    shapes: Shapes, orders: Orders, config: ZerothOrderConfig, images: int, classes: int, delta_branches: Collection[str] = ()
) -> int:
    """Return the fewest FLOPs that one step needs: nothing is computed twice, and nothing that is not read.

    delta_branches: branches that are evaluated by delta-forward, which computes the base again in each phase.
    """
    samples = {"vision": images, "language": classes}
    zeroth, first = _layers(orders, Order.ZEROTH), _layers(orders, Order.FIRST)
    phases = 2 if config.acceptance == "best_of_three" else 1  # probes, then the two candidates
    logits = 2 * images * classes * shapes["vision"].features
    forward = logits + sum(samples[b] * shape.forward for b, shape in shapes.items())
    backward = sum((samples[b] * shape.backward(first[b]) + logits) for b, shape in shapes.items() if first[b])
    perturbed = 0
    for b, shape in shapes.items():
        if zeroth[b]:
            again = shape.forward_from(min(zeroth[b]))
            count = evaluations(config, b)
            beside = phases * again + count * shape.delta_from(zeroth[b]) if b in delta_branches else 0
            perturbed += samples[b] * (count * again + beside) + count * logits
    return forward + backward + perturbed


def naive_cost(shapes: Shapes, orders: Orders, config: ZerothOrderConfig, images: int, classes: int) -> int:
    """Return the FLOPs of the naive step: a first-order pass over the whole CLIP, then losses of the whole CLIP for zeroth order."""
    samples = {"vision": images, "language": classes}
    zeroth, first = _layers(orders, Order.ZEROTH), _layers(orders, Order.FIRST)
    tokens = {"vision": shapes["vision"].tokens, "language": CONTEXT}
    whole = {b: replace(shape, tokens=tokens[b], read=tokens[b]) for b, shape in shapes.items()}  # all positions of the last block
    logits = 2 * images * classes * shapes["vision"].features
    forward = logits + sum(samples[b] * shape.forward for b, shape in whole.items())
    backward = sum((samples[b] * shape.backward(first[b]) + logits) for b, shape in whole.items() if first[b])
    perturbed = naive_evaluations(config) * forward if any(zeroth.values()) else 0
    return (forward if any(first.values()) or not perturbed else 0) + backward + perturbed


def _layers(orders: Orders, order: Order) -> dict[str, set[int]]:
    return {branch: {unit.layer for unit, o in orders.items() if unit.branch == branch and o is order} for branch in BRANCHES}
