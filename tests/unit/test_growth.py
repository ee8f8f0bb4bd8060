"""Leases follow what requests will need soon."""

from hypothesis import given
from hypothesis import strategies as st

from vllm_adrenaline.decode.leases import LOOKAHEAD, growth, lease_change

sizes = st.integers(1, 5000)


@given(sizes, sizes, st.integers(0, 50))
def test_a_request_is_provided_for_but_not_beyond_its_end(tokens: int, more: int, held: int) -> None:
    blocks = held + growth(tokens, tokens + more, held, 128)
    assert blocks * 128 >= min(tokens + LOOKAHEAD, tokens + more)
    assert blocks <= max(held, -(-(tokens + more) // 128))


@given(st.lists(st.integers(0, 3)), st.integers(0, 20))
def test_after_the_change_there_is_enough_and_nothing_swings(near: list[int], free: int) -> None:
    far = [n + 1 for n in near]
    after = free + lease_change(free, 0, near, far)
    assert sum(near) <= after
    assert after <= max(free, sum(near))
    assert lease_change(after, 0, near, far) == 0


def test_nothing_is_asked_twice() -> None:
    assert lease_change(0, 4, [3], [3]) == 0
