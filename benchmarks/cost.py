"""The cost model: the FLOPs that a step cannot do without, and those of the naive step. docs/PERFORMANCE.md derives it.

One FLOP is an addition or a multiplication: a product of `[n, d]` and `[d, m]` is 2 n d m. Counted are matrix products and convolutions;
what is linear in the activations (norms, GELU, softmax, noise) is not.
"""

# n tokens, p positions read from the last block, d width, c columns of the adapter's bottleneck that act, B images, C classes

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

from dist_vlcl.model.clip import TwoTowers
from dist_vlcl.model.lora import LoRAConfig
from dist_vlcl.model.moe import MoEConfig
from dist_vlcl.model.units import BRANCHES, UnitId
from dist_vlcl.orders import Order
from dist_vlcl.zo.update import ZerothOrderConfig


@dataclass(frozen=True)
class Block:
    """A transformer block with an adapter: n keys and values, output read at p positions."""

    tokens: int
    read: int
    width: int
    columns: int
    site: str  # of the adapter: mlp (beside the MLP), attention (at the projections)

    @property
    def projections(self) -> int:
        """Keys and values of all positions, queries of those that are read."""
        return 2 * (2 * self.tokens + self.read) * self.width**2

    @property
    def attention(self) -> int:
        """Similarities, and the weighted sum of the values."""
        return 4 * self.read * self.tokens * self.width

    @property
    def rest(self) -> int:
        """Output projection and MLP, of hidden width 4 d."""
        return 2 * (1 + 8) * self.read * self.width**2

    @property
    def adapter(self) -> int:
        """Down and up."""
        return 4 * (self.read if self.site == "mlp" else self.tokens) * self.width * self.columns

    @property
    def forward(self) -> int:
        return self.projections + self.attention + self.rest + self.adapter

    @property
    def forward_from_adapter(self) -> int:
        """What remains of the block when all that does not depend on its adapter is known."""
        return self.adapter + (self.attention + self.rest if self.site == "attention" else 0)

    def backward(self, learns: bool) -> int:
        """Gradient of the input: each product once more, the two of attention twice; with that of the weights if the adapter learns."""
        return self.projections + 2 * self.attention + self.rest + self.adapter * (2 if learns else 1)

    @property
    def backward_to_adapter(self) -> int:
        """The lowest block that learns: gradients of the adapter's two matrices, and of what lies between them."""
        return self.adapter + self.adapter // 2 + (2 * self.attention + self.rest if self.site == "attention" else 0)


@dataclass(frozen=True)
class TowerShape:
    """The sizes of a tower that its FLOPs depend on."""

    width: int
    depth: int
    tokens: int
    read: int
    columns: int
    site: str
    embed: int  # FLOPs of the patch embedding of a sample
    features: int

    @cached_property
    def blocks(self) -> list[Block]:
        inner = Block(self.tokens, self.tokens, self.width, self.columns, self.site)
        return [inner] * (self.depth - 1) + [replace(inner, read=self.read)]

    @property
    def project(self) -> int:
        return 2 * self.width * self.features

    @property
    def forward(self) -> int:
        return self.embed + sum(block.forward for block in self.blocks) + self.project

    def forward_from(self, layer: int) -> int:
        """One parameter set, restarted where the adapter of `layer` (from 1) begins to matter."""
        return self.blocks[layer - 1].forward_from_adapter + sum(block.forward for block in self.blocks[layer:]) + self.project

    def delta_from(self, layers: set[int]) -> int:
        """What a change costs beyond a forward from the lowest of the perturbed `layers`: its products with what is perturbed itself.

        These are the two of attention once more, where both factors change, and the adapters that are perturbed, once more.
        """
        above = sum(block.attention for block in self.blocks[min(layers) :])
        lowest = self.blocks[min(layers) - 1]
        own = sum(self.blocks[layer - 1].adapter for layer in layers) - lowest.adapter // 2  # its input has no change
        return above + own + (lowest.attention if self.site == "attention" else 0)

    def backward(self, learning: set[int]) -> int:
        """From the features down to the lowest layer that learns by first order."""
        if not learning:
            return 0
        lowest = min(learning)
        above = sum(self.blocks[layer - 1].backward(layer in learning) for layer in range(lowest + 1, self.depth + 1))
        return self.project + above + self.blocks[lowest - 1].backward_to_adapter

    def naive(self, tokens: int) -> "TowerShape":
        """Return the tower as usual code runs it: every prompt at the whole context, every position through the last block."""
        return replace(self, tokens=tokens, read=tokens)


