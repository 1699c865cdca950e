import itertools

import pytest
import torch

from dist_vlcl.zo.update import best_of_three, gradient

Z = [torch.tensor([1.0, -2.0, 0.5]), torch.tensor([-3.0, 1.0, 0.5])]


def test_the_estimate_is_the_mean_of_slope_times_direction():
    assert gradient([2.0, -1.0], Z).tolist() == [(2 * 1 + -1 * -3) / 2, (2 * -2 + -1 * 1) / 2, (2 * 0.5 + -1 * 0.5) / 2]


def test_with_one_probe_sign_is_the_sign_of_the_slope_times_the_sign_of_the_direction():
    for slope in (0.3, -0.3, 1e3, 0.0):
        assert torch.equal(gradient([slope], Z[:1]).sign(), Z[0].sign() * ((slope > 0) - (slope < 0)))


@pytest.mark.parametrize(("base", "minus", "plus"), itertools.product([1.0, 2.0, 3.0], repeat=3))
def test_the_lowest_of_three_wins_and_ties_go_to_staying_then_minus_then_plus(base, minus, plus):
    lowest = min(base, minus, plus)
    expected = 0.0 if base == lowest else -0.25 if minus == lowest else 0.25
    assert best_of_three(base, minus, plus, 0.25) == expected


def test_at_rate_zero_it_stays():
    assert best_of_three(3.0, 2.0, 1.0, 0.0) == 0.0
