"""Arithmetic for modules that run without vLLM."""

from hypothesis import given
from hypothesis import strategies as st

from vllm_adrenaline.system.arithmetic import cdiv, neighbours, on_line


@given(a=st.integers(0, 10**15), b=st.integers(1, 10**6))
def test_cdiv_is_the_least_number_of_parts_that_hold_all(a: int, b: int) -> None:
    assert cdiv(a, b) * b >= a > (cdiv(a, b) - 1) * b


POINTS = [(1, 10.0), (4, 40.0), (8, 20.0)]


def test_neighbours_are_around_or_the_outermost_and_a_point_ends_its_stretch() -> None:
    assert neighbours(POINTS, 0.5) == neighbours(POINTS, 1) == neighbours(POINTS, 4) == (POINTS[0], POINTS[1])
    assert neighbours(POINTS, 4.1) == neighbours(POINTS, 8) == neighbours(POINTS, 99) == (POINTS[1], POINTS[2])


@given(st.floats(-10, 20))
def test_between_two_points_their_line_goes_through_both(x: float) -> None:
    low, high = neighbours(POINTS, x)
    assert (on_line(low, high, low[0]), on_line(low, high, high[0])) == (low[1], high[1])
    assert low[0] < high[0]
