"""The baseline's published formulas, written again from concepts.md 1.1, 1.2 and 1.10 on open_clip's modules; only the weights are ours.

Also its defects: each is an option, off by default, and on it does what the baseline does.
"""

# B samples, L tokens, D width, F features, E experts

import math

import open_clip
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from dist_vlcl.config import CONFIG_FOLDER, Config, compose_config
from dist_vlcl.data.shards import decode, make_shards, read_shard
from dist_vlcl.data.transforms import EvalTransform
from dist_vlcl.dist.world import World
from dist_vlcl.experiment import Experiment, build_towers, open_tasks
from dist_vlcl.model.clip import SMALL
from dist_vlcl.zo.noise import Key, StepNoise

NAMES = ["cat", "very long winded otter", "dog"]
FAITHFUL = ["adapter.noise_at_eval=true", "eval.train_transform=true", "data.underscore_names=true"]  # as docs/reproduction.md has it
KEY = Key(5, 0)


class Adapter(nn.Module):
    """A_e(u) = 0.1 (W_up Dropout(ReLU(W_down u + b_down)) + b_up); Linear layers as in the baseline."""

    def __init__(self, width: int, bottleneck: int):
        super().__init__()
        self.down_proj, self.up_proj = nn.Linear(width, bottleneck), nn.Linear(bottleneck, width)

    def forward(self, u: Tensor, dropout_mask: Tensor | None) -> Tensor:
        down = nn.functional.relu(self.down_proj(u))
        if dropout_mask is not None:
            down = down * dropout_mask / 0.9  # nn.Dropout(0.1), its mask given
        return self.up_proj(down) * 0.1


class Experts(nn.Module):
    """Noisy top-k gating over the first token (k = all experts) and the gated sum, expert by expert."""

    def __init__(self, weights: dict[str, Tensor]):
        super().__init__()
        self.w_gate, self.w_noise = weights["router"], weights["noise"]
        self.experts = nn.ModuleList()
        for e in range(self.w_gate.shape[1]):
            adapter = Adapter(weights["down_weight"].shape[2], weights["down_weight"].shape[1])
            own = {"down_proj.weight": weights["down_weight"][e], "down_proj.bias": weights["down_bias"][e]}
            adapter.load_state_dict(own | {"up_proj.weight": weights["up_weight"][e].T, "up_proj.bias": weights["up_bias"][e]})
            self.experts.append(adapter)

    def forward(self, u: Tensor, draw: Tensor | None, dropout_mask: Tensor | None) -> Tensor:
        x = u[:, 0]
        clean_logits = x @ self.w_gate
        noise_stddev = nn.functional.softplus(x @ self.w_noise) + 0.01
        logits = clean_logits if draw is None else clean_logits + draw * noise_stddev
        top_logits, top_indices = logits.topk(len(self.experts), dim=1)
        gates = torch.zeros_like(logits).scatter(1, top_indices, top_logits.softmax(1))
        masks = [None] * len(self.experts) if dropout_mask is None else dropout_mask.chunk(len(self.experts), -1)
        return sum(gates[:, e, None, None] * expert(u, masks[e]) for e, expert in enumerate(self.experts))


