"""Every family of CLIP in open_clip has adapters like open_clip's own ViT: compared with the library's own model in each."""

# K parameter sets, B images, C classes

import numpy as np
import open_clip
import pytest
import torch
from open_clip.loss import SigLipLoss
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from dist_vlcl.inference import TrainedCLIP
from dist_vlcl.losses import sample_losses
from dist_vlcl.model.clip import ModelConfig, build_clip, merge_lora
from dist_vlcl.model.lora import LoRAConfig
from dist_vlcl.model.perturbed import Perturbed
from dist_vlcl.zo.noise import Key, StepNoise
from tests.helpers.families import FAMILIES, TIMM, LibraryCLIP, architecture, images_of, tiny
from tests.helpers.tiny_clip import LORA, MLP_LORA, MOE, NAMES, adapter_values

EXACT = {"rtol": 1e-9, "atol": 1e-11}
ADAPTERS = {"moe": MOE, "lora": LORA, "mlp_lora": MLP_LORA}
BRANCHES = ("vision", "language")
DEPTH = {"vision": 3, "language": 2}


def inputs_of(towers, branch: str) -> Tensor:
    return images_of(towers, 4) if branch == "vision" else towers.prompts(NAMES)


def noise() -> StepNoise:
    return StepNoise(Key(5, 2), {"vision": torch.arange(4), "language": torch.arange(len(NAMES))})


def moved(towers, branch: str, layers: range, count: int) -> dict:
    """Return changes of the units of some layers, `[K, ...]` each."""
    generator = torch.Generator().manual_seed(3)
    return {
        id: {name: torch.randn(count, *t.shape, generator=generator).to(t.dtype) * 0.1 for name, t in unit.tensors().items()}
        for id, unit in towers.units.items()
        if id.branch == branch and id.layer in layers
    }


def values_at(towers, changes: dict) -> dict:
    return {id: {name: towers.units[id].tensors()[name].detach() + c for name, c in tensors.items()} for id, tensors in changes.items()}


