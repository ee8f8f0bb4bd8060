"""Placement by a fixed share."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_adrenaline.placement.policy import Observed, Placement, place


def offloaded_of(ratio: float, count: int, ready: bool = True) -> int:
    offloaded = 0
    for decided in range(count):
        offloaded += place(Observed(ratio, decided, offloaded, ready)) is Placement.OFFLOADED
    return offloaded


@given(st.floats(0, 1), st.integers(0, 300))
def test_the_share_is_kept_at_every_moment(ratio: float, count: int) -> None:
    assert ratio * count - 1 < offloaded_of(ratio, count) <= ratio * count + 1e-6


@pytest.mark.parametrize(("ratio", "expected"), [(0.0, 0), (0.5, 16), (0.7, 22), (1.0, 32)])
def test_exact_counts_of_32_requests(ratio: float, expected: int) -> None:
    assert offloaded_of(ratio, 32) == expected


def test_nothing_is_offloaded_to_an_executor_that_is_away() -> None:
    assert offloaded_of(1.0, 10, ready=False) == 0
