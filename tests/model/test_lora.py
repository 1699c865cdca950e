"""Low-rank adapters against what they mean: a low-rank change of open_clip's own weights."""

import math

import pytest
import torch

from dist_vlcl.model.lora import LoRAAdapter, LoRAConfig
from dist_vlcl.options import validate
from tests.helpers.tiny_clip import MLP_LORA, NAMES, WholeCLIP, adapter_values, merged_lora, pictures, tiny_clip


@pytest.mark.parametrize(
    "config",
    [LoRAConfig(rank=3), LoRAConfig(rank=2, targets=["q"], scale=0.5), LoRAConfig(rank=4, targets=["q", "k", "v"], alpha=2.0)],
    ids=lambda config: "".join(config.targets),
)
def test_lora_on_the_projections_is_a_low_rank_change_of_their_weights(config):
    towers = tiny_clip(adapter=config, double=True)
    whole = merged_lora(WholeCLIP(config, double=True), towers.units, config)
    for branch, inputs, named in (("vision", pictures(3), pictures(3)), ("language", towers.prompts(NAMES), NAMES)):
        torch.testing.assert_close(towers.features(branch, inputs), whole.features(branch, named, {}), rtol=1e-9, atol=1e-10)


def test_lora_in_the_place_of_the_experts_adds_up_down_of_their_input():
    towers = tiny_clip(adapter=MLP_LORA, double=True)
    whole = WholeCLIP(MLP_LORA, double=True)
    for branch, inputs, named in (("vision", pictures(3), pictures(3)), ("language", towers.prompts(NAMES), NAMES)):
        expected = whole.features(branch, named, adapter_values(towers))
        torch.testing.assert_close(towers.features(branch, inputs), expected, rtol=1e-9, atol=1e-10)


def test_alpha_gives_the_scale_alpha_over_rank():
    make = lambda **options: LoRAAdapter(8, LoRAConfig(rank=4, **options), torch.Generator().manual_seed(0)).scale  # noqa: E731
    assert (make(), make(scale=0.5), make(alpha=2.0)) == (1.0, 0.5, 0.5)


def test_down_starts_kaiming_uniform_and_up_at_zero():
    adapter = LoRAAdapter(512, LoRAConfig(), torch.Generator().manual_seed(0))
    for target in ("k", "v"):
        down = getattr(adapter, f"{target}_down").detach()
        assert down.shape == (10, 512)
        assert down.abs().max() <= 512**-0.5
        assert float(down.std()) == pytest.approx(512**-0.5 / math.sqrt(3), rel=0.03)
        assert getattr(adapter, f"{target}_up").abs().max() == 0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"rank": 0}, "adapter.rank=0: give a number of at least 1"),
        ({"targets": []}, "adapter.targets=[]: choose from q, k, v, or [mlp] alone"),
        ({"targets": ["o"]}, "adapter.targets=['o']"),
        ({"targets": ["mlp", "k"]}, "adapter.targets=['mlp', 'k']"),
    ],
)
def test_impossible_targets_are_refused_with_a_reason(options, words):
    with pytest.raises(ValueError) as caught:
        validate(LoRAConfig(**options), "adapter")
    assert words in str(caught.value)
