"""The share of a device that executors get: the controller on recorded and simulated signals."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_adrenaline.colocation.controller import Change, Limits, Model, Objectives, Point, ShareController
from vllm_adrenaline.colocation.controller import smallest_prefill_share as smallest

LIMITS = Limits(low=0.1, high=0.9, step=0.05, max_steps=3, window=10)
OBJECTIVES = Objectives(ttft=0.5, tpot=0.05)


def window(controller: ShareController, ttft: float, tpot: float) -> Change:
    for _ in range(LIMITS.window):
        controller.observe_ttft(ttft)
        controller.observe_tpot(tpot)
    return controller.update()


@pytest.mark.parametrize(
    ("ttft", "tpot", "change"),
    [
        (1.0, 0.01, Change.MORE_PREFILL),
        (0.1, 0.10, Change.MORE_ATTENTION),
        (0.1, 0.01, Change.KEPT),
        (1.0, 0.10, Change.KEPT),
    ],
)
def test_only_a_violation_of_one_objective_moves_the_share_and_the_right_way(
    ttft: float, tpot: float, change: Change
) -> None:
    controller = ShareController(OBJECTIVES, LIMITS, 0.5)
    assert window(controller, ttft, tpot) is change
    direction = {Change.MORE_PREFILL: -1, Change.MORE_ATTENTION: 1, Change.KEPT: 0}[change]
    assert (controller.share > 0.5) - (controller.share < 0.5) == direction


@given(st.lists(st.tuples(st.floats(0.001, 10), st.floats(0.001, 10)), max_size=40), st.floats(0, 1))
def test_the_share_stays_within_limits_and_moves_in_bounded_steps(seen: list[tuple[float, float]], at: float) -> None:
    controller = ShareController(OBJECTIVES, LIMITS, at)
    for ttft, tpot in seen:
        before = controller.share
        window(controller, ttft, tpot)
        assert LIMITS.low <= controller.share <= LIMITS.high
        assert abs(controller.share - before) <= LIMITS.step * LIMITS.max_steps + 1e-9


def test_without_a_full_window_nothing_is_decided() -> None:
    controller = ShareController(OBJECTIVES, LIMITS, 0.5)
    controller.observe_ttft(100.0)
    assert controller.update() is Change.KEPT
    assert controller.share == 0.5


@pytest.mark.parametrize("start", [0.1, 0.3, 0.6, 0.9])
def test_it_settles_where_both_objectives_are_met(start: float) -> None:
    """A plant like semi-PD's: both can be met with an executor's share of 0.35 to 0.55."""
    rng = random.Random(1)
    controller = ShareController(Objectives(ttft=0.5, tpot=0.05), LIMITS, start)
    shares = []
    for _ in range(60):
        x, y = 1 - controller.share, controller.share
        for _ in range(LIMITS.window):
            noise = 1 + 0.05 * rng.uniform(-1, 1)
            controller.observe_ttft((0.15 / max(x - 0.1, 0.01) + 0.06) * noise)
            controller.observe_tpot((0.0105 / y + 0.02) * noise)
        controller.update()
        shares.append(controller.share)
    assert len(set(shares[-30:])) == 1, "it has not settled"
    assert 0.33 <= shares[-1] <= 0.57


def test_objectives_that_exclude_each_other_do_not_make_it_swing() -> None:
    controller = ShareController(Objectives(ttft=0.1, tpot=0.01), LIMITS, 0.5)
    turns = []
    for number in range(60):  # by turns a little late here and a little slow there
        change = window(controller, *((0.11, 0.009) if number % 2 else (0.09, 0.011)))
        if change is not Change.KEPT:
            turns.append(change)
    assert len(turns) <= 1 + 60 // LIMITS.patience


def test_a_recorded_burst_moves_it_to_prefill_and_a_recorded_decode_load_back() -> None:
    controller = ShareController(OBJECTIVES, LIMITS, 0.5)
    for ttft in (0.6, 1.4, 1.9, 1.1, 0.7):
        window(controller, ttft, 0.03)
    in_burst = controller.share
    assert in_burst < 0.4
    for _ in range(LIMITS.patience):
        window(controller, 0.2, 0.03)
    assert controller.share == in_burst, "what is fine is kept"
    for tpot in (0.09, 0.08, 0.06):
        window(controller, 0.2, tpot)
    assert controller.share > in_burst


@given(st.floats(0.01, 1), st.floats(0, 0.5), st.sampled_from([0.0, 0.05, 0.1]))
def test_the_models_find_their_parameters_again(a: float, b: float, lam: float) -> None:
    model = Model((0.0, 0.05, 0.1))
    for share in (0.3, 0.5, 0.7, 0.9):
        model.add(Point(share, a / (share - lam) + b))
    assert model.at(0.4) == pytest.approx(a / (0.4 - lam) + b, rel=0.02)


def test_the_smallest_share_that_meets_the_objective() -> None:
    latency = {1.0: 0.2, 0.5: 0.4, 0.25: 0.8}
    assert smallest(latency, 0.4) == pytest.approx(0.5)
    assert smallest(latency, 0.6) == pytest.approx(1 / 3)
    assert smallest(latency, 2.0) == 0.25
    assert smallest(latency, 0.1) == 1.0
