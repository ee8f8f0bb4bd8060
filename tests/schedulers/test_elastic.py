"""Work that moves: prompts that a prefill engine ends early, and prompts that a decode engine computes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.schedulers.conftest import BLOCK, KEEP, Decode, Engine, Prefill, PrefillEngine, eventually
from tests.schedulers.test_decode import params, released
from vllm_adrenaline.control import messages
from vllm_adrenaline.control.messages import Slack
from vllm_adrenaline.engine import profile
from vllm_adrenaline.engine.profile import Profile
from vllm_adrenaline.kv.prompt_hash import prompt_hash
from vllm_adrenaline.kv.stamp import GIVES_UP, STAY
from vllm_adrenaline.placement.costs import Costs

LONG = list(range(10, 10 + 20 * BLOCK))
FAST = Slack(prompt_rate=1e6, prompt_room=10_000)
"""A decode engine that computes prompts much faster than the prefill engine."""
SLOW = Slack(prompt_rate=1.0, prompt_room=10_000)
FULL = Slack(is_full=True, work=1e6)


@pytest.fixture(autouse=True)
def measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """A prefill engine has its profile: a second for a thousand tokens, 10 ms for a step of decodes."""
    known = Profile({}, Costs([(1, 0.01), (16, 0.02)], 1e-7, []), [(1000, 1.0)])
    monkeypatch.setattr(profile, "cached", lambda key: known)


def told(engine: PrefillEngine, slack: Slack | None) -> None:
    """A decode engine says what it could do."""
    assert isinstance(engine.ask(messages.Heartbeat(slack=slack)), messages.Load)


def outputs_of(engine: Engine, scheduled: Any) -> dict[str, Any]:
    """The worker does a step; return the outputs that clients get, by request."""
    return {each.request_id: each for outputs in engine.update(scheduled).values() for each in outputs.outputs}


def step(engine: Engine) -> tuple[dict[str, int], dict[str, Any]]:
    """One step: what was computed, and what clients were answered."""
    scheduled = engine.schedule()
    return dict(scheduled.num_scheduled_tokens), outputs_of(engine, scheduled)


@pytest.mark.parametrize(("elastic", "slack"), [("off", FAST), ("decodes", FAST), ("prompts", None), ("prompts", SLOW)])
def test_without_the_option_or_a_decode_engine_that_has_time_prompts_are_computed_here(
    prefill_engine: Callable[..., PrefillEngine], elastic: str, slack: Slack | None
) -> None:
    engine = prefill_engine(elastic=elastic)
    told(engine, slack)
    request = engine.arrive(LONG, KEEP, max_tokens=1)
    computed, answered = step(engine)
    assert computed == {request.request_id: len(LONG)}
    assert answered[request.request_id].kv_transfer_params["do_remote_prefill"]


def test_a_prompt_that_is_handed_over_is_answered_at_once_with_nothing_kept(
    prefill_engine: Callable[..., PrefillEngine],
) -> None:
    engine = prefill_engine(elastic="prompts")
    told(engine, FAST)
    request = engine.arrive(LONG, KEEP, max_tokens=1)
    computed, answered = step(engine)
    assert computed == {}
    answer = answered[request.request_id]
    assert (answer.finish_reason, answer.new_token_ids, answer.kv_transfer_params) == (1, [], None)
    assert engine.free_blocks == engine.free
    assert not engine.scheduler.has_requests()
    assert engine.count("placements/handed_over/sooner") == 1
    assert engine.scheduler.connector.get_kv_connector_stats() is None or not engine.scheduler.leases.offers


def test_what_was_just_handed_over_counts_as_work_of_the_decode_side(
    prefill_engine: Callable[..., PrefillEngine],
) -> None:
    engine = prefill_engine(elastic="prompts")
    told(engine, Slack(prompt_rate=2000, prompt_room=10_000))  # twice as fast, and idle
    for _ in range(4):
        engine.arrive(LONG, KEEP, max_tokens=1)
    computed, answered = step(engine)
    assert (len(answered), len(computed)) == (4, 1)
    assert engine.count("placements/handed_over/sooner") == 3


def test_a_prompt_of_which_blocks_are_computed_is_handed_over_with_them(
    prefill_engine: Callable[..., PrefillEngine],
) -> None:
    engine = prefill_engine(elastic="prompts")
    engine.scheduler.max_num_scheduled_tokens = 5 * BLOCK + 3
    told(engine, SLOW)
    request = engine.arrive(LONG, KEEP, max_tokens=1)
    computed, _ = step(engine)
    assert computed == {request.request_id: 5 * BLOCK + 3}
    told(engine, FAST)
    computed, answered = step(engine)
    assert computed == {}
    found = answered[request.request_id].kv_transfer_params
    assert not found["do_remote_prefill"], "who takes it for a whole prompt would read what is not there"
    assert found["adrenaline"]["num_tokens"] == 5 * BLOCK
    assert found["adrenaline"]["prompt_hash"] == prompt_hash(LONG[: 5 * BLOCK]).hex()
    claimed = engine.ask(messages.Claim(request.request_id))
    assert isinstance(claimed, messages.Claimed)
    assert (len(claimed.blocks), claimed.num_tokens) == (5, 5 * BLOCK)
    engine.let_go()
    assert engine.free_blocks == engine.free - 5, "only what is claimed is kept"
    engine.line.send(bytes(messages.encode(messages.Release([request.request_id], []))))
    assert isinstance(engine.ask(messages.Heartbeat()), messages.Load)
    assert engine.free_blocks == engine.free


def test_a_prompt_that_is_not_to_be_kept_is_not_handed_over(prefill_engine: Callable[..., PrefillEngine]) -> None:
    engine = prefill_engine(elastic="both")
    told(engine, FAST)
    request = engine.arrive(LONG, None, max_tokens=1)
    assert step(engine)[0] == {request.request_id: len(LONG)}


def test_a_request_stays_only_where_its_router_asked(prefill_engine: Callable[..., PrefillEngine]) -> None:
    engine = prefill_engine(elastic="both")
    told(engine, FULL)
    asked = engine.arrive(LONG, KEEP | {STAY: 30}, max_tokens=1)
    computed, answered = step(engine)
    assert (computed, answered[asked.request_id].kv_transfer_params) == ({}, {STAY: True})
    assert engine.free_blocks == engine.free
    assert engine.count("placements/stays/decode_full") == 1
    other = engine.arrive(LONG, KEEP, max_tokens=1)
    assert step(engine)[0] == {other.request_id: len(LONG)}


def test_who_gives_a_prompt_up_is_not_taken_for_a_request_that_was_told_to_stay(
    prefill_engine: Callable[..., PrefillEngine],
) -> None:
    engine = prefill_engine(elastic="both")
    told(engine, FULL)
    engine.arrive(LONG, KEEP | {STAY: 30}, max_tokens=1)
    step(engine)
    waits = engine.arrive(LONG[::-1], KEEP, max_tokens=1)
    engine.arrive([7], {GIVES_UP: "t"}, max_tokens=1)
    back = engine.arrive(LONG, None, max_tokens=30)
    assert [each.request_id for each in engine.scheduler.waiting][:2] == [back.request_id, waits.request_id]


@pytest.mark.parametrize("limit", [0, -1, 1 << 30, "many", True, None])
def test_a_wrong_output_limit_is_no_wish_to_stay(prefill_engine: Callable[..., PrefillEngine], limit: Any) -> None:
    engine = prefill_engine(elastic="decodes")
    told(engine, FULL)
    request = engine.arrive(LONG, KEEP | {STAY: limit}, max_tokens=1)
    assert step(engine)[0] == {request.request_id: len(LONG)}


def test_requests_stay_no_longer_than_there_is_memory_for_them(prefill_engine: Callable[..., PrefillEngine]) -> None:
    engine = prefill_engine(elastic="decodes")
    told(engine, FULL)
    for _ in range(2):  # 20 blocks each, and 16 for the growth; 64 in all
        engine.arrive(LONG, KEEP | {STAY: 256}, max_tokens=1)
    computed, answered = step(engine)
    stay = [each for each in answered.values() if each.kv_transfer_params == {STAY: True}]
    assert len(stay) == 1
    assert computed


def test_beside_requests_that_stay_prompts_are_computed_in_chunks(prefill_engine: Callable[..., PrefillEngine]) -> None:
    engine = prefill_engine(elastic="decodes")
    staying = engine.arrive(LONG[::-1], None, max_tokens=50)
    assert step(engine)[0] == {staying.request_id: len(LONG)}, "nobody decodes yet"
    prompt = engine.arrive(LONG, KEEP, max_tokens=1)
    computed, _ = step(engine)
    assert computed[staying.request_id] == 1
    assert 0 < computed[prompt.request_id] < len(LONG)
    for _ in range(20):
        computed, answered = step(engine)
        assert computed[staying.request_id] == 1, "a prompt takes nothing from who decodes"
        if prompt.request_id in answered:
            return
    raise AssertionError("the prompt is not done")


# The decode engine


def begun(decode: Decode, prefill: Prefill, prompt: list[int], blocks: int) -> Any:
    """Return a request of whose prompt the prefill engine has computed so many blocks."""
    begin = prompt[: blocks * BLOCK]
    request = decode.arrive(prompt, params(begin, do_remote_prefill=False))
    decode.step()
    assert prefill.expect(messages.Claim).request == "prompt"
    prefill.say(messages.Claimed("prompt", list(range(11, 11 + blocks)), len(begin), prompt_hash(begin)))
    return request


def test_of_a_prompt_that_ended_early_the_begin_is_pulled_and_the_rest_computed(
    decode: Callable[..., Decode], prefill: Prefill
) -> None:
    engine = decode()
    request = begun(engine, prefill, LONG, 5)
    assert engine.until_pull() == {request.request_id: [11, 12, 13, 14, 15]}
    engine.step(received={request.request_id})
    scheduled = engine.schedule()
    assert scheduled.num_scheduled_tokens == {request.request_id: len(LONG) - 5 * BLOCK}
    assert not scheduled.kv_connector_metadata.received, "what is computed is written, too"
    engine.update(scheduled)
    assert request.num_output_tokens == 1
    eventually(lambda: engine.schedule() and released(prefill) == ["prompt"])
    assert engine.count("placements/local/unfinished_prompt") == 1


def test_a_begin_that_is_in_the_prefix_cache_is_not_pulled(decode: Callable[..., Decode], prefill: Prefill) -> None:
    engine = decode()
    engine.arrive(LONG, None, max_tokens=1)
    engine.step()
    request = begun(engine, prefill, LONG, 5)
    eventually(lambda: request.request_id in engine.step().num_scheduled_tokens)
    assert request.num_output_tokens == 1
    eventually(lambda: engine.schedule() and released(prefill) == ["prompt"])


@pytest.mark.parametrize("tokens", [0, 5 * BLOCK + 3, len(LONG) + BLOCK])
def test_a_begin_that_is_not_whole_blocks_of_this_prompt_is_not_used(
    decode: Callable[..., Decode], prefill: Prefill, tokens: int
) -> None:
    engine = decode()
    begin = LONG[: 5 * BLOCK]
    request = engine.arrive(LONG, params(begin, do_remote_prefill=False))
    engine.step()
    prefill.expect(messages.Claim)
    longer = [*LONG, *range(BLOCK)]
    blocks = list(range(11, 11 + -(-tokens // BLOCK)))
    prefill.say(messages.Claimed("prompt", blocks, tokens, prompt_hash(longer[:tokens])))
    eventually(lambda: engine.step().num_scheduled_tokens == {request.request_id: len(LONG)})
    assert engine.count("fallback_requests") == 1


def test_a_whole_prompt_that_calls_itself_a_begin_is_refused(decode: Callable[..., Decode], prefill: Prefill) -> None:
    engine = decode()
    request = engine.arrive(LONG, params(LONG, do_remote_prefill=False))
    assert engine.step().num_scheduled_tokens == {request.request_id: len(LONG)}
    assert engine.count("refused_params") == 1


def test_beside_decodes_an_elastic_engine_computes_prompts_in_chunks_and_says_so(
    decode: Callable[..., Decode], prefill: Prefill
) -> None:
    engine = decode(elastic="both")
    first = engine.arrive(LONG[:BLOCK], None, max_tokens=200)
    assert engine.step().num_scheduled_tokens == {first.request_id: BLOCK}
    eventually(lambda: prefill.beat.slack is not None and prefill.beat.slack.work > 0)
    idle = prefill.beat.slack
    second = engine.arrive(LONG[::-1], None, max_tokens=8)
    seen = []
    while second.num_output_tokens == 0:
        scheduled = engine.step().num_scheduled_tokens
        assert scheduled[first.request_id] == 1
        seen.append(scheduled[second.request_id])
        missing = second.num_tokens - second.num_computed_tokens
        if len(seen) == 1:
            eventually(lambda missing=missing: prefill.beat.slack and prefill.beat.slack.prompt_backlog == missing)
    assert len(seen) > 1
    assert sum(seen) == len(LONG)
    now = prefill.beat.slack
    assert idle is not None
    assert now is not None
    assert idle.prompt_room > now.prompt_room


def test_an_engine_that_is_not_elastic_says_nothing_of_slack(decode: Callable[..., Decode], prefill: Prefill) -> None:
    engine = decode()
    engine.arrive(LONG, None, max_tokens=2)
    engine.step()
    eventually(lambda: prefill.greetings)
    assert prefill.beat.slack is None
