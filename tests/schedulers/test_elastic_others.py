"""Elastic work and everybody else: nobody starves, nothing is counted twice or not at all, books are kept."""

from __future__ import annotations

from typing import Any

import pytest

from tests.schedulers.conftest import BLOCK, KEEP, PROMPT, Prefill, eventually
from tests.schedulers.test_decode import granted, params
from tests.schedulers.test_elastic import FAST, FULL, LONG, SLOW, measured, outputs_of, step, told  # noqa: F401
from vllm_adrenaline.control import messages
from vllm_adrenaline.control.messages import Slack
from vllm_adrenaline.kv.prompt_hash import prompt_hash
from vllm_adrenaline.kv.stamp import STAY


def test_a_request_whose_prompt_is_here_starts_beside_a_prompt_in_chunks(decode: Any, prefill: Prefill) -> None:
    engine = decode(elastic="both")
    engine.arrive(LONG[:BLOCK], None, max_tokens=400)
    engine.step()
    long = engine.arrive(list(range(20, 20 + 20 * BLOCK)), None, max_tokens=8)
    engine.step()  # begun, in chunks
    other = engine.arrive(PROMPT, params(PROMPT))
    engine.step()
    prefill.expect(messages.Claim)
    prefill.say(granted(PROMPT))
    eventually(lambda: (engine.scheduler.table.poll(), engine.scheduler.table.queue)[1])
    steps = 0
    while other.num_output_tokens == 0 and long.num_output_tokens == 0:
        scheduled = engine.schedule()
        wanted = engine.pulls(scheduled)
        engine.update(scheduled, received=set(wanted) or None)
        steps += 1
    assert long.num_output_tokens == 0, f"it waited all the {steps} steps of the other's prompt"


def test_a_prompt_that_is_cached_here_is_not_handed_over(prefill_engine: Any) -> None:
    engine = prefill_engine(elastic="prompts")
    told(engine, SLOW)
    engine.arrive(LONG, None, max_tokens=1)
    step(engine)
    told(engine, Slack(prompt_rate=2000, prompt_room=10_000))  # 0.16 s there; here next to nothing
    b = engine.arrive(LONG, KEEP, max_tokens=1)
    computed, answered = step(engine)
    assert b.request_id not in answered or answered[b.request_id].kv_transfer_params, (computed, answered)


def test_the_last_token_of_a_begun_prompt_is_written(decode: Any, prefill: Prefill) -> None:
    engine = decode()
    prompt = LONG[: 5 * BLOCK + 1]
    begin = prompt[: 5 * BLOCK]
    request = engine.arrive(prompt, params(begin, do_remote_prefill=False))
    engine.step()
    prefill.expect(messages.Claim)
    prefill.say(messages.Claimed("prompt", list(range(11, 16)), len(begin), prompt_hash(begin)))
    engine.until_pull(arrives=True)
    s = engine.schedule()
    assert s.num_scheduled_tokens == {request.request_id: 1}
    got = s.kv_connector_metadata.received
    engine.update(s)
    assert not got, "its KV is nowhere"


def test_the_budget_is_not_larger_for_rows_that_run(decode: Any, prefill: Prefill) -> None:
    engine = decode(elastic="both")
    rows = [engine.arrive(PROMPT, params(PROMPT, f"p{n}"), max_tokens=300) for n in range(8)]
    engine.step()
    for _ in rows:
        prefill.expect(messages.Claim)
    prefill.say(*(granted(PROMPT, f"p{n}", [11 + 4 * n + k for k in range(4)]) for n in range(8)))
    for _ in range(300):
        if all(r.num_output_tokens for r in rows):
            break
        s = engine.schedule()
        engine.update(s, received=set(engine.pulls(s)) or None)
    states = [r.state.value for r in engine.scheduler.table.requests.values()]
    long = engine.arrive(LONG[::-1], None, max_tokens=8)
    own = engine.scheduler._own_prompts
    own._tpot_slo = 1e-9  # no time for prompts: the least chunk
    s = engine.step().num_scheduled_tokens
    allowed = own.chunk(engine.scheduler._step_seconds)
    assert s[long.request_id] <= allowed, (s, allowed, states)


