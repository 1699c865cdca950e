import itertools

import pytest

from dist_vlcl.zo.accept import best_of_three


@pytest.mark.parametrize(("base", "minus", "plus"), itertools.product([1.0, 2.0, 3.0], repeat=3))
def test_the_lowest_of_three_wins_and_ties_go_to_staying_then_minus_then_plus(base, minus, plus):
    lowest = min(base, minus, plus)
    expected = 0.0 if base == lowest else -0.25 if minus == lowest else 0.25
    assert best_of_three(base, minus, plus, 0.25) == expected


def test_at_rate_zero_it_stays():
    assert best_of_three(3.0, 2.0, 1.0, 0.0) == 0.0
