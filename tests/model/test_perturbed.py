"""A Perturbed is the finite difference: f(base + change) - f(base), for the functions that the model is made of, and for any other."""

# K perturbations, B samples, L tokens, D width

import pytest
import torch
import torch.nn.functional as F

from dist_vlcl.model.activation import QuickGELU
from dist_vlcl.model.moe import choices, linear
from dist_vlcl.model.perturbed import Perturbed
from dist_vlcl.model.tower import attention

K, B, L, D = 3, 2, 5, 8


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def perturbed(*shape, seed=0, by=1e-3):
    return Perturbed(draw(1, *shape[1:], seed=seed), draw(*shape, seed=seed + 1) * by)


WEIGHT, BIAS = draw(6, D, seed=5), draw(6, seed=6)
SEEN = torch.tensor([[[True, False, False, False, False], [True, True, True, False, False]]]).expand(B, -1, -1)
FUNCTIONS = {
    "sum": lambda x, y, w: x + y + 1.0,
    "difference": lambda x, y, w: 2.0 - x - y,
    "differences by torch's function": lambda x, y, w: torch.sub(x, y) * torch.sub(draw(1, B, L, D), y) + torch.sub(x, draw(1, B, L, D)),
    "product": lambda x, y, w: 3 * x * y,
    "quotient": lambda x, y, w: x / (y * y + 1),
    "with a tensor": lambda x, y, w: draw(B, L, D) * x + draw(1, 1, 1, D),
    "shapes": lambda x, y, w: torch.cat([x.flatten(-2).unflatten(-1, (L, D)), -y], -1).transpose(1, 2).chunk(2, -1)[1][:, :, 0],
    "a frozen projection": lambda x, y, w: F.linear(x, WEIGHT, BIAS),
    "a perturbed projection": lambda x, y, w: linear(x, w, w[..., 0]),
    "a perturbed projection of what is not": lambda x, y, w: linear(draw(1, B, L, D), w),
    "pairs": lambda x, y, w: x @ y.transpose(-1, -2),
    "layer norm": lambda x, y, w: F.layer_norm(x, (D,), draw(D, seed=7), draw(D, seed=8)),
    "softmax": lambda x, y, w: x.softmax(-1),
    "gelu": lambda x, y, w: F.gelu(x),
    "quick gelu": lambda x, y, w: QuickGELU()(x),
    "relu": lambda x, y, w: x.relu(),
    "softplus": lambda x, y, w: F.softplus(x),
    "choices": lambda x, y, w: choices(x, 2) @ y[..., None, :, None].flatten(-3, -2),
    "attention": lambda x, y, w: attention(x, y, x * y, 2, False, None),
    "causal attention": lambda x, y, w: attention(x, y, x * y, 2, True, None),
    "attention of two": lambda x, y, w: attention(x[:, :, :2], y, x * y, 2, True, SEEN),
    "size and power": lambda x, y, w: abs(x) * y**2,
    "what no rule is for": lambda x, y, w: torch.atan2(x, y).cumsum(-1).tanh(),
}


@pytest.mark.parametrize("by", [1e-3, 1.0])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_function_s_change_is_the_difference_of_two_evaluations_whatever_the_size_of_the_perturbation(name, by):
    x, y, w = perturbed(K, B, L, D, by=by), perturbed(K, B, L, D, seed=2, by=by), perturbed(K, 6, D, seed=4, by=by)
    result = FUNCTIONS[name](x, y, w)
    before, after = FUNCTIONS[name](x.base, y.base, w.base), FUNCTIONS[name](x.moved, y.moved, w.moved)
    torch.testing.assert_close(result.base, before, rtol=0, atol=1e-12)
    torch.testing.assert_close(result.change, after - before, rtol=0, atol=1e-12)
    assert result.shape == after.shape and float(result.change.abs().max()) > 0


@pytest.mark.parametrize("function", [torch.cat, torch.stack])
def test_a_tensor_beside_a_pair_does_not_change(function):
    x, tensor = perturbed(1, B, L, D), draw(1, B, L, D, seed=9)
    result = function([tensor, x], -1)
    before, after = function([tensor, x.base], -1), function([tensor, x.moved], -1)
    assert torch.equal(result.base, before)
    torch.testing.assert_close(result.change, after - before, rtol=0, atol=1e-12)


def test_in_bf16_the_rounding_of_a_product_is_relative_to_the_change_and_in_two_evaluations_to_the_value():
    weight = draw(64, 64, seed=1)
    x = Perturbed(draw(1, 4, 64), draw(1, 4, 64, seed=2) * 1e-4)
    exact = x.change @ weight
    narrow = Perturbed(x.base.float(), x.change.float()).to(torch.bfloat16)
    change = (narrow @ weight.bfloat16()).change
    twice = (x.moved.bfloat16() @ weight.bfloat16()).double() - (x.base.bfloat16() @ weight.bfloat16()).double()
    assert change.dtype == torch.float32
    assert float((change - exact).norm() / exact.norm()) < 0.01
    assert float((twice - exact).norm() / exact.norm()) > 1


def test_a_perturbed_tensor_is_not_changed_in_place():
    with pytest.raises(TypeError, match=r"mul_: a Perturbed tensor cannot be changed in place; use mul"):
        perturbed(K, B).mul_(2)