def test_a_prompt_that_ended_early_is_no_time_to_first_token(prefill_engine: Any, monkeypatch: Any) -> None:
    engine = prefill_engine(elastic="prompts")
    seen: list[float] = []
    monkeypatch.setattr(engine.scheduler.connector.connector_scheduler.tuner, "observe_ttft", seen.append)
    engine.scheduler.max_num_scheduled_tokens = 5 * BLOCK
    told(engine, SLOW)
    engine.arrive(LONG, KEEP, max_tokens=1)
    step(engine)
    told(engine, FAST)
    step(engine)
    assert not seen


def test_a_request_that_was_told_to_stay_is_computed(prefill_engine: Any) -> None:
    engine = prefill_engine(elastic="decodes")
    assert isinstance(engine.ask(messages.Heartbeat(slack=FULL, waiting=10, offloads=True)), messages.Load)
    asked = engine.arrive(LONG[: 3 * BLOCK], KEEP | {STAY: 8}, max_tokens=1)
    _, answered = step(engine)
    assert answered[asked.request_id].kv_transfer_params == {STAY: True}
    again = engine.arrive(LONG[: 3 * BLOCK], None, max_tokens=8)
    computed, _ = step(engine)
    assert computed == {again.request_id: 3 * BLOCK}


def test_requests_stay_no_longer_than_there_are_seats(prefill_engine: Any) -> None:
    engine = prefill_engine(elastic="decodes")
    told(engine, FULL)
    asked = [engine.arrive([200 + n] * 10, KEEP | {STAY: 20}, max_tokens=1) for n in range(16)]
    _, answered = step(engine)
    staying = [r for r in asked if answered[r.request_id].kv_transfer_params == {STAY: True}]
    for r in staying:
        engine.arrive(list(r.prompt_token_ids), None, max_tokens=20)
    told(engine, FULL)
    step(engine)
    told(engine, FULL)
    more = engine.arrive([300] * 10, KEEP | {STAY: 8}, max_tokens=1)
    _, answered = step(engine)
    assert len(staying) == 12, "a quarter of the seats is for prompts"
    assert answered[more.request_id].kv_transfer_params != {STAY: True}


def test_a_prompt_does_not_wait_for_the_end_of_who_stays(prefill_engine: Any) -> None:
    engine = prefill_engine(elastic="decodes")
    told(engine, FULL)
    asked = [engine.arrive([200 + n] * 10, KEEP | {STAY: 20}, max_tokens=1) for n in range(16)]
    _, answered = step(engine)
    staying = [r for r in asked if answered[r.request_id].kv_transfer_params == {STAY: True}]
    for r in staying:
        engine.arrive(list(r.prompt_token_ids), None, max_tokens=20)
    step(engine)
    told(engine, SLOW)
    prompt = engine.arrive(LONG[:BLOCK], KEEP, max_tokens=1)
    steps = 0
    while prompt.num_computed_tokens == 0 and steps < 100:
        step(engine)
        steps += 1
    assert steps <= 1, f"{len(staying)} stay; the prompt waited {steps} steps with {engine.free_blocks} blocks free"


@pytest.mark.parametrize("together", [True, False])
def test_a_stay_on_its_way_counts_with_its_prompt(prefill_engine: Any, together: bool) -> None:
    """Prompts of 0.08 s here; the decode side has 0.3 s of work."""
    engine = prefill_engine(elastic="decodes")
    stays = 0
    told(engine, Slack(work=0.3))
    for n in range(8):
        engine.arrive([100 + n] * (5 * BLOCK), KEEP | {STAY: 1}, max_tokens=1)
        if not together:
            stays += sum(a.kv_transfer_params == {STAY: True} for a in step(engine)[1].values())
    if together:
        stays += sum(a.kv_transfer_params == {STAY: True} for a in step(engine)[1].values())
    assert stays <= 3, f"{stays} of them stay: {stays * 0.08:.2f} s of prompts"


def test_only_blocks_that_are_there_wait_there(decode: Any, prefill: Prefill) -> None:
    engine = decode()
    begin = LONG[: 5 * BLOCK]
    engine.arrive(LONG, params(begin, do_remote_prefill=False))
    engine.step()
    prefill.expect(messages.Claim)
    prefill.say(messages.Claimed("prompt", list(range(11, 16)), len(begin), prompt_hash(begin)))
    table = engine.scheduler.table
    eventually(lambda: (table.poll(), table.queue)[1])
    assert table.pools[0].client.waiting == 5


