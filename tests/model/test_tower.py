"""What a tower shares and skips is what the whole model would have computed, in float64."""

# K parameter sets, B samples, L tokens, F features

import json

import open_clip
import pytest
import torch

from dist_vlcl.model import tower
from dist_vlcl.model.clip import ModelConfig, build_clip
from dist_vlcl.model.tower import Context
from dist_vlcl.model.units import UnitId
from dist_vlcl.zo.noise import Key, StepNoise
from tests.helpers.tiny_clip import LORA, MLP_LORA, MOE, NAMES, WholeCLIP, adapter_values, pictures, tiny_clip

ADAPTERS = {"moe": MOE, "lora": LORA, "mlp_lora": MLP_LORA}
EXACT = {"rtol": 1e-9, "atol": 1e-11}
DEPTH = {"vision": 4, "language": 3}


@pytest.fixture(scope="module", params=ADAPTERS)
def towers(request):
    return tiny_clip(adapter=ADAPTERS[request.param], double=True)


def inputs_of(towers, branch):
    return pictures(4) if branch == "vision" else towers.prompts(NAMES)


def noise():
    """Return a step's noise, anew: a `StepNoise` keeps what it drew."""
    return StepNoise(Key(5, 2), {"vision": torch.arange(4), "language": torch.arange(len(NAMES))})


def sets_of(towers, branch, layers, count):
    """Return K random values of the units of some layers."""
    generator = torch.Generator().manual_seed(3)
    return {
        id: {
            name: t.detach() + torch.randn(count, *t.shape, generator=generator, dtype=t.dtype) * 0.1 for name, t in unit.tensors().items()
        }
        for id, unit in towers.units.items()
        if id.branch == branch and id.layer in layers
    }


