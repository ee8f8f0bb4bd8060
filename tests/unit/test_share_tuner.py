"""Shares are kept by the objectives: what is observed reaches the controller, and what it decides is carried out."""

from __future__ import annotations

import logging

import pytest

from vllm_adrenaline.colocation.controller import Limits, Objectives, Phase, Shares
from vllm_adrenaline.colocation.delayed_switch import DelayedSwitch, State
from vllm_adrenaline.colocation.tuner import BESIDE_PROMPTS, ShareTuner, first_shares

LIMITS = Limits(low=0.1, step=0.05, max_steps=3, window=4)
BOTH = Objectives(ttft=0.5, tpot=0.05)


class Device:
    """A device whose changes take effect when `is_in_force` says so."""

    def __init__(self, is_permitted: bool = True) -> None:
        self.is_permitted, self.is_in_force = is_permitted, True
        self.taken: list[Shares] = []

    def take(self, shares: Shares) -> str:
        if not self.is_permitted:
            raise PermissionError("it takes CAP_SYS_NICE")
        self.taken.append(shares)
        return "done"

    def advance(self) -> bool:
        return self.is_in_force


def tuner_of(objectives: Objectives, device: Device, decode: float = 0.5, settle: int = 0) -> ShareTuner:
    return ShareTuner(objectives, decode, [], device, LIMITS, settle)


def late(tuner: ShareTuner, updates: int = LIMITS.window) -> None:
    """Let first tokens be late and decode steps be fine."""
    for _ in range(updates):
        tuner.observe_ttft(2.0)
        tuner.update([0.01])


def test_without_an_objective_nothing_is_touched() -> None:
    device = Device()
    tuner = tuner_of(Objectives(), device, decode=1.0)
    late(tuner, 20)
    assert device.taken == []
    assert tuner.shares is None


def test_a_device_that_is_to_be_divided_is_without_an_objective_and_nothing_moves_then() -> None:
    device = Device()
    tuner = ShareTuner(Objectives(), 0.15, [], device, LIMITS, settle=0, divides=True)
    late(tuner, 20)
    assert device.taken == [tuner.shares]
    assert tuner.shares is not None
    assert tuner.shares.part(Phase.DECODE) == pytest.approx(0.15, abs=1e-3)


def test_late_first_tokens_take_from_decode() -> None:
    device = Device()
    tuner = tuner_of(BOTH, device)
    late(tuner, 8)
    assert device.taken[0] == Shares(1.0, 1.0), "it begins with the part it was given"
    assert device.taken[-1] == tuner.shares
    assert device.taken[-1].part(Phase.DECODE) < 0.5


def test_slow_tokens_of_any_decode_engine_give_to_decode() -> None:
    device = Device()
    tuner = tuner_of(BOTH, device)
    for _ in range(8):
        tuner.observe_ttft(0.1)
        tuner.update([0.01, 0.2])
    assert device.taken[-1].part(Phase.DECODE) > 0.5


def test_until_a_change_is_in_force_nothing_is_decided_and_nothing_counts() -> None:
    device = Device()
    tuner = tuner_of(BOTH, device)
    late(tuner, 3)
    device.is_in_force = False
    late(tuner, 50)
    assert len(device.taken) == 1, "three observations from before it are none of now"
    device.is_in_force = True
    late(tuner, 3)
    assert len(device.taken) == 1
    late(tuner, 1)
    assert len(device.taken) == 2


def test_the_shares_in_force_are_the_old_ones_while_a_change_is_under_way() -> None:
    device = Device()
    tuner = tuner_of(BOTH, device)
    late(tuner, 3)
    before = tuner.shares
    advance, device.advance = device.advance, lambda: len(device.taken) == 1  # type: ignore[method-assign]
    late(tuner, 1)
    assert len(device.taken) == 2
    assert tuner.shares == before
    device.advance = advance  # type: ignore[method-assign]
    tuner.update([])
    assert tuner.shares == device.taken[-1] != before


def test_what_decode_engines_say_right_after_a_change_is_still_of_the_steps_before() -> None:
    device = Device()
    tuner = tuner_of(BOTH, device, settle=5)
    late(tuner, 4 + LIMITS.window - 1)
    assert len(device.taken) == 1
    late(tuner, 1)
    assert len(device.taken) == 2


def test_where_it_is_not_permitted_it_says_so_once_and_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    tuner = tuner_of(BOTH, Device(is_permitted=False))
    with caplog.at_level(logging.INFO, "vllm.adrenaline"):
        late(tuner, 20)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "CAP_SYS_NICE" in caplog.text
    assert tuner.shares is None


