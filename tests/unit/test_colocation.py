"""The shares of a device: what the controller decides on recorded and simulated signals."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_adrenaline.colocation.controller import Change, Limits, Objectives, Phase, ShareController, Shares

PREFILL, DECODE = Phase.PREFILL, Phase.DECODE
LIMITS = Limits(low=0.1, step=0.05, max_steps=3, window=10)
OBJECTIVES = Objectives(ttft=0.5, tpot=0.05)
FAILS, MET = {PREFILL: 1.0, DECODE: 0.1}, {PREFILL: 0.1, DECODE: 0.01}
"""Seconds by which a phase violates its objective, and by which it meets it."""
SECONDS = st.floats(0.001, 10)
SHARES = st.builds(Shares, st.floats(0, 1), st.floats(0, 1))
WINDOWS = st.lists(st.tuples(SECONDS, SECONDS), max_size=40)


def window(controller: ShareController, ttft: float, tpot: float) -> Change:
    for _ in range(LIMITS.window):
        controller.observe_ttft(ttft)
        controller.observe_tpot(tpot)
    return controller.update()


def failing(phase: Phase) -> tuple[float, float]:
    """Return a TTFT and a TPOT of which only that of a phase violates its objective."""
    ttft, tpot = ((FAILS if each is phase else MET)[each] for each in (PREFILL, DECODE))
    return ttft, tpot


# Which share moves


@pytest.mark.parametrize(
    ("ttft", "tpot", "change"),
    [
        (*failing(PREFILL), Change.MORE_PREFILL),
        (*failing(DECODE), Change.MORE_DECODE),
        (MET[PREFILL], MET[DECODE], Change.KEPT),
        (FAILS[PREFILL], FAILS[DECODE], Change.KEPT),
    ],
)
def test_only_a_violation_of_one_objective_moves_a_share(ttft: float, tpot: float, change: Change) -> None:
    controller = ShareController(OBJECTIVES, LIMITS, Shares(0.5, 0.5))
    assert window(controller, ttft, tpot) is change
    assert (controller.shares == Shares(0.5, 0.5)) is (change is Change.KEPT)


@pytest.mark.parametrize("phase", list(Phase))
def test_the_failing_phase_grows_and_the_other_keeps_its_share_until_it_cannot_grow(phase: Phase) -> None:
    controller = ShareController(OBJECTIVES, LIMITS, Shares(0.6, 0.6))
    seen = []
    for _ in range(3):
        window(controller, *failing(phase))
        seen.append((controller.shares.of(phase), controller.shares.of(phase.other)))
    assert seen == [(0.75, 0.6), (0.9, 0.6), (1.0, 0.55)], "at 1 the other one shrinks, in the same decision"


def test_both_may_use_the_whole_device_and_get_half_of_it() -> None:
    shares = ShareController(OBJECTIVES, LIMITS, Shares(1.0, 1.0)).shares
    assert shares == Shares(1.0, 1.0)
    assert shares.part(PREFILL) == shares.part(DECODE) == 0.5


@pytest.mark.parametrize("phase", list(Phase))
def test_the_other_shrinks_to_its_least_if_it_has_no_objective(phase: Phase) -> None:
    alone = Objectives(ttft=0.5) if phase is PREFILL else Objectives(tpot=0.05)
    controller = ShareController(alone, LIMITS, Shares(1.0, 1.0))
    for _ in range(20):
        window(controller, *failing(phase))
    assert controller.shares.of(phase) == 1.0
    assert controller.shares.of(phase.other) == LIMITS.low


def test_the_other_shrinks_only_as_far_as_its_own_objective_is_met() -> None:
    controller = ShareController(OBJECTIVES, LIMITS, Shares(1.0, 1.0))
    for _ in range(20):
        window(controller, 1.0, 0.02 / controller.shares.part(DECODE))  # met with 0.4 of the device
    assert 0.4 <= controller.shares.part(DECODE) < 0.42


def test_it_stops_where_the_failing_phase_has_enough_by_its_model() -> None:
    controller = ShareController(OBJECTIVES, LIMITS, Shares(0.5, 1.0))
    window(controller, 0.51, 0.01)
    assert controller.shares == Shares(0.55, 1.0)


@given(WINDOWS, SHARES)
def test_the_shares_stay_within_limits_and_move_in_bounded_steps(seen: list[tuple[float, float]], at: Shares) -> None:
    controller = ShareController(OBJECTIVES, LIMITS, at)
    for ttft, tpot in seen:
        before = controller.shares
        window(controller, ttft, tpot)
        moves = [abs(controller.shares.of(phase) - before.of(phase)) for phase in Phase]
        assert all(LIMITS.low <= controller.shares.of(phase) <= 1 for phase in Phase)
        assert sum(moves) <= LIMITS.step * LIMITS.max_steps + 1e-9


@given(WINDOWS, SHARES)
def test_the_failing_phase_never_shrinks_nor_the_other_grows(seen: list[tuple[float, float]], at: Shares) -> None:
    controller = ShareController(OBJECTIVES, LIMITS, at)
    for ttft, tpot in seen:
        before, is_late, is_slow = controller.shares, ttft > 0.5, tpot > 0.05
        window(controller, ttft, tpot)
        if is_late == is_slow:
            assert controller.shares == before, "both fail or both are met"
            continue
        phase = PREFILL if is_late else DECODE
        assert controller.shares.of(phase) >= before.of(phase)
        assert controller.shares.of(phase.other) <= before.of(phase.other)


@given(WINDOWS, SHARES)
def test_no_phase_shrinks_before_the_other_is_at_1_nor_past_its_own_objective(
    seen: list[tuple[float, float]], at: Shares
) -> None:
    controller = ShareController(OBJECTIVES, LIMITS, at)
    for ttft, tpot in seen:
        before = controller.shares
        window(controller, ttft, tpot)
        for phase in Phase:
            if controller.shares.of(phase) < before.of(phase):
                objective = OBJECTIVES.of(phase)
                assert objective is not None
                assert controller.shares.of(phase.other) == 1.0
                assert controller.expected(phase, controller.shares) <= objective


@given(st.floats(0, 1))
def test_shares_that_divide_a_device_leave_nothing_of_it(decode: float) -> None:
    shares = Shares.dividing(decode, low=0.1)
    assert max(shares.prefill, shares.decode) == 1.0
    assert shares.part(DECODE) == pytest.approx(min(max(decode, 1 / 11), 10 / 11), abs=1e-6)


# When it decides


def test_without_a_full_window_nothing_is_decided() -> None:
    controller = ShareController(OBJECTIVES, LIMITS, Shares(0.5, 0.5))
    controller.observe_ttft(100.0)
    assert controller.update() is Change.KEPT
    assert controller.shares == Shares(0.5, 0.5)


def test_what_was_observed_during_a_change_counts_for_nothing() -> None:
    controller = ShareController(OBJECTIVES, LIMITS, Shares(0.5, 0.5))
    for _ in range(LIMITS.window):
        controller.observe_ttft(100.0)
    controller.discard()
    assert controller.update() is Change.KEPT
    assert window(controller, 0.1, 0.01) is Change.KEPT
    assert controller.shares == Shares(0.5, 0.5)
    assert controller.expected(PREFILL, controller.shares) == pytest.approx(0.1), "nor for the models"


def test_objectives_that_exclude_each_other_do_not_make_it_swing() -> None:
    controller = ShareController(Objectives(ttft=0.1, tpot=0.01), LIMITS, Shares(0.5, 0.5))
    turns = []
    for number in range(60):  # by turns a little late here and a little slow there
        change = window(controller, *((0.11, 0.009) if number % 2 else (0.09, 0.011)))
        if change is not Change.KEPT:
            turns.append(change)
    assert len(turns) <= 1 + 60 // LIMITS.patience


def test_a_recorded_burst_moves_it_to_prefill_and_a_recorded_decode_load_back() -> None:
    controller = ShareController(OBJECTIVES, LIMITS, Shares(1.0, 1.0))
    for ttft in (0.6, 1.4, 1.9, 1.1, 0.7):
        window(controller, ttft, 0.03)
    in_burst = controller.shares
    assert in_burst.part(PREFILL) > 0.6
    for _ in range(LIMITS.patience):
        window(controller, 0.2, 0.03)
    assert controller.shares == in_burst, "what is fine is kept"
    for tpot in (0.09, 0.08, 0.06):
        window(controller, 0.2, tpot)
    assert controller.shares.part(PREFILL) < in_burst.part(PREFILL)


# On plants like semi-PD's


@pytest.mark.parametrize("start", [Shares(1.0, 0.1), Shares(1.0, 1.0), Shares(0.3, 0.3), Shares(0.1, 1.0)])
def test_it_settles_where_both_objectives_are_met(start: Shares) -> None:
    """Both can be met with 0.35 to 0.55 of the device for decode."""
    rng = random.Random(1)
    controller = ShareController(OBJECTIVES, LIMITS, start)
    seen = []
    for _ in range(60):
        x, y = (controller.shares.part(phase) for phase in Phase)
        for _ in range(LIMITS.window):
            noise = 1 + 0.05 * rng.uniform(-1, 1)
            controller.observe_ttft((0.15 / max(x - 0.1, 0.01) + 0.06) * noise)
            controller.observe_tpot((0.0105 / y + 0.02) * noise)
        controller.update()
        seen.append(controller.shares)
    assert len(set(seen[-30:])) == 1, "it has not settled"
    assert 0.33 <= seen[-1].part(DECODE) <= 0.57


@dataclass(frozen=True)
class Load:
    """Prompts a second, seconds of a mean prompt and of a token, both on the whole device."""

    rate: float
    prompt: float
    token: float


@dataclass
class Plant:
    """A device that computes prompts one after the other (M/M/1) while it decodes."""

    seed: int
    now: float = 0.0
    free_at: float = 0.0
    rng: random.Random = field(init=False)

    def __post_init__(self) -> None:
        self.rng = random.Random(self.seed)

    def serve(self, shares: Shares, load: Load) -> tuple[float, float]:
        """Serve the next request; return its TTFT and its TPOT."""
        self.now += self.rng.expovariate(load.rate)
        prompt = self.rng.expovariate(shares.part(PREFILL) / load.prompt)
        self.free_at = max(self.now, self.free_at) + prompt
        return self.free_at - self.now, load.token / shares.part(DECODE) * self.rng.uniform(0.95, 1.05)


GOALS = Objectives(ttft=0.5, tpot=0.04)
MANY_PROMPTS = Load(rate=8.0, prompt=0.05, token=0.006)
"""Meets its objectives with 0.63 to 0.84 of the device for prefill."""
LONG_DECODES = Load(rate=1.0, prompt=0.05, token=0.02)
"""Meets its objectives with 0.28 to 0.47 of the device for prefill."""
DAY = [MANY_PROMPTS, LONG_DECODES, MANY_PROMPTS, LONG_DECODES]
REQUESTS = 4000
"""Of each part of the day."""


def is_good(ttft: float, tpot: float) -> bool:
    assert GOALS.ttft is not None
    assert GOALS.tpot is not None
    return ttft <= GOALS.ttft and tpot <= GOALS.tpot


@pytest.mark.parametrize("seed", range(3))
def test_over_a_day_of_changing_load_it_meets_more_objectives_than_any_fixed_shares(seed: int) -> None:
    plant, controller = Plant(seed), ShareController(GOALS, Limits(window=32), Shares(1.0, 1.0))
    good = 0
    for load in DAY:
        parts, good_when_settled = [], 0
        for number in range(REQUESTS):
            ttft, tpot = plant.serve(controller.shares, load)
            controller.observe_ttft(ttft)
            controller.observe_tpot(tpot)
            controller.update()
            good += is_good(ttft, tpot)
            if number >= REQUESTS // 2:
                parts.append(controller.shares.part(PREFILL))
                good_when_settled += is_good(ttft, tpot)
        assert max(parts) - min(parts) < 0.15, "it has not settled"
        assert good_when_settled > 0.8 * REQUESTS / 2

    fixed = {}
    for part in (each / 20 for each in range(1, 20)):
        plant = Plant(seed)
        fixed[part] = sum(is_good(*plant.serve(Shares(part, 1 - part), load)) for load in DAY for _ in range(REQUESTS))
    assert good > max(fixed.values()) + 0.1 * len(DAY) * REQUESTS, fixed
