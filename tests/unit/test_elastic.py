"""Which engine does the other's work: the rules, without engines."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_adrenaline.control.messages import Slack
from vllm_adrenaline.decode.own_prompts import OwnPrompts
from vllm_adrenaline.placement import elastic
from vllm_adrenaline.placement.costs import Costs
from vllm_adrenaline.placement.elastic import LEAST_CHUNK, LONGEST_S, SOONER, Cause, Prompt
from vllm_adrenaline.placement.memory import Memory

IDLE = Slack(prompt_rate=1000, prompt_backlog=0, prompt_room=4000)
CURVE = [(100, 0.1), (1000, 1.0), (2000, 3.0)]


def prompt(ahead: float, missing: int = 500, tokens: int = 500, waited: float = 0.0, after: float = 0.0) -> Prompt:
    """A prompt of half a second here; an idle decode engine needs as long. `after`: seconds of what comes after it."""
    own = missing / 1000
    return Prompt(missing, tokens, waited, ahead, own, work=ahead + own + after)


def test_a_prompt_is_handed_over_when_the_decode_side_has_it_clearly_sooner() -> None:
    assert elastic.hand_over(prompt(ahead=0.0), [IDLE], None) is None
    assert elastic.hand_over(prompt(ahead=0.1), [IDLE], None) is None, "not clearly"
    assert elastic.hand_over(prompt(ahead=0.2), [IDLE], None) is Cause.SOONER


def test_with_an_objective_only_a_prompt_that_would_miss_it_is_handed_over() -> None:
    assert elastic.hand_over(prompt(ahead=1.0), [IDLE], 2.0) is None
    assert elastic.hand_over(prompt(ahead=1.0, waited=0.6), [IDLE], 2.0) is Cause.TTFT
    assert elastic.hand_over(prompt(ahead=0.0, waited=9.0), [IDLE], 2.0) is None, "there it would be no sooner"


def test_a_decode_side_that_is_busy_short_of_memory_or_silent_gets_no_prompt() -> None:
    long = prompt(ahead=2.0)
    assert elastic.hand_over(long, [IDLE], None)
    assert not elastic.hand_over(long, [], None)
    for other in (
        Slack(prompt_rate=0, prompt_room=4000),
        Slack(prompt_rate=1000, prompt_backlog=2000, prompt_room=4000),
        Slack(prompt_rate=1000, prompt_room=499),
    ):
        assert not elastic.hand_over(long, [other], None)
        assert not elastic.hand_over(long, [IDLE, other], None), "a router may choose that one"


def test_of_a_prompt_that_is_computed_in_part_only_the_rest_counts_but_all_of_it_needs_memory() -> None:
    assert elastic.hand_over(prompt(ahead=0.2, missing=100, tokens=3000), [IDLE], None)
    assert not elastic.hand_over(prompt(ahead=0.2, missing=100, tokens=5000), [IDLE], None)


def test_a_side_that_will_decode_for_longer_gets_no_prompt_without_an_objective() -> None:
    decoding = Slack(prompt_rate=1000, prompt_room=4000, work=10.0)
    assert elastic.hand_over(prompt(ahead=2.0), [decoding], None) is None
    assert elastic.hand_over(prompt(ahead=2.0, after=11.0), [decoding], None) is Cause.SOONER
    assert elastic.hand_over(prompt(ahead=2.0), [decoding], 1.0) is Cause.TTFT


def test_a_request_stays_where_all_is_done_clearly_sooner() -> None:
    busy, full = Slack(work=10.0), Slack(work=20.0, is_full=True)
    assert elastic.stay(7.9, [busy]) is Cause.SOONER
    assert elastic.stay(8.1, [busy]) is None
    assert elastic.stay(7.9, [full]) is Cause.DECODE_FULL
    assert elastic.stay(7.9, [full, busy]) is Cause.SOONER
    assert elastic.stay(8.1, [full, busy]) is None, "one of them has room, and is as fast"
    assert elastic.stay(0.0, []) is None


def test_work_is_done_when_the_longest_answer_is() -> None:
    costs = Costs([(1, 0.01), (2, 0.015), (3, 0.02)], 0.0, [])
    assert elastic.work_seconds(costs, []) == 0
    assert elastic.work_seconds(costs, [(100, 10)]) == pytest.approx(0.1)
    assert elastic.work_seconds(costs, [(100, 10), (5, 30)]) == pytest.approx(10 * 0.015 + 20 * 0.01)
    assert elastic.work_seconds(costs, [(1, 5), (1, 5), (1, 0)]) == pytest.approx(5 * 0.015)
    attended = Costs([(1, 0.0)], 1e-3, [])
    assert elastic.work_seconds(attended, [(100, 10)]) == pytest.approx(10 * 0.105), "contexts grow meanwhile"


def test_what_a_prompt_takes_lies_on_lines_between_what_was_measured() -> None:
    assert elastic.prompt_seconds(CURVE, 0) == 0
    assert elastic.prompt_seconds(CURVE, 50) == pytest.approx(0.05)
    assert elastic.prompt_seconds(CURVE, 550) == pytest.approx(0.55)
    assert elastic.prompt_seconds(CURVE, 1500) == pytest.approx(2.0)
    assert elastic.prompt_seconds(CURVE, 3000) == pytest.approx(5.0)
    assert elastic.prompt_seconds(CURVE[:1], 300) == pytest.approx(0.1)


@given(st.floats(0, 1), st.floats(1e-6, 1e-2), st.floats(0, 2), st.integers(1, 8192))
def test_a_chunk_keeps_the_step_within_its_limit_or_is_the_least_that_goes_on(
    step: float, per_token: float, limit: float, most: int
) -> None:
    tokens = elastic.chunk(step, per_token, limit, most)
    assert 0 < tokens <= most
    if step == 0:
        assert tokens == 1 or per_token * tokens <= LONGEST_S * (1 + 1e-9)
    elif tokens > min(LEAST_CHUNK, most):
        assert step + per_token * tokens <= limit * (1 + 1e-9)


@given(st.floats(0, 10), st.integers(1, 4000), st.floats(0, 1e5), st.integers(0, 10_000))
def test_what_is_handed_over_is_sooner_there_by_what_both_sides_say(
    ahead: float, missing: int, rate: float, backlog: int
) -> None:
    side = Slack(prompt_rate=rate, prompt_backlog=backlog, prompt_room=4000)
    if elastic.hand_over(prompt(ahead, missing, missing), [side], None):
        assert (backlog + missing) / rate < SOONER * (ahead + missing / 1000)


def own(tpot_slo: float | None = None, takes_over: bool = True) -> OwnPrompts:
    """Prompts of an engine whose largest measured step, 100 rows, takes 100 ms."""
    return OwnPrompts(Costs([(1, 0.01), (100, 0.1)], 1e-6, []), tpot_slo, 2048, takes_over)


def test_beside_decodes_a_chunk_lengthens_the_step_by_half_or_up_to_the_objective() -> None:
    assert own().chunk(0.0) == 500, "half a second, for who will decode next"
    assert own().chunk(0.2) == 100
    assert own(tpot_slo=0.25).chunk(0.2) == pytest.approx(50, abs=1)
    assert own(tpot_slo=0.1).chunk(0.2) == LEAST_CHUNK, "no prompt waits for ever"


def test_what_a_token_of_a_prompt_costs_is_learned_from_steps_with_prompts() -> None:
    found = own()
    for _ in range(50):
        found.observe(0.2 + 100 * 0.002, 0.2, [1, 1, 100])
    assert found.chunk(0.2) == pytest.approx(50, abs=1)
    found.observe(9.0, 0.2, [1, 1, 2])  # so few that something else took the time
    assert found.chunk(0.2) == pytest.approx(50, abs=1)


def test_what_prefill_engines_are_told_leaves_room_for_all_that_is_here() -> None:
    def told(*rows: tuple[int, int], is_full: bool = False, takes_over: bool = True) -> Slack:
        memory = Memory(100, 16, rows)
        return own(takes_over=takes_over).slack(0.2, 4.0, memory, growth=20, missing=7, is_full=is_full)

    rate, work = pytest.approx(100 / 0.3), pytest.approx(4.007)
    assert told() == Slack(prompt_rate=rate, prompt_backlog=7, prompt_room=93 * 16 - 20, work=work)
    assert told((160, 0)).prompt_room == 83 * 16 - 20
    assert told((1600, 0)).prompt_room == 0
    assert told(is_full=True).prompt_rate == 0
    assert told(takes_over=False).prompt_rate == 0
    assert not math.isnan(told().prompt_rate)
