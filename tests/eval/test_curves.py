"""Points of curves over a logarithmic axis."""

import math

import pytest

from vistok.eval.tokens.curves import log_spaced


@pytest.mark.parametrize("last", [1, 2, 63, 1000, 50_000, 1 << 20])
def test_points_reach_from_one_to_the_last_in_even_steps(last):
    points = log_spaced(last)
    assert points[0] == 1 and points[-1] == last and len(points) <= 64
    assert points == sorted(set(points)) and all(type(point) is int for point in points)
    step = math.log(last) / 63
    for one, two in zip(points, points[1:], strict=False):
        assert two == one + 1 or math.log(two / one) < step + 1 / one


def test_nothing_has_no_points():
    assert log_spaced(0) == []
