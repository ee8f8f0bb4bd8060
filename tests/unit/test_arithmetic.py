"""Whole-number arithmetic."""

from hypothesis import given
from hypothesis import strategies as st

from vllm_adrenaline.system.arithmetic import cdiv


@given(a=st.integers(0, 10**15), b=st.integers(1, 10**6))
def test_cdiv_is_the_least_number_of_parts_that_hold_all(a: int, b: int) -> None:
    assert cdiv(a, b) * b >= a > (cdiv(a, b) - 1) * b