def test_parts_of_a_batch_give_the_bits_of_the_whole(monkeypatch, tmp_path):
    """With eight samples in a part this fails on CPUs that sum a product of few rows in another order."""
    wide = {"embed_dim": 512, "vision_cfg": {"image_size": 28, "patch_size": 14, "layers": 1, "width": 768, "head_width": 64}}
    (tmp_path / "wide.json").write_text(json.dumps({**wide, "text_cfg": {"width": 64, "heads": 1, "layers": 1}}))
    open_clip.add_model_config(tmp_path / "wide.json")
    towers = build_clip(ModelConfig(name="wide", pretrained="random"), MOE)
    images = torch.randint(0, 256, (64, 3, 28, 28), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    whole = towers.features("vision", images)
    monkeypatch.setitem(tower.ROWS_AT_A_TIME, "cpu", 1)
    assert torch.equal(towers.features("vision", images), whole)


def run(towers, branch, **options):
    tower, inputs = towers.tower(branch), inputs_of(towers, branch)
    return tower.run(tower.embed(inputs), inputs, noise=noise(), **options)


@pytest.mark.parametrize("branch", DEPTH)
@pytest.mark.parametrize("layers", [(1, 2, 3), (2,), (1, 3), (3,)], ids=str)
def test_k_sets_in_one_forward_are_k_forwards(towers, branch, layers):
    """The K axis appears at the first block that has K sets, whichever that is."""
    stacked_params = sets_of(towers, branch, layers, 3)
    together, _ = run(towers, branch, stacked_params=stacked_params)
    assert together.shape[0] == 3
    for k in range(3):
        alone, _ = run(
            towers, branch, stacked_params={id: {name: t[[k]] for name, t in tensors.items()} for id, tensors in stacked_params.items()}
        )
        torch.testing.assert_close(together[[k]], alone, **EXACT)
    assert not torch.allclose(together[0], together[1])


@pytest.mark.parametrize("branch", DEPTH)
@pytest.mark.parametrize("start", [1, 2, 3])
def test_a_restart_from_a_carry_is_the_whole_forward(towers, branch, start):
    base, cached = run(towers, branch, cache_layers=[start])
    tower, inputs = towers.tower(branch), inputs_of(towers, branch)
    again, _ = tower.run(cached[start], inputs, start=start, noise=noise())
    torch.testing.assert_close(again, base, **EXACT)
    stacked_params = sets_of(towers, branch, range(start, 4), 2)
    restarted, _ = tower.run(cached[start], inputs, start=start, stacked_params=stacked_params, noise=noise())
    torch.testing.assert_close(restarted, run(towers, branch, stacked_params=stacked_params)[0], **EXACT)


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("adapter", [MOE, LORA], ids=["moe", "lora"])
def test_one_pass_caches_the_inputs_of_several_blocks(adapter, grad):
    towers = tiny_clip(adapter=adapter, double=True)
    with torch.set_grad_enabled(grad):
        _, together = run(towers, "language", cache_layers=[3, 1])
        alone = [run(towers, "language", cache_layers=[layer])[1][layer] for layer in (1, 3)]
    assert list(together) == [1, 3] and not any(t.requires_grad for t in together[1])
    assert all(torch.equal(a, b) for layer, found in zip((1, 3), alone, strict=True) for a, b in zip(together[layer], found, strict=True))


def test_a_prompt_cut_to_the_longest_has_the_features_of_the_whole_context(towers):
    short, full = tiny_clip(double=True).prompts(NAMES), tiny_clip(double=True, context="full").prompts(NAMES)
    assert short.shape[1] < full.shape[1] == 77
    assert torch.equal(full[:, : short.shape[1]], short) and not full[:, short.shape[1] :].any()
    cut, whole = (towers.language.run(towers.language.embed(t), t, noise=noise())[0] for t in (short, full))
    torch.testing.assert_close(cut, whole, **EXACT)


def test_prompts_may_be_cut_to_few_lengths_up_to_the_whole_context(towers):
    tokens = {multiple: towers.prompts(NAMES, multiple) for multiple in (1, 5, 50)}
    longest = tokens[1].shape[1]
    assert longest % 5 and [t.shape[1] for t in tokens.values()] == [longest, longest + 5 - longest % 5, 50]
    assert towers.prompts(["dog " * 60], 4).shape[1] == 68 and towers.prompts(["dog " * 90], 4).shape[1] == 77
    short, long = (towers.language.run(towers.language.embed(tokens[m]), tokens[m], noise=noise())[0] for m in (1, 5))
    torch.testing.assert_close(long, short, **EXACT)


def test_prompts_of_equal_length_and_a_single_class_are_cut_too():
    towers = tiny_clip()
    for names in (["dog"], ["dog", "cat"]):
        tokens = towers.prompts(names)
        assert (tokens[:, -1] == 49407).all()  # end of text


@pytest.mark.parametrize("with_noise", [False, True])
@pytest.mark.parametrize("branch", DEPTH)
def test_adapted_blocks_are_open_clip_s_own_with_the_adapter_beside_the_mlp(branch, with_noise):
    """x' = u + MLP(LN2 u) + MoE(u), u = x + Attn(LN1 x), with router noise and dropout of the step."""
    towers, whole = tiny_clip(double=True), WholeCLIP(double=True)
    named = NAMES if branch == "language" else pictures(4)
    expected = whole.features(branch, named, adapter_values(towers), noise() if with_noise else None)
    tower, inputs = towers.tower(branch), inputs_of(towers, branch)
    actual, _ = tower.run(tower.embed(inputs), inputs, noise=noise() if with_noise else None)
    torch.testing.assert_close(actual[0], expected, **EXACT)


def test_adapters_noise_and_dropout_matter_so_the_comparisons_above_say_something():
    towers, whole = tiny_clip(double=True), WholeCLIP(double=True)
    for branch, named in (("language", NAMES), ("vision", pictures(4))):
        bare, adapted = (whole.features(branch, named, values) for values in ({}, adapter_values(towers)))
        noisy = whole.features(branch, named, adapter_values(towers), noise())
        assert float((bare - adapted).abs().max()) > 1e-2 and float((noisy - adapted).abs().max()) > 1e-3


def test_a_class_does_not_see_the_other_classes_of_its_batch(towers):
    tokens = towers.prompts(NAMES)
    together = towers.features("language", tokens)
    for c in range(len(NAMES)):
        torch.testing.assert_close(towers.features("language", tokens[[c]])[0], together[c], **EXACT)


def test_features_are_of_length_1_and_evaluation_has_neither_dropout_nor_router_noise():
    towers = tiny_clip(double=True)
    images = pictures(4)
    quiet = towers.features("vision", images)
    torch.testing.assert_close(quiet.norm(dim=-1), torch.ones(4, dtype=torch.float64))
    assert torch.equal(towers.features("vision", images, noise()), quiet)


def test_router_noise_at_evaluation_only_where_the_quirk_is_asked_for():
    """Defect Q1 of the baseline."""
    quirk = type(MOE)(bottleneck=4, noise_at_eval=True)
    towers, whole = tiny_clip(adapter=quirk, double=True), WholeCLIP(quirk, double=True)
    whole.training = False
    noisy = towers.features("vision", pictures(4), noise())
    torch.testing.assert_close(noisy, whole.features("vision", pictures(4), adapter_values(towers), noise()), **EXACT)
    assert not torch.allclose(noisy, towers.features("vision", pictures(4)))


@pytest.mark.parametrize("first", [[("vision", 2)], [("language", 3), ("vision", 1)], []], ids=str)
def test_gradients_flow_to_first_order_units_only(first):
    from dist_vlcl.model.units import FlatUnits, freeze

    towers = tiny_clip()
    chosen = {UnitId(*address) for address in first}
    rest = [unit for id, unit in towers.units.items() if id not in chosen]
    for unit in rest[::2]:
        freeze(unit)
    FlatUnits([unit for unit in rest[1::2] if unit.id.branch == "vision"])
    FlatUnits([unit for unit in rest[1::2] if unit.id.branch == "language"])
    out = towers({"vision": pictures(4), "language": towers.prompts(NAMES)})
    loss = (out["vision"][0][0] @ out["language"][0][0].T).square().sum()
    assert loss.requires_grad == bool(first)
    if first:
        loss.backward()
    with_gradient = {name for name, p in towers.named_parameters() if p.grad is not None}
    expected = {f"{id.branch}.blocks.{id.layer - 1}.adapter.{name}" for id in chosen for name in towers.units[id].names}
    assert with_gradient == expected
    assert all(float(towers.get_parameter(n).grad.abs().sum()) > 0 for n in expected if not n.endswith(".noise"))


def test_nothing_is_kept_for_backward_below_the_first_first_order_unit():
    """Why prefix plans save memory (concepts.md 2.5): the cached_input of the first block has no history."""
    from dist_vlcl.model.units import FlatUnits

    towers = tiny_clip()
    FlatUnits([towers.units[UnitId("vision", layer)] for layer in (1, 2)])
    tower, images = towers.vision, pictures(2)
    x = tower.embed(images)
    for block in tower.blocks[:2]:
        x = block.finish(block.cached_input(x, Context()), {n: t[None] for n, t in block.unit.tensors().items()}, Context())
        assert not x.requires_grad
    assert tower.run(tower.embed(images), images)[0].requires_grad


def test_a_model_that_pools_from_all_positions_computes_all_of_them():
    towers, whole = tiny_clip(double=True), WholeCLIP(double=True)
    class_token = towers.features("vision", pictures(4))
    towers.vision.stem_and_head.visual.pool_type = whole.clip.visual.pool_type = "avg"
    pooled = towers.features("vision", pictures(4))
    torch.testing.assert_close(pooled, whole.features("vision", pictures(4), adapter_values(towers)), **EXACT)
    assert not torch.allclose(pooled, class_token)
