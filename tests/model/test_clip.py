"""open_clip in, two towers out: the counts of the paper, open_clip's own features, and refusals in words."""

from pathlib import Path

import open_clip
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dist_vlcl.model import clip
from dist_vlcl.model.clip import ModelConfig, build_clip
from dist_vlcl.model.lora import LoRAAdapter, LoRAConfig
from dist_vlcl.model.moe import MoEConfig
from dist_vlcl.options import validate
from tests.helpers.tiny_clip import LORA, MLP_LORA, MOE, NAMES, WholeCLIP, pictures, tiny_clip


@pytest.fixture(scope="module")
def vit_b16():
    return build_clip(ModelConfig(name="ViT-B-16-quickgelu", pretrained="random"), MoEConfig())


def test_vit_b16_has_the_published_number_of_expert_parameters(vit_b16):
    """concepts.md 1.3, from running the baseline's own class."""
    by_branch = {b: sum(unit.numel for id, unit in vit_b16.units.items() if id.branch == b) for b in ("vision", "language")}
    assert by_branch == {"vision": 2_416_128, "language": 1_611_264}
    assert sum(p.numel() for p in vit_b16.parameters() if p.requires_grad) == 4_027_392
    assert sum(p.numel() for p in vit_b16.parameters() if not p.requires_grad) + 1 == 149_620_737  # the logit scale is a buffer
    assert {unit.numel for id, unit in vit_b16.units.items() if id.branch == "vision"} == {201_344}


@pytest.mark.parametrize(
    ("config", "expected"),
    [(LoRAConfig(), 614_400), (LoRAConfig(rank=8), 491_520), (LoRAConfig(rank=64, targets=["mlp"], scale=0.1), 1_966_080)],
    ids=["kv, rank 10", "kv, rank 8", "mlp, rank 64"],
)
def test_vit_b16_has_the_published_number_of_lora_parameters(vit_b16, config, expected):
    """concepts.md 1.10."""
    widths = [block.block.attn.embed_dim for tower in (vit_b16.vision, vit_b16.language) for block in tower.blocks]
    assert widths == [768] * 12 + [512] * 12
    adapters = [LoRAAdapter(width, config, torch.Generator()) for width in widths]
    assert sum(p.numel() for adapter in adapters for p in adapter.parameters()) == expected


def test_only_adapters_are_trainable_and_none_is_registered_twice(vit_b16):
    for name, parameter in vit_b16.named_parameters():
        assert parameter.requires_grad == (".adapter." in name), name
        assert parameter.dtype == torch.float32
    assert len(vit_b16.state_dict()) == len({t.data_ptr() for t in vit_b16.state_dict().values()})


def without_memory(model: ModelConfig) -> tuple[nn.Module, None]:
    with torch.device("meta"):
        clip = open_clip.CLIP(**open_clip.get_model_config(model.name))
    clip.visual.preprocess_cfg = {"size": 224, "mean": open_clip.OPENAI_DATASET_MEAN, "std": open_clip.OPENAI_DATASET_STD}
    clip.visual.preprocess_cfg |= {"resize_mode": "shortest", "interpolation": "bicubic"}
    return clip, None


@pytest.mark.parametrize(
    ("title", "name"), [("ViT-B/16", "ViT-B-16-quickgelu"), ("ViT-L/14", "ViT-L-14-quickgelu"), ("ViT-bigG/14", "ViT-bigG-14")]
)
def test_what_a_zero_stage_saves_is_counted_right(title, name, monkeypatch):
    """The table of docs/clusters.md, of N = 8 ranks."""
    monkeypatch.setattr(clip, "_load", without_memory)
    towers = build_clip(ModelConfig(name=name, pretrained="random"), MoEConfig())
    adapters = sum(unit.numel for unit in towers.units.values())
    frozen = sum(p.numel() for p in towers.parameters()) - adapters
    weights, gradients, moments, piece = (
        4 * (frozen + adapters),
        4 * adapters,
        8 * adapters,
        4 * max(sum(p.numel() for p in piece.parameters()) for piece in towers.zero3_modules()),
    )
    stages = [moments * 7 / 8, (moments + gradients) * 7 / 8, (moments + gradients + weights) * 7 / 8]
    cells = [
        title,
        f"{frozen / 1e6:,.1f} M",
        f"{adapters / 1e6:.2f} M",
        f"{weights / 1e6:,.0f} + {gradients / 1e6:.0f} + {moments / 1e6:.0f} MB",
    ]
    cells += [f"{value / 1e6:,.0f} MB" for value in (*stages, stages[-1] / 7, piece)]
    assert f"| {' | '.join(cells)} |" in (Path(__file__).parents[2] / "docs/clusters.md").read_text()