class Baseline:
    """CLIP with MoE in parallel to every MLP, or with LoRA on keys and values, on open_clip's modules."""

    def __init__(self, weights: dict[str, Tensor], is_moe: bool):
        open_clip.add_model_config(SMALL / "small_clip.json")
        self.clip = open_clip.create_model("small_clip", pretrained=str(SMALL / "small_clip.safetensors")).eval()
        self.tokenizer, self.weights, self.is_moe = open_clip.get_tokenizer("small_clip"), weights, is_moe

    def _of(self, branch: str, layer: int) -> dict[str, Tensor]:
        prefix = f"{branch}.{layer}/"
        return {name.removeprefix(prefix): t for name, t in self.weights.items() if name.startswith(prefix)}

    def _attention(self, block: nn.Module, x: Tensor, mask: Tensor | None, lora: dict[str, Tensor]) -> Tensor:
        """Multi-head attention head by head, with W_k and W_v moved by B A."""
        width, heads = x.shape[-1], block.attn.num_heads
        w_q, w_k, w_v = block.attn.in_proj_weight.split(width)
        b_q, b_k, b_v = block.attn.in_proj_bias.split(width)
        if lora:
            w_k, w_v = w_k + lora["k_up"] @ lora["k_down"], w_v + lora["v_up"] @ lora["v_down"]
        q, k, v = x @ w_q.T + b_q, x @ w_k.T + b_k, x @ w_v.T + b_v
        outs = []
        for own_q, own_k, own_v in zip(q.chunk(heads, -1), k.chunk(heads, -1), v.chunk(heads, -1), strict=True):
            scores = own_q @ own_k.transpose(1, 2) / math.sqrt(width / heads)
            outs.append((scores if mask is None else scores + mask).softmax(-1) @ own_v)
        return block.attn.out_proj(torch.cat(outs, -1))

    def _blocks(
        self, branch: str, transformer: nn.Module, x: Tensor, mask: Tensor | None, noise: StepNoise | None, training: bool
    ) -> Tensor:
        for layer, block in enumerate(transformer.resblocks, start=1):
            own = self._of(branch, layer)
            u = x + self._attention(block, block.ln_1(x), mask, {} if self.is_moe else own)
            x = u + block.mlp(block.ln_2(u))
            if self.is_moe:
                draw = noise.router(branch, layer, 2) if noise else None
                dropout_mask = noise.dropout_mask(branch, layer, x.shape[1], own["down_bias"].numel(), 0.1) if noise and training else None
                x = x + Experts(own)(u, draw, dropout_mask)
        return x

    @torch.no_grad()
    def images(self, images: Tensor, noise: StepNoise | None = None, training: bool = False) -> Tensor:
        """uint8 [B, 3, S, S] -> unit features [B, F], with OpenAI's normalisation written out."""
        visual = self.clip.visual
        mean = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)
        std = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)
        patches = visual.conv1((images / 255 - mean) / std).flatten(2).transpose(1, 2)
        x = torch.cat([visual.class_embedding.expand(len(images), 1, -1), patches], 1) + visual.positional_embedding
        x = self._blocks("vision", visual.transformer, visual.ln_pre(x), None, noise, training)
        return nn.functional.normalize(visual.ln_post(x[:, 0]) @ visual.proj, dim=-1)

    @torch.no_grad()
    def texts(self, prompts: list[str], noise: StepNoise | None = None, training: bool = False) -> Tensor:
        """Prompts -> unit features [C, F], always at the whole context."""
        tokens = self.tokenizer(prompts)
        x = self.clip.token_embedding(tokens) + self.clip.positional_embedding
        mask = torch.full((tokens.shape[1],) * 2, float("-inf")).triu(1)
        x = self.clip.ln_final(self._blocks("language", self.clip.transformer, x, mask, noise, training))
        projection = self.clip.text_projection
        x = x[torch.arange(len(tokens)), tokens.argmax(-1)]
        return nn.functional.normalize(projection(x) if isinstance(projection, nn.Module) else x @ projection, dim=-1)


def configured(tmp_path, *overrides: str) -> Config:
    small = ["model=small", "adapter.scale=0.1" if "adapter=lora" not in overrides else "adapter.scale=1.0", f"data.root={tmp_path}/data"]
    return compose_config([*small, "cluster.threads=1", *overrides])


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("fidelity")


def acting(cfg: Config):
    """Return our towers with adapters that act, and the baseline with the same weights."""
    towers, draw = build_towers(cfg, World.alone()), torch.Generator().manual_seed(1)
    for tensor in towers.units.state_dict().values():
        tensor.add_(torch.randn(tensor.shape, generator=draw) * 0.1)
    return towers, Baseline(towers.units.state_dict(), is_moe=hasattr(cfg.adapter, "experts"))


@pytest.mark.parametrize("adapter", ["moe", "lora"])
@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
def test_the_forward_is_the_published_one(root, adapter, training):
    towers, baseline = acting(configured(root, f"adapter={adapter}"))
    size, prompts = towers.image_size, [f"a bad photo of a {name}." for name in NAMES]
    images = torch.randint(0, 256, (4, 3, size, size), generator=torch.Generator().manual_seed(2), dtype=torch.uint8)
    tokens, noise = towers.prompts(NAMES), None
    if training:
        noise = StepNoise(KEY, {"vision": torch.arange(4), "language": torch.arange(3)})
        with torch.no_grad():
            ours = {branch: out[0][0] for branch, out in towers({"vision": images, "language": tokens}, noise).items()}
        noise = StepNoise(KEY, {"vision": torch.arange(4), "language": torch.arange(3)})  # masks of 77 tokens this time
    else:
        ours = {"vision": towers.features("vision", images), "language": towers.features("language", tokens)}
    image_BF, text_CF = baseline.images(images, noise, training), baseline.texts(prompts, noise, training)
    torch.testing.assert_close(ours["vision"], image_BF, rtol=0, atol=2e-5)
    torch.testing.assert_close(ours["language"], text_CF, rtol=0, atol=2e-5)
    plain = Baseline({name: torch.zeros_like(t) for name, t in baseline.weights.items()}, baseline.is_moe)
    assert (plain.images(images) - image_BF).abs().max() > 0.01  # the adapters act
    torch.testing.assert_close(towers.logit_scale, baseline.clip.logit_scale.exp())


