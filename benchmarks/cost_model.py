"""The cost model: the fewest FLOPs that a step needs, and those of the naive step. docs/performance.md explains it.

One FLOP is an addition or a multiplication: a product of `[n, d]` and `[d, m]` has 2 n d m. The model counts matrix products and
convolutions. It leaves out what is linear in the activations: norms, GELU, softmax, noise.
"""

# n tokens, p positions that are read, d width, c columns of the adapter's bottleneck, B images, C classes

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import torch

from benchmarks.common import flops
from dist_vlcl.model.clip import TwoTowers
from dist_vlcl.model.lora import LoRAConfig
from dist_vlcl.model.moe import MoEConfig
from dist_vlcl.model.timm_tower import TimmStemAndHead
from dist_vlcl.model.tower import Tower
from dist_vlcl.model.units import UnitId
from dist_vlcl.options import BRANCHES
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

    block: Block  # all but the last
    read: int  # positions of the last block
    depth: int
    embed: int  # FLOPs of the patch embedding of a sample
    features: int
    head: int  # FLOPs of a sample from the last block's output to the features

    @cached_property
    def blocks(self) -> list[Block]:
        return [self.block] * (self.depth - 1) + [replace(self.block, read=self.read)]

    @property
    def forward(self) -> int:
        return self.embed + sum(block.forward for block in self.blocks) + self.head

    def forward_from(self, layer: int) -> int:
        """One evaluation that restarts at the adapter of `layer` (from 1)."""
        return self.blocks[layer - 1].forward_from_adapter + sum(block.forward for block in self.blocks[layer:]) + self.head

    def delta_from(self, layers: set[int]) -> int:
        """Delta-forward's additional FLOPs: products whose two factors both change, of attention and of perturbed adapters, twice."""
        above = sum(block.attention for block in self.blocks[min(layers) :])
        lowest = self.blocks[min(layers) - 1]
        own = sum(self.blocks[layer - 1].adapter for layer in layers) - lowest.adapter // 2  # the lowest adapter's input does not change
        return above + own + (lowest.attention if self.block.site == "attention" else 0)

    def backward(self, learning: set[int]) -> int:
        """Back-propagate from the features to the lowest of the `learning` layers."""
        lowest = min(learning)
        above = sum(self.blocks[layer - 1].backward(layer in learning) for layer in range(lowest + 1, self.depth + 1))
        return self.head + above + self.blocks[lowest - 1].backward_to_adapter


def tower_shapes(towers: TwoTowers, prompt_tokens: int) -> dict[str, TowerShape]:
    """Return the shapes of a model's towers, for prompts of `prompt_tokens`."""
    device = towers.logit_scale.device
    image = torch.zeros(1, 3, towers.image_size, towers.image_size, dtype=torch.uint8, device=device)
    inputs = {"vision": image, "language": torch.zeros(1, prompt_tokens, dtype=torch.long, device=device)}
    return {branch: _tower_shape(towers.tower(branch), sample) for branch, sample in inputs.items()}


@torch.no_grad()
def _tower_shape(tower: Tower, sample: torch.Tensor) -> TowerShape:
    """Return the shape of a tower. FLOPs of its stem and head are counted with one sample."""
    stem, adapter = tower.stem_and_head, tower.block(1).adapter
    results: list[torch.Tensor] = []
    embed = flops(lambda: results.append(stem.embed(sample)))
    tokens, width = results[0].shape[1:]
    reads = stem.reads(sample)
    read = tokens if reads is None else reads.shape[1]
    head = flops(lambda: results.append(stem.pool(results[0][:, :read])))
    if isinstance(stem, TimmStemAndHead) and stem.visual.trunk.global_pool == "token":
        read = 1  # timm's blocks compute all positions, but the model would need only the class token of the last one
    config: MoEConfig | LoRAConfig = adapter.config
    columns = config.rank * len(config.targets) if isinstance(config, LoRAConfig) else config.top_k * config.bottleneck
    mlp = sum(p.numel() for p in tower.block(1).block.mlp.parameters() if p.ndim == 2)
    block = Block(tokens, tokens, width, columns, adapter.site, mlp)
    return TowerShape(block, read, tower.depth, embed, results[1].shape[-1], head)


Shapes = Mapping[str, TowerShape]
Orders = Mapping[UnitId, Order]


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
        count = config.probes_of(b) * config.sides + (2 if config.acceptance == "best_of_three" else 0)  # of a branch, or of each unit
        for start in sorted(zeroth[b]) if config.granularity == "unit" else sorted(zeroth[b])[:1]:
            again = shape.forward_from(start)
            moved = {start} if config.granularity == "unit" else zeroth[b]
            beside = phases * again + count * shape.delta_from(moved) if b in delta_branches else 0
            perturbed += samples[b] * (count * again + beside) + count * logits
    return forward + backward + perturbed


def naive_cost(shapes: Shapes, orders: Orders, config: ZerothOrderConfig, images: int, classes: int) -> int:
    """Return the FLOPs of the naive step: a first-order pass over the whole CLIP, then losses of the whole CLIP for zeroth order."""
    samples = {"vision": images, "language": classes}
    zeroth, first = _layers(orders, Order.ZEROTH), _layers(orders, Order.FIRST)
    tokens = {"vision": shapes["vision"].block.tokens, "language": CONTEXT}  # all positions of the last block are computed
    whole = {b: replace(s, block=replace(s.block, tokens=tokens[b], read=tokens[b]), read=tokens[b]) for b, s in shapes.items()}
    logits = 2 * images * classes * shapes["vision"].features
    forward = logits + sum(samples[b] * shape.forward for b, shape in whole.items())
    backward = sum((samples[b] * shape.backward(first[b]) + logits) for b, shape in whole.items() if first[b])
    estimates = sum(map(len, zeroth.values())) if config.granularity == "unit" else int(any(zeroth.values()))
    losses = 2 * max(map(config.probes_of, BRANCHES)) + (3 if config.acceptance == "best_of_three" else 0)  # as in MeZO and ZO-LLM
    perturbed = estimates * losses * forward
    return (forward if any(first.values()) else 0) + backward + perturbed


def _layers(orders: Orders, order: Order) -> dict[str, set[int]]:
    return {branch: {unit.layer for unit, o in orders.items() if unit.branch == branch and o is order} for branch in BRANCHES}