@pytest.mark.parametrize("adapter", [MOE, LORA, MLP_LORA], ids=["moe", "lora", "mlp_lora"])
def test_fresh_adapters_leave_open_clip_s_features_unchanged(adapter):
    towers, whole = tiny_clip(adapter=adapter, randomize=False, double=True), WholeCLIP(double=True)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD))
    images, tokens = pictures(3), whole.tokenizer([f"a bad photo of a {name}." for name in NAMES])
    theirs = whole.clip.encode_image(((images / 255 - mean) / std).double(), normalize=True)
    torch.testing.assert_close(towers.features("vision", images), theirs, rtol=1e-6, atol=1e-7)  # pixels are fp32
    theirs = whole.clip.encode_text(tokens, normalize=True)
    torch.testing.assert_close(towers.features("language", towers.prompts(NAMES)), theirs, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(towers.logit_scale, whole.clip.logit_scale.exp())


def test_a_real_vit_b16_leaves_open_clip_s_features_unchanged_too(vit_b16, monkeypatch):
    """QuickGELU, 224 pixels, 12 blocks: the same blocks, put back into open_clip's own forward."""
    visual, clip = vit_b16.vision.stem_and_head.visual, vit_b16.language.stem_and_head.clip
    monkeypatch.setitem(visual.transformer._modules, "resblocks", nn.ModuleList([block.block for block in vit_b16.vision]))
    monkeypatch.setitem(clip.transformer._modules, "resblocks", nn.ModuleList([block.block for block in vit_b16.language]))
    images = torch.randint(0, 256, (1, 3, 224, 224), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD))
    with torch.no_grad():
        theirs = F.normalize(visual((images / 255 - mean) / std), dim=-1)
        torch.testing.assert_close(vit_b16.features("vision", images), theirs, rtol=1e-4, atol=1e-5)
        theirs = clip.encode_text(vit_b16.tokenizer(["a bad photo of a dog."]), normalize=True)
        torch.testing.assert_close(vit_b16.features("language", vit_b16.prompts(["dog"])), theirs, rtol=1e-4, atol=1e-5)


def test_weights_come_from_a_local_file(tmp_path):
    whole, path = WholeCLIP(seed=4), tmp_path / "weights.pt"
    torch.save(whole.clip.state_dict(), path)
    tiny_clip()  # makes the architecture known
    towers = build_clip(ModelConfig(name="tiny-4-3", pretrained=str(path)), MOE)
    theirs = whole.clip.encode_text(whole.tokenizer(["a bad photo of a cat."]), normalize=True)
    torch.testing.assert_close(towers.features("language", towers.prompts(["cat"])), theirs, rtol=1e-5, atol=1e-6)


def test_adapters_are_a_function_of_the_seed():
    first, same, other = (
        build_clip(ModelConfig(name="tiny-4-3", pretrained="random"), MOE, seed=seed).units.state_dict() for seed in (1, 1, 2)
    )
    assert all(torch.equal(t, same[name]) for name, t in first.items())
    assert not torch.equal(first["vision.1/down_weight"], other["vision.1/down_weight"])
    assert not torch.equal(first["vision.1/down_weight"], first["vision.2/down_weight"])


def test_weights_that_open_clip_knows_come_with_the_command_that_fetches_them(monkeypatch):
    def offline(*_, **__):
        raise OSError("offline")

    monkeypatch.setattr(open_clip, "create_model", offline)
    with pytest.raises(RuntimeError, match=r"create_model\('ViT-B-32', pretrained='laion2b_e16'\)"):
        build_clip(ModelConfig(name="ViT-B-32", pretrained="laion2b_e16"), MOE)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"name": "RN50-quickgelu", "pretrained": "openai"}, ValueError, "its vision tower is a ResNet, and adapters need"),
        ({"name": "ViT-B-16", "pretrained": "openai"}, ValueError, "use model.name=ViT-B-16-quickgelu"),
        ({"name": "ViT-B-32", "pretrained": "metaclip_400m"}, ValueError, "need QuickGELU; use model.name=ViT-B-32-quickgelu"),
        ({"name": "ViT-B-61", "pretrained": "random"}, ValueError, "did you mean ViT-B-16"),
        ({"name": "tiny-4-3", "pretrained": "/no/such/file.pt"}, RuntimeError, "open_clip has no weights of it; or give"),
        ({"name": "ViT-B-32", "pretrained": "laion"}, RuntimeError, "open_clip has weights of it as openai, laion400m_e31"),
        ({"name": "tiny-4-3", "pretrained": "shipped"}, ValueError, "has weights for model.name=small_clip only"),
        ({"name": "tiny-4-3", "pretrained": "random", "prompt": "a photo"}, ValueError, "model.prompt='a photo': must contain {}"),
        ({"name": "tiny-4-3", "pretrained": "random", "context": "half"}, ValueError, "model.context='half': choose from truncated, full"),
    ],
    ids=lambda value: value["name"] + "-" + value["pretrained"] if isinstance(value, dict) else "",
)
def test_a_model_that_cannot_be_adapted_is_refused_with_a_reason(options, error, words):
    tiny_clip()
    with pytest.raises(error) as caught:
        validate(ModelConfig(**options), "model")
        build_clip(ModelConfig(**options), MOE)
    assert words in str(caught.value)