def test_router_noise_at_evaluation_is_the_baseline_s_and_off_by_default(root):
    """Q1: each forward has noise on the gates, in eval mode too; dropout is off."""
    assert not configured(root).adapter.noise_at_eval
    images = torch.randint(0, 256, (4, 3, 32, 32), generator=torch.Generator().manual_seed(2), dtype=torch.uint8)
    for quirk in (True, False):
        towers, baseline = acting(configured(root, f"adapter.noise_at_eval={str(quirk).lower()}"))
        size = towers.image_size
        shown = nn.functional.interpolate(images, size=size) if size != 32 else images
        noise = StepNoise(KEY, {"vision": torch.arange(4)})
        ours, quiet = towers.features("vision", shown, noise), baseline.images(shown)
        noisy = baseline.images(shown, StepNoise(KEY, {"vision": torch.arange(4)}))
        torch.testing.assert_close(ours, noisy if quirk else quiet, rtol=0, atol=2e-5)
        assert (noisy - quiet).abs().max() > 1e-3


def evaluated(cfg: Config):
    """Evaluate after the first task; return the counts, and the image features' inputs and noise as the evaluation gave them."""
    experiment, seen = Experiment.open(cfg, World.alone()), []
    towers = experiment.towers
    features = towers.features
    towers.features = lambda branch, inputs, noise=None: seen.append((branch, inputs, noise)) or features(branch, inputs, noise)
    counts = experiment.evaluate(experiment.tasks[0])
    assert counts == experiment.count(experiment.tasks[0], [1], "")[0]  # noise and crops are seeded (Q3 is not copied)
    return experiment.index, experiment.tasks, seen


def test_the_evaluation_takes_the_quirks_where_it_is_told_and_only_there(root):
    tested = EvalTransform(build_towers(configured(root), World.alone()).image_size)
    for quirks in ([], FAITHFUL):
        index, tasks, seen = evaluated(configured(root, "data=digits", "tasks.increment=1", *quirks))
        assert all((noise is not None) == bool(quirks) for _, _, noise in seen)
        shown = torch.cat([inputs for branch, inputs, _ in seen[:2] if branch == "vision"])
        stored = [s for c in tasks[0].classes for shard in index.shards["test"][c] for s in read_shard(index, shard)]
        pictures = [decode(s.image, s.key) for s in stored]
        plain = torch.stack([tested(p, None) for p in pictures])
        same = (shown == plain).flatten(1).all(1).float().mean()
        assert same < 0.5 if quirks else same == 1  # Q2: a random crop of 0.9 to 1.0 of the area, seldom the whole


def test_underscores_stay_in_prompts_where_they_are_told_to(root):
    """Q7; the same shards serve both."""
    source = root / "pictures"
    for name in ("aquarium_fish", "pickup_truck"):
        (source / name).mkdir(parents=True)
        for k in range(5):
            Image.new("RGB", (32, 32), (k, k, k)).save(source / name / f"{k}.png")
    folder = ["data=folder", "data.name=pictures", f"data.source={source}", "tasks.increment=1"]
    cfg = configured(root, *folder)
    make_shards(cfg.data)
    assert open_tasks(cfg, World.alone())[1].seen(1).names == ("aquarium fish", "pickup truck")
    cfg = configured(root, *folder, "data.underscore_names=true")
    assert open_tasks(cfg, World.alone())[1].seen(1).names == ("aquarium_fish", "pickup_truck")


def test_the_faithful_run_is_the_baseline_s_configuration():
    cfg = compose_config(["paper=t1-moe-cifar10-fo", *FAITHFUL])
    plain = compose_config(["paper=t1-moe-cifar10-fo"])
    assert (cfg.adapter.noise_at_eval, cfg.eval.train_transform, cfg.data.underscore_names) == (True, True, True)
    assert (plain.adapter.noise_at_eval, plain.eval.train_transform, plain.data.underscore_names) == (False, False, False)
    assert (cfg.orders.branch, cfg.train.batch_size, cfg.tasks.increment, cfg.tasks.order) == ("none", 128, 10, "paper")
    words = " ".join(["paper=t1-moe-cifar10-fo", *FAITHFUL])
    assert words in (CONFIG_FOLDER.parent / "docs" / "reproduction.md").read_text()
