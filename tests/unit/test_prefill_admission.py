"""How far ahead of their placement a prefill engine computes prompts."""

from __future__ import annotations

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from vllm_adrenaline.placement.prefill_admission import Blocks, should_defer_prefill

LENDING = Blocks(total=80, free=40, growth_reserve=16, waiting=8, lent=True, offers=True)


def test_prompts_are_computed_only_so_far_ahead_while_memory_is_lent() -> None:
    assert not should_defer_prefill(LENDING, 2)
    assert should_defer_prefill(LENDING, 3), "11 of 80 blocks would hold prompts that nobody has placed"
    assert not should_defer_prefill(msgspec.structs.replace(LENDING, lent=False), 3), "nobody else wants the memory"


def test_a_prompt_of_any_length_gets_its_turn_when_none_waits_to_be_placed() -> None:
    assert not should_defer_prefill(msgspec.structs.replace(LENDING, waiting=0), 24)


def test_offloaded_requests_keep_room_to_grow() -> None:
    short = msgspec.structs.replace(LENDING, waiting=0, free=18)
    assert not should_defer_prefill(short, 2)
    assert should_defer_prefill(short, 3)
    assert should_defer_prefill(msgspec.structs.replace(short, lent=False), 3), "what is on offer may be lent next"


@given(st.integers(0, 100), st.integers(0, 100), st.integers(1, 100))
def test_an_engine_that_has_nothing_out_never_waits(free: int, waiting: int, needed: int) -> None:
    assert not should_defer_prefill(Blocks(100, free, 20, waiting, lent=False, offers=False), needed)