@pytest.mark.parametrize("adapter", ["moe", "lora"])
@pytest.mark.parametrize("family", FAMILIES)
def test_fresh_adapters_leave_the_library_s_features_unchanged(family, adapter):
    """To the bit where the library's own blocks run; to rounding where our faster ones do."""
    towers, library = tiny(family, ADAPTERS[adapter], randomize=False), LibraryCLIP(family)
    images = images_of(towers, 3)
    theirs = {"vision": library.features("vision", images, {}), "language": library.features("language", NAMES, {})}
    for branch, inputs in (("vision", images), ("language", towers.prompts(NAMES))):
        ours = towers.features(branch, inputs)
        if branch == "vision" and family in TIMM:
            assert torch.equal(ours, theirs[branch])
        torch.testing.assert_close(ours, theirs[branch], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("family", FAMILIES)
def test_features_are_those_of_the_library_s_model_with_adapters_hung_on_it(family, adapter):
    """With router noise and dropout; the library reads the whole context of each prompt."""
    towers, library = tiny(family, ADAPTERS[adapter], double=True), LibraryCLIP(family, ADAPTERS[adapter], double=True)
    for branch, named in (("vision", images_of(towers, 4)), ("language", NAMES)):
        tower, inputs = towers.tower(branch), inputs_of(towers, branch)
        drawn = noise() if adapter == "moe" else None
        ours = tower.run(tower.embed(inputs), inputs, noise=drawn)[0][0]
        theirs = library.features(branch, named, adapter_values(towers), noise() if drawn else None)
        torch.testing.assert_close(ours, theirs, **EXACT)
        assert not torch.allclose(theirs, library.features(branch, named, {}), atol=1e-4)


@pytest.mark.parametrize("adapter", ["moe", "lora"])
@pytest.mark.parametrize("family", FAMILIES)
def test_k_candidates_that_restart_at_their_block_are_k_whole_passes(family, adapter):
    """Also as changes of the base alone (delta)."""
    towers = tiny(family, ADAPTERS[adapter], double=True)
    for branch, depth in DEPTH.items():
        tower, inputs = towers.tower(branch), inputs_of(towers, branch)
        base, cached = tower.run(tower.embed(inputs), inputs, noise=noise(), cache_layers=[2])
        changes = moved(towers, branch, range(2, depth + 1), 3)
        values = values_at(towers, changes)
        restarted, _ = tower.run(cached[2], inputs, start=2, stacked_params=values, noise=noise())
        for k in range(3):
            alone = {id: {name: t[[k]] for name, t in tensors.items()} for id, tensors in values.items()}
            whole, _ = tower.run(tower.embed(inputs), inputs, stacked_params=alone, noise=noise())
            torch.testing.assert_close(restarted[[k]], whole, **EXACT)
        assert not torch.allclose(restarted[0], restarted[1])
        pairs = {
            id: {name: Perturbed(towers.units[id].tensors()[name].detach()[None], c) for name, c in tensors.items()}
            for id, tensors in changes.items()
        }
        with torch.no_grad():
            delta, _ = tower.run(cached[2], inputs, start=2, stacked_params=pairs, noise=noise())
        torch.testing.assert_close(delta.change, (restarted - base).detach(), **EXACT)


@pytest.mark.parametrize("adapter", ["moe", "lora"])
@pytest.mark.parametrize("family", ["siglip", "eva02", "eva02_post_norm", "coca"])
def test_gradients_are_those_of_the_library_s_model(family, adapter):
    towers, library = tiny(family, ADAPTERS[adapter], double=True), LibraryCLIP(family, ADAPTERS[adapter], double=True)
    for branch, named in (("vision", images_of(towers, 4)), ("language", NAMES)):
        tower, inputs = towers.tower(branch), inputs_of(towers, branch)
        names = [name for name in adapter_values(towers) if name.startswith(branch)]
        values = {name: t.requires_grad_() for name, t in adapter_values(towers).items() if name in names}
        weights = torch.linspace(-1, 1, 32, dtype=torch.float64)
        theirs = torch.autograd.grad((library.features(branch, named, values) @ weights).sum(), list(values.values()), allow_unused=True)
        (tower.run(tower.embed(inputs), inputs)[0][0] @ weights).sum().backward()
        own = {f"{id}/{name}": t.grad for id, unit in towers.units.items() for name, t in unit.tensors().items()}
        for name, gradient in zip(values, theirs, strict=True):
            torch.testing.assert_close(own[name], torch.zeros_like(own[name]) if gradient is None else gradient, rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize("family", TIMM)
def test_the_blocks_of_a_vision_tower_may_be_bfloat16(family):
    """Within bfloat16's rounding; a change of the base is computed with far less of it than a difference of two evaluations has."""
    exact, narrow = (tiny(family, precision=precision) for precision in ("fp32", "bf16"))
    assert {p.dtype for block in narrow.vision for p in block.block.parameters()} == {torch.bfloat16}
    images = images_of(exact, 4)
    torch.testing.assert_close(narrow.features("vision", images), exact.features("vision", images), rtol=0, atol=0.05)
    widened = narrow.copy().double()
    changes = moved(narrow, "vision", range(2, 4), 1)
    found = {}
    for towers in (narrow, widened):
        tower = towers.vision
        pairs = {
            id: {name: Perturbed(towers.units[id].tensors()[name].detach()[None], c.double() * 1e-2) for name, c in tensors.items()}
            for id, tensors in changes.items()
        }
        with torch.no_grad():
            _, cached = tower.run(tower.embed(images), images, cache_layers=[2])
            found[tower.dtype] = tower.run(cached[2], images, start=2, stacked_params=pairs)[0].change.double()
    error = found[torch.bfloat16] - found[torch.float64]
    assert float(error.norm()) < 0.05 * float(found[torch.float64].norm())


def test_prompts_are_cut_only_where_that_changes_nothing():
    longest = tiny("eva01").prompts(NAMES).shape[1]
    whole = {"siglip": 64, "siglip2": 64, "clipa": 32, "mobileclip2": 77, "coca": 76, "metaclip2": longest - 1}
    assert longest < 20
    for family in FAMILIES:
        assert tiny(family).prompts(NAMES).shape[1] == whole.get(family, longest), family


@pytest.mark.parametrize("family", FAMILIES)
def test_merged_lora_is_plain_open_clip_with_the_same_features(family, tmp_path):
    """In every family: `export --to open_clip` adds LoRA to the weights of q, k and v, wherever the library has them."""
    lora = LoRAConfig(rank=3, targets=["q", "k", "v"])
    towers, model = tiny(family, lora), ModelConfig(name=architecture(family), pretrained="random")
    adapters = {name: t.detach() for name, t in towers.units.state_dict().items()}
    assert len(adapters) == 6 * sum(DEPTH.values())
    weights, config = merge_lora(model, lora, adapters, seed=0)
    save_file({name: t.contiguous() for name, t in weights.items()}, tmp_path / "merged.safetensors")
    plain = open_clip.create_model(architecture(family), pretrained=str(tmp_path / "merged.safetensors")).eval()
    images, preprocessing = images_of(towers, 3), config["preprocess_cfg"]
    mean, std = (torch.tensor(preprocessing[key]).view(3, 1, 1) for key in ("mean", "std"))
    prompts = towers.prompts(NAMES)
    whole = towers.tokenizer([towers.config.prompt.replace("{}", name) for name in NAMES])
    with torch.no_grad():
        torch.testing.assert_close(plain.encode_image((images / 255 - mean) / std, normalize=True), towers.features("vision", images))
        torch.testing.assert_close(plain.encode_text(whole, normalize=True), towers.features("language", prompts))
    assert not torch.allclose(towers.features("vision", images), tiny(family, lora, randomize=False).features("vision", images), atol=1e-3)


def test_test_images_are_preprocessed_as_the_weights_tag_says(tmp_path, monkeypatch):
    """open_clip's tags of SigLIP resize both sides of an image (squash), those of CLIPA with another filter, too."""
    name, file = architecture("siglip"), tmp_path / "weights.safetensors"
    save_file(open_clip.create_model(name).state_dict(), file)
    own = open_clip.get_pretrained_cfg("ViT-L-14-CLIPA", "datacomp1b") | {"file": str(file)}
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, name, {"own": own})
    model = TrainedCLIP(build_clip(ModelConfig(name=name, pretrained="own"), MOE))
    _, theirs = open_clip.create_model_from_pretrained(name, pretrained="own")
    for size in ((50, 30), (30, 50)):
        picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8))
        torch.testing.assert_close(model.preprocess(picture), theirs(picture), rtol=0, atol=1.01 / 255 / min(own["std"]))  # rounding


def test_sigmoid_loss_is_open_clip_s_own_with_the_model_s_scale_and_bias():
    towers = tiny("siglip", loss="sigmoid")
    library = LibraryCLIP("siglip")
    assert float(library.clip.logit_bias) == -10
    image_BF, text_CF = towers.features("vision", images_of(towers, 5)), towers.features("language", towers.prompts(NAMES))
    theirs = SigLipLoss()(image_BF, text_CF, library.clip.logit_scale.exp(), library.clip.logit_bias)
    ours = sample_losses(towers.logits(image_BF, text_CF), torch.arange(5), towers.config.loss).mean()
    torch.testing.assert_close(ours, theirs)
