"""What a prefill engine decides about elastic work, for queues and decode engines of every kind."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

from vllm_adrenaline.config import Options
from vllm_adrenaline.control import messages
from vllm_adrenaline.control.messages import Slack
from vllm_adrenaline.decode.own_prompts import OwnPrompts
from vllm_adrenaline.engine.profile import Profile
from vllm_adrenaline.kv.stamp import STAY
from vllm_adrenaline.placement.costs import Costs
from vllm_adrenaline.placement.memory import Memory
from vllm_adrenaline.prefill.elastic import ElasticPrefill


def elastic(kind: str, **more: Any) -> ElasticPrefill:
    known = Profile({}, Costs([(1, 0.01), (16, 0.02)], 1e-7, []), [(32, 0.03), (1000, 1.0)])
    options = Options(role="prefill", listen="ipc:///x", elastic=kind, **more)
    return ElasticPrefill(options, known, block_size=16, seats=256, cached=lambda request: 0)


def prompt(tokens: int = 1000, stay: int | None = None) -> Any:
    p = {"do_remote_decode": True} | ({STAY: stay} if stay else {})
    return SimpleNamespace(
        num_tokens=tokens,
        num_computed_tokens=0,
        num_output_tokens=0,
        num_in_flight_tokens=0,
        kv_transfer_params=p,
        max_tokens=1,
        sampling_params=SimpleNamespace(prompt_logprobs=None),
        arrival_time=time.time(),
        request_id=str(id(p)),
    )


FAST = Slack(prompt_rate=1e6, prompt_room=10_000)


def test_a_decode_engine_that_says_nothing_may_get_the_prompt() -> None:
    e = elastic("prompts")
    assert not list(e.decide([], [prompt()], [FAST, None], 0))


def test_a_decode_engine_that_says_nothing_may_be_idle() -> None:
    e = elastic("decodes")
    assert not list(e.decide([], [prompt(10, 8)], [Slack(work=1e6, is_full=True), None], 1000))


def test_all_that_waits_is_work() -> None:
    def stays(number: int) -> int:
        queue = [prompt(1000, 8), *(prompt(1000) for _ in range(number))]
        return len(list(elastic("decodes").decide([], queue, [Slack(work=30.0)], 10_000)))

    assert stays(40) == 0, "40 s of prompts wait here, and the decode side has 30 s to do"


def test_slack_of_a_large_decode_engine_can_be_said() -> None:
    own = OwnPrompts(Costs([(1, 0.01), (100, 0.1)], 1e-6, []), None, 2048, True)
    slack = own.slack(0.0, 0.0, Memory(1_200_000, 16, ()), 256, 0, False)
    messages.decode(messages.encode(messages.Heartbeat(slack=slack)))


def test_short_steps_say_little_of_long_prompts() -> None:
    e = elastic("prompts")
    side = Slack(prompt_rate=500, prompt_room=10_000)  # half as fast
    assert not list(e.decide([], [prompt()], [side], 0))
    for _ in range(20):  # the last few tokens of prompts that were in the prefix cache: a step takes 30 ms at least
        e.observe_prompts([(500, 505)], 0.03)
    assert not list(e.decide([], [prompt()], [side], 0)), e._slower
