"""The mixture of experts against concepts.md 1.1 and 1.2, written as a loop."""

# K parameter sets, B samples, L tokens, D width, E experts, r bottleneck

import math

import pytest
import torch

from dist_vlcl.model.moe import MoEAdapter, MoEConfig, linear
from dist_vlcl.options import validate
from tests.helpers.tiny_clip import moe_by_loop

B, L, D = 5, 7, 12


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def sets_of(adapter, count, seed=0):
    """Return random values `[K, ...]` of every tensor."""
    return {name: draw(count, *p.shape, seed=seed + k) for k, (name, p) in enumerate(adapter.named_parameters())}


def adapter_of(**options):
    return MoEAdapter(D, MoEConfig(bottleneck=4, **options), torch.Generator().manual_seed(0)).double()


@pytest.mark.parametrize("with_dropout", [False, True])
@pytest.mark.parametrize("with_noise", [False, True])
@pytest.mark.parametrize(("experts", "top_k"), [(2, 2), (2, 1), (3, 2), (4, 4), (1, 1)])
def test_the_fused_experts_are_the_sum_over_gated_experts(experts, top_k, with_noise, with_dropout):
    adapter = adapter_of(experts=experts, top_k=top_k, dropout=0.25)
    values, u = sets_of(adapter, 1), draw(B, L, D, seed=50)
    noise = draw(B, experts, seed=51) if with_noise else None
    dropout_mask = draw(B, L, top_k * 4, seed=52) > -0.7 if with_dropout else None
    expected = moe_by_loop(u, {name: value[0] for name, value in values.items()}, adapter.config, noise, dropout_mask)
    torch.testing.assert_close(adapter(u[None], values, noise, dropout_mask), expected[None], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("shared_input", [True, False])
@pytest.mark.parametrize("top_k", [2, 1])
def test_k_sets_at_once_are_k_sets_one_by_one(top_k, shared_input):
    adapter, copies = adapter_of(top_k=top_k), 3
    values, u = sets_of(adapter, copies), draw(1 if shared_input else copies, B, L, D, seed=50)
    noise, dropout_mask = draw(B, 2, seed=51), draw(B, L, top_k * 4, seed=52) > 0
    together = adapter(u, values, noise, dropout_mask)
    for k in range(copies):
        alone = adapter(u[[0 if shared_input else k]], {name: value[[k]] for name, value in values.items()}, noise, dropout_mask)
        torch.testing.assert_close(together[[k]], alone, rtol=1e-10, atol=1e-12)


def test_only_token_0_routes():
    """Vision routes by the class token, text by the start of text (concepts.md 1.2)."""
    adapter = adapter_of()
    values, u, noise = sets_of(adapter, 1), draw(1, B, L, D, seed=50), draw(B, 2, seed=51)
    moved = u.clone()
    moved[:, :, 1:] += 1
    torch.testing.assert_close(adapter(moved, values, noise, None)[:, :, 0], adapter(u, values, noise, None)[:, :, 0])


def test_gates_are_a_softmax_over_the_chosen_and_zero_elsewhere():
    adapter = adapter_of(experts=4, top_k=2)
    gates, chosen = adapter.gates(draw(1, B, D, seed=1), sets_of(adapter, 1), draw(B, 4, seed=2))
    torch.testing.assert_close(gates.sum(-1), torch.ones(1, B, dtype=torch.float64))
    assert gates.shape == (1, B, 2) and (gates > 0).all()
    assert (chosen.sum(-1) == 1).all() and (chosen.sum(-2) <= 1).all()  # each place one expert, no expert twice


def test_fresh_gates_are_softmax_of_0_703_times_normal_noise():
    """sigma = softplus(0) + 0.01 (concepts.md 1.2)."""
    adapter, noise = adapter_of(), draw(B, 2, seed=3)
    fresh = {name: p.detach()[None] for name, p in adapter.named_parameters()}
    expected = torch.softmax((math.log(2) + 0.01) * noise, -1)
    torch.testing.assert_close(adapter.gates(draw(1, B, D), fresh, noise)[0][0], expected)


def test_a_fresh_adapter_adds_nothing_and_starts_as_the_baseline_does():
    adapter = MoEAdapter(512, MoEConfig(), torch.Generator().manual_seed(0))
    fresh = {name: p.detach()[None] for name, p in adapter.named_parameters()}
    assert adapter(torch.randn(1, 2, 3, 512), fresh, torch.randn(2, 2), None).abs().max() == 0
    assert [name for name, value in fresh.items() if value.abs().max() > 0] == ["down_weight"]
    down = fresh["down_weight"]
    assert down.abs().max() <= 512**-0.5
    assert float(down.std()) == pytest.approx(512**-0.5 / 3**0.5, rel=0.02)  # U(-1/sqrt d, 1/sqrt d)


def test_every_parameter_has_a_gradient_with_and_without_noise():
    """DDP and ZeRO want every parameter used in every backward; so also experts that nobody chose."""
    for adapter in (adapter_of(), adapter_of(experts=7, top_k=1)):
        for noise in (draw(B, adapter.config.experts), None):
            adapter.zero_grad()
            adapter(draw(1, B, L, D), {name: p[None] for name, p in adapter.named_parameters()}, noise, None).sum().backward()
            assert all(p.grad is not None for p in adapter.parameters())


@pytest.mark.parametrize("copies", [1, 3])
def test_linear_is_a_matrix_product_per_set(copies):
    x, weight, bias = draw(1, B, L, D), draw(copies, 6, D, seed=1), draw(copies, 6, seed=2)
    expected = torch.einsum("bld,kod->kblo", x[0], weight)
    torch.testing.assert_close(linear(x, weight), expected)
    torch.testing.assert_close(linear(x, weight, bias), expected + bias[:, None, None])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"top_k": 3}, "adapter.top_k=3: choose from 1 to adapter.experts=2"),
        ({"top_k": 0}, "adapter.top_k=0"),
        ({"bottleneck": 0}, "adapter.bottleneck=0: give a number of at least 1"),
        ({"dropout": 1.0}, "adapter.dropout=1.0: give a number of at least 0 and less than 1"),
    ],
)
def test_impossible_experts_are_refused_with_a_reason(options, words):
    with pytest.raises(ValueError) as caught:
        validate(MoEConfig(**options), "adapter")
    assert words in str(caught.value)


def test_a_sample_is_weighed_the_same_in_any_company():
    """Ranks cut a batch differently; float32 exp on a CPU has other bits in a tensor's tail."""
    adapter, draws = adapter_of().float(), torch.Generator().manual_seed(0)
    values = {name: value.float() for name, value in sets_of(adapter, 1).items()}
    for _ in range(20):
        first, noise = torch.randn(1, 37, D, generator=draws) / 4, torch.randn(37, 2, generator=draws)
        whole, _ = adapter.gates(first, values, noise)
        for low, high in [(0, 17), (5, 22), (5, 23), (9, 26), (20, 37)]:
            assert torch.equal(adapter.gates(first[:, low:high], values, noise[low:high])[0], whole[:, low:high])