def shapes_of(towers: TwoTowers, prompt_tokens: int) -> dict[str, TowerShape]:
    """Return the shapes of a model's towers; prompts have `prompt_tokens`."""
    result = {}
    for branch in BRANCHES:
        tower = towers.tower(branch)
        adapter = tower.block(1).adapter
        visual = towers.vision.ends.visual
        patches = len(visual.positional_embedding) - 1
        is_vision = branch == "vision"
        width = tower.block(1).block.attn.embed_dim
        result[branch] = TowerShape(
            width=width,
            depth=tower.depth,
            tokens=patches + 1 if is_vision else prompt_tokens,
            read=1 if is_vision else 2,
            columns=_columns(adapter.config),
            site=adapter.site,
            embed=2 * patches * visual.conv1.weight.numel() if is_vision else 0,
            features=visual.proj.shape[1],
        )
    return result


def _columns(config: MoEConfig | LoRAConfig) -> int:
    if isinstance(config, LoRAConfig):
        return config.rank * len(config.targets)
    return config.top_k * config.bottleneck


@dataclass(frozen=True)
class Cost:
    """FLOPs of a step by what they are for."""

    forward: int
    backward: int
    perturbed: int

    @property
    def total(self) -> int:
        return self.forward + self.backward + self.perturbed


def evaluations(config: ZerothOrderConfig) -> int:
    """Return how many perturbed losses a branch needs beyond the base loss (simultaneous update, one step, granularity branch)."""
    return config.probes * config.sides + (2 if config.acceptance == "best_of_three" else 0)


def phases(config: ZerothOrderConfig) -> int:
    """Return how often losses are asked for: probes, and then the candidates of the best of three."""
    return 2 if config.acceptance == "best_of_three" else 1


def naive_evaluations(config: ZerothOrderConfig) -> int:
    """Return the whole-model losses of the usual code: MeZO's two a probe; ZO-LLM's conservative step takes five, the base anew."""
    return 2 * config.probes + (3 if config.acceptance == "best_of_three" else 0)


def step_cost(
    shapes: Mapping[str, TowerShape],
    orders: Mapping[UnitId, Order],
    config: ZerothOrderConfig,
    images: int,
    classes: int,
    delta_branches: Collection[str] = (),
) -> Cost:
    """Return the FLOPs that one step cannot do without: nothing is computed twice, nothing that is not read.

    delta_branches: branches whose candidates are evaluated by delta-forward. It computes the base anew in each phase, beside the changes.
    """
    samples = {"vision": images, "language": classes}
    zeroth, first = _layers(orders, Order.ZEROTH), _layers(orders, Order.FIRST)
    logits = 2 * images * classes * shapes["vision"].features
    forward = logits + sum(samples[b] * shape.forward for b, shape in shapes.items())
    backward = sum((samples[b] * shape.backward(first[b]) + logits) for b, shape in shapes.items() if first[b])
    perturbed = 0
    for b, shape in shapes.items():
        if zeroth[b]:
            again = shape.forward_from(min(zeroth[b]))
            beside = phases(config) * again + evaluations(config) * shape.delta_from(zeroth[b]) if b in delta_branches else 0
            perturbed += samples[b] * (evaluations(config) * again + beside) + evaluations(config) * logits
    return Cost(forward, backward, perturbed)


def naive_cost(
    shapes: Mapping[str, TowerShape],
    orders: Mapping[UnitId, Order],
    config: ZerothOrderConfig,
    images: int,
    classes: int,
    context: int = 77,
) -> Cost:
    """Return the FLOPs of the usual step: a first-order pass over the whole CLIP, then whole-model losses for zeroth order."""
    samples = {"vision": images, "language": classes}
    zeroth, first = _layers(orders, Order.ZEROTH), _layers(orders, Order.FIRST)
    whole = {b: shape.naive(shape.tokens if b == "vision" else context) for b, shape in shapes.items()}
    logits = 2 * images * classes * shapes["vision"].features
    forward = logits + sum(samples[b] * shape.forward for b, shape in whole.items())
    backward = sum((samples[b] * shape.backward(first[b]) + logits) for b, shape in whole.items() if first[b])
    perturbed = naive_evaluations(config) * forward if any(zeroth.values()) else 0
    return Cost(forward if any(first.values()) or not perturbed else 0, backward, perturbed)


def _layers(orders: Mapping[UnitId, Order], order: Order) -> dict[str, set[int]]:
    return {branch: {unit.layer for unit, o in orders.items() if unit.branch == branch and o is order} for branch in BRANCHES}
