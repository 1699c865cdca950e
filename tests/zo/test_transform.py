import pytest
import torch

from dist_vlcl.zo.transform import Adam, gradient, transformed


def direction(slopes, directions, transform):
    return transformed(gradient(slopes, directions), slopes, directions, transform)


Z = [torch.tensor([1.0, -2.0, 0.5]), torch.tensor([-3.0, 1.0, 0.5])]


@pytest.mark.parametrize(
    ("transform", "expected"),
    [
        ("identity", [(2 * 1 + -1 * -3) / 2, (2 * -2 + -1 * 1) / 2, (2 * 0.5 + -1 * 0.5) / 2]),
        ("sign", [1.0, -1.0, 1.0]),  # of the mean, element by element: eq. 3 and 4
        ("sign_scalar", [(1 + 3) / 2, (-2 - 1) / 2, 0.0]),  # ZO-LLM's sign(s) z
    ],
)
def test_the_transforms_on_two_probes(transform, expected):
    assert direction([2.0, -1.0], Z, transform).tolist() == expected


@pytest.mark.parametrize("transform", ["identity", "sign", "sign_scalar"])
def test_a_slope_of_zero_moves_nothing(transform):
    assert direction([0.0], Z[:1], transform).tolist() == [0, 0, 0]


def test_with_one_probe_sign_is_the_sign_of_the_slope_times_the_sign_of_the_direction():
    for slope in (0.3, -0.3, 1e3):
        assert torch.equal(direction([slope], Z[:1], "sign"), Z[0].sign() * (1 if slope > 0 else -1))


def test_adam_moves_as_torch_does_on_the_same_gradients():
    generator = torch.Generator().manual_seed(0)
    values = {b: torch.randn(n, generator=generator, dtype=torch.float64) for b, n in (("language", 5), ("vision", 3))}
    theirs = {b: v.clone().requires_grad_() for b, v in values.items()}
    torch_adam, ours = torch.optim.Adam(theirs.values(), lr=0.1), Adam()
    for step in range(20):
        gradients = {b: torch.randn(v.shape, generator=generator, dtype=torch.float64) * 10 ** (step % 4 - 2) for b, v in values.items()}
        for branch, v in theirs.items():
            v.grad = gradients[branch].clone()
        torch_adam.step()
        for branch, direction in ours(gradients).items():
            values[branch] -= 0.1 * direction
        ours.commit()
    for branch, v in theirs.items():
        torch.testing.assert_close(values[branch], v.detach(), rtol=1e-12, atol=1e-12)


def test_adam_forgets_a_call_that_is_not_committed():
    asked, fresh, g = Adam(), Adam(), {"vision": torch.tensor([1.0, -2.0])}
    asked({"vision": torch.tensor([5.0, 5.0])})
    assert torch.equal(asked(g)["vision"], fresh(g)["vision"]) and asked.moments == {}
