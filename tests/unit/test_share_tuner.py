"""The executors' share is kept by the objectives: what is observed reaches the controller, what it decides is done."""

from __future__ import annotations

from vllm_adrenaline.colocation.controller import Limits, Objectives
from vllm_adrenaline.colocation.tuner import ShareTuner, first_share

LIMITS = Limits(low=0.1, high=0.9, step=0.05, max_steps=3, window=4)


class Executors:
    def __init__(self) -> None:
        self.shares: list[float] = []

    def take(self, share: float) -> str:
        self.shares.append(share)
        return "done"


def tuner_of(objectives: Objectives, executors: Executors, share: float = 0.5) -> ShareTuner:
    return ShareTuner(objectives, share, [], executors.take, LIMITS)


def test_without_an_objective_nothing_is_touched() -> None:
    executors = Executors()
    tuner = tuner_of(Objectives(), executors, share=1.0)
    for _ in range(20):
        tuner.observe_ttft(100.0)
        tuner.update([100.0])
    assert executors.shares == []
    assert tuner.share == 1.0


def test_late_first_tokens_take_from_the_executors() -> None:
    executors = Executors()
    tuner = tuner_of(Objectives(ttft=0.5, tpot=0.05), executors)
    for _ in range(8):
        tuner.observe_ttft(2.0)
        tuner.update([0.01])
    assert executors.shares[0] == 0.5, "it begins with the share it was given"
    assert executors.shares[-1] == tuner.share < 0.5


def test_slow_tokens_of_any_decode_engine_give_to_the_executors() -> None:
    executors = Executors()
    tuner = tuner_of(Objectives(ttft=0.5, tpot=0.05), executors)
    for _ in range(8):
        tuner.observe_ttft(0.1)
        tuner.update([0.01, 0.2])
    assert tuner.share > 0.5


def test_the_first_share_is_what_the_smallest_prefill_share_leaves() -> None:
    prefill = [(128, 0.06), (512, 0.25), (2048, 1.6)]
    assert first_share(prefill, 1.0, 1.0, LIMITS) == 0.75  # 0.25 s on a quarter of the device is 1 s
    assert first_share(prefill, 0.1, 1.0, LIMITS) == LIMITS.low, "no share meets it: prefill gets all it can"
    assert first_share(prefill, None, 0.6, LIMITS) == 0.6
    assert first_share([], 1.0, 0.6, LIMITS) == 0.6