def test_what_is_missing_of_a_begun_prompt_is_backlog(decode: Any, prefill: Prefill) -> None:
    engine = decode(elastic="both")
    begin = LONG[: 5 * BLOCK]
    r = engine.arrive(LONG, params(begin, do_remote_prefill=False))
    engine.step()
    prefill.expect(messages.Claim)
    prefill.say(messages.Claimed("prompt", list(range(11, 16)), len(begin), prompt_hash(begin)))
    engine.until_pull()
    engine.step()  # under way
    assert engine.scheduler.table.requests[r.request_id].state.value == "pulling"
    assert engine.scheduler.table.pools[0].client.slack.prompt_backlog == len(LONG) - 5 * BLOCK


def test_a_request_may_be_aborted_once_it_was_handed_over(prefill_engine: Any) -> None:
    engine = prefill_engine(elastic="prompts")
    told(engine, FAST)
    r = engine.arrive(LONG, KEEP, max_tokens=1)
    s = engine.schedule()
    engine.abort(r)
    engine.update(s)
    engine.let_go()
    assert not engine.scheduler._early
    assert not engine.scheduler.connector.connector_scheduler.unfinished
    assert engine.free_blocks == engine.free
    assert not engine.scheduler.has_requests()
    again = engine.arrive(LONG, KEEP, name=r.request_id, max_tokens=1)
    assert again.request_id in step(engine)[1]


@pytest.mark.parametrize("what", ["prompt_logprobs", "max_tokens"])
def test_who_wants_more_of_the_prefill_engine_than_a_prompt_gets_it(prefill_engine: Any, what: str) -> None:
    engine = prefill_engine(elastic="prompts")
    told(engine, FAST)
    r = engine.arrive(LONG, KEEP, max_tokens=50 if what == "max_tokens" else 1)
    if what == "prompt_logprobs":
        r.sampling_params.prompt_logprobs = 1
    _, answered = step(engine)
    a = answered.get(r.request_id)
    assert a is None or a.finish_reason is None or a.new_token_ids, a


def test_a_decode_engine_without_a_seat_says_so(decode: Any, prefill: Prefill) -> None:
    engine = decode(blocks=3000, elastic="both")
    for n in range(16):
        engine.arrive([100 + n] * 10, None, max_tokens=600)
    engine.step()
    engine.step()
    engine.arrive([99] * 10, None, max_tokens=8)
    engine.step()
    s = engine.scheduler.table.pools[0].client.slack
    assert len(engine.scheduler.running) == 16
    assert len(engine.scheduler.waiting) == 1
    assert s.prompt_rate == 0 or s.is_full, s


def test_who_stays_keeps_its_place(prefill_engine: Any) -> None:
    engine = prefill_engine(elastic="decodes")
    engine.scheduler.max_num_scheduled_tokens = 3 * BLOCK
    told(engine, SLOW)
    engine.arrive([9] * (3 * BLOCK), KEEP, max_tokens=1)
    asked = engine.arrive([8] * (3 * BLOCK), KEEP | {STAY: 8}, max_tokens=1)
    later = [engine.arrive([n] * (3 * BLOCK), KEEP, max_tokens=1) for n in range(20, 24)]
    told(engine, FULL)
    answered = outputs_of(engine, engine.schedule())
    assert answered[asked.request_id].kv_transfer_params == {STAY: True}
    again = engine.arrive([8] * (3 * BLOCK), None, max_tokens=8)
    before = 0
    while again.num_computed_tokens == 0:
        step(engine)
        before += 1
    assert before <= 1, f"{sum(x.num_computed_tokens > 0 for x in later)} that came later were computed before it"


def test_how_long_a_request_waits_for_its_first_step_beside_a_prompt(decode: Any, prefill: Prefill) -> None:
    engine = decode(elastic="both")
    own = engine.scheduler._own_prompts
    own._tpot_slo = 1e-9  # the step takes longer than its objective already
    engine.arrive(LONG[:BLOCK], None, max_tokens=400)
    engine.step()
    engine.arrive(list(range(20, 20 + 20 * BLOCK)), None, max_tokens=8)
    engine.step()
    other = engine.arrive(PROMPT, params(PROMPT), max_tokens=4)
    engine.step()
    prefill.expect(messages.Claim)
    prefill.say(granted(PROMPT))
    eventually(lambda: (engine.scheduler.table.poll(), engine.scheduler.table.queue)[1])
    steps = 0
    states = set()
    while other.num_output_tokens == 0:
        s = engine.schedule()
        engine.update(s, received=set(engine.pulls(s)) or None)
        steps += 1
        states |= {r.state.value for r in engine.scheduler.table.requests.values()}
    assert steps < 5, (steps, states)
