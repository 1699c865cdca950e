"""QuickGELU is open_clip's, and keeps half as much."""

import torch
from open_clip.transformer import QuickGELU as OpenClipQuickGELU

from benchmarks.common import saved_bytes
from dist_vlcl.model.activation import QuickGELU


def draw(dtype=torch.float32):
    return (torch.randn(40, 30, generator=torch.Generator().manual_seed(0), dtype=dtype) * 3).requires_grad_()


def test_quick_gelu_is_open_clip_s_to_the_bit_and_its_derivative_is_right():
    assert torch.equal(QuickGELU()(draw()), OpenClipQuickGELU()(draw()))
    assert torch.autograd.gradcheck(QuickGELU(), draw(torch.float64))


def test_quick_gelu_keeps_its_input_only():
    assert saved_bytes(lambda: QuickGELU()(draw())) == 40 * 30 * 4
    assert saved_bytes(lambda: OpenClipQuickGELU()(draw())) == 2 * 40 * 30 * 4