def test_the_first_shares_are_the_smallest_for_prefill_and_the_rest_for_decode() -> None:
    prefill = [(128, 0.06), (512, 0.25), (2048, 1.6)]
    shares = first_shares(prefill, 1.0, 1.0, LIMITS)
    assert shares.part(Phase.PREFILL) == pytest.approx(0.25)  # 0.25 s on a quarter of the device is 1 s
    assert first_shares(prefill, 0.1, 1.0, LIMITS) == Shares(1.0, LIMITS.low), "prefill gets all it can"
    assert first_shares(prefill, None, 0.6, LIMITS).part(Phase.DECODE) == pytest.approx(0.6)
    assert first_shares([], 1.0, 0.6, LIMITS).part(Phase.DECODE) == pytest.approx(0.6)
    assert first_shares([], 1.0, 1.0, LIMITS) == Shares(LIMITS.low, 1.0)


# A change that takes new processes


class Workers:
    """Workers of a GPU, of which only the order of events is real."""

    def __init__(self) -> None:
        self.serving, self.prepared = {Phase.PREFILL: 1.0, Phase.DECODE: 1.0}, dict[Phase, float]()
        self.ready: set[Phase] = set()

    def prepare(self, phase: Phase, share: float) -> None:
        self.prepared[phase] = share

    def is_ready(self, phase: Phase) -> bool:
        return phase in self.ready

    def switch(self, phase: Phase) -> None:
        self.serving[phase] = self.prepared.pop(phase)


def test_the_old_worker_serves_until_the_new_one_is_ready_and_its_iteration_is_over() -> None:
    workers = Workers()
    switch = DelayedSwitch(workers, Shares(1.0, 1.0))
    switch.take(Shares(1.0, 0.8))
    assert workers.prepared == {Phase.DECODE: 0.8}, "prefill keeps its worker"
    switch.end_iteration(Phase.DECODE)
    assert workers.serving[Phase.DECODE] == 1.0, "the new one is not ready"
    workers.ready = {Phase.DECODE}
    assert not switch.advance(), "ready, but an iteration of the old one runs"
    assert workers.serving[Phase.DECODE] == 1.0
    switch.end_iteration(Phase.DECODE)
    assert workers.serving[Phase.DECODE] == 0.8
    assert switch.advance()


def test_each_phase_switches_after_an_iteration_of_its_own() -> None:
    workers = Workers()
    switch = DelayedSwitch(workers, Shares(1.0, 1.0))
    switch.take(Shares(0.9, 0.8))
    workers.ready = set(Phase)
    switch.advance()
    switch.end_iteration(Phase.PREFILL)
    assert workers.serving == {Phase.PREFILL: 0.9, Phase.DECODE: 1.0}
    assert switch.states == {Phase.PREFILL: State.SWITCHED, Phase.DECODE: State.READY}
    assert not switch.advance()
    with pytest.raises(AssertionError):
        switch.take(Shares(0.5, 0.5))
    switch.end_iteration(Phase.DECODE)
    switch.end_iteration(Phase.DECODE)
    assert switch.advance()
    assert workers.serving == {Phase.PREFILL: 0.9, Phase.DECODE: 0.8}


def test_the_tuner_waits_for_a_delayed_switch() -> None:
    workers = Workers()
    device = DelayedSwitch(workers, Shares(1.0, 1.0))
    tuner = ShareTuner(BOTH, 0.5, [], device, LIMITS, settle=0)
    late(tuner)
    assert device.states == {Phase.PREFILL: State.IDLE, Phase.DECODE: State.PREPARING}
    assert tuner.shares == Shares(1.0, 1.0)
    late(tuner, 20)
    workers.ready = {Phase.DECODE}
    tuner.update([])
    device.end_iteration(Phase.DECODE)
    tuner.update([])
    assert tuner.shares == Shares(1.0, workers.serving[Phase.DECODE])
    assert workers.serving[Phase.DECODE] < 1


@pytest.mark.parametrize(
    ("objectives", "part"),
    [
        (Objectives(), BESIDE_PROMPTS),
        (Objectives(ttft=0.5), BESIDE_PROMPTS),
        (Objectives(ttft=0.5, tpot=0.05), BESIDE_PROMPTS),
        (Objectives(tpot=0.05), 0.5),
    ],
)
def test_on_a_device_of_two_engines_prompts_come_first_until_that_is_seen_to_be_wrong(
    objectives: Objectives, part: float
) -> None:
    device = Device()
    ShareTuner.of_two_engines(objectives, [], device).update([])
    assert [shares.part(Phase.DECODE) for shares in device.taken] == [pytest.approx(part, abs=1e-3)]
