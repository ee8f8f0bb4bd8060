"""How long a step waits for executors, and when one that failed is tried again."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from vllm_adrenaline.placement.breaker import HEALTHY_S, MAX_PAUSE_S, MIN_PAUSE_S, Breaker
from vllm_adrenaline.placement.patience import FLOOR_S, HARD, LOOK_S, STEPS, Patience

seconds = st.floats(0, 100)


def after(waits: list[float], timeout_s: float = 1.0) -> tuple[float, float]:
    patience = Patience(timeout_s)
    for each in waits:
        patience.observe(each)
    return patience.budget


@given(st.lists(seconds, max_size=200), st.floats(0.01, 200))
def test_a_budget_is_within_its_bounds_whatever_was_seen(waits: list[float], timeout_s: float) -> None:
    soft, hard = after(waits, timeout_s)
    assert min(FLOOR_S, timeout_s) <= soft <= hard
    assert timeout_s <= hard <= max(timeout_s, HARD * max(waits, default=0))


def test_short_steps_have_the_floor_and_a_second() -> None:
    assert after([]) == after([0.01] * 100) == (FLOOR_S, 1.0)


def test_steps_that_usually_wait_long_are_not_given_up_for_it() -> None:
    soft, hard = after([0.1] * STEPS)
    assert 0.3 < soft < 0.5
    assert hard == 1.0
    assert after([2.0] * STEPS) == (LOOK_S, 4.0), "but who does not work is found out all the same"


@given(st.lists(st.floats(0, 0.05), min_size=STEPS, max_size=STEPS), st.lists(seconds, max_size=STEPS // 16))
def test_a_few_odd_steps_change_nothing(usual: list[float], odd: list[float]) -> None:
    assert after(usual + odd) == (FLOOR_S, 1.0)


@given(st.lists(st.booleans(), max_size=30))
def test_pauses_grow_to_the_longest_and_health_alone_makes_them_short_again(healthy: list[bool]) -> None:
    breaker, now = Breaker(), 0.0
    expected = MIN_PAUSE_S
    assert breaker.fail(now) == expected
    for is_healthy in healthy:
        now = breaker.retry_at
        breaker.close(now)
        now += HEALTHY_S + 1 if is_healthy else HEALTHY_S / 2
        expected = MIN_PAUSE_S if is_healthy else min(2 * expected, MAX_PAUSE_S)
        assert breaker.fail(now) == expected
        assert breaker.retry_at == now + expected


def test_a_trial_that_fails_makes_the_pause_longer() -> None:
    breaker = Breaker()
    assert [breaker.fail(t) for t in (0, 1, 3, 7, 15, 31, 63, 123)] == [1, 2, 4, 8, 16, 32, 60, 60]
