"""What a decode engine does with requests that it attends itself in a prefill engine's memory."""

from __future__ import annotations

import subprocess
from typing import Any

import pytest

from tests.schedulers.conftest import BLOCK, Decode, Prefill, eventually
from tests.schedulers.test_decode import BLOCKS, PROMPT, finish, granted, params, released
from vllm_adrenaline.control import messages
from vllm_adrenaline.decode.report import Report
from vllm_adrenaline.kv.space import index_of, mapped_pool, pool_of
from vllm_adrenaline.placement import starvation


def blocks_of(engine: Decode, request: Any) -> list[int]:
    """Return the blocks that the worker is told a request has."""
    (blocks,) = engine.scheduler.kv_cache_manager.get_block_ids(request.request_id)
    return list(blocks)


def let_go(prefill: Prefill) -> list[str]:
    return [message.member for message in prefill.heard if isinstance(message, messages.LetGo)]


def placed(engine: Decode, prefill: Prefill, name: str = "prompt", max_tokens: int = 8) -> Any:
    """Return a request that decodes over the prefill engine's KV cache and has made a token, whatever came before."""
    request = engine.arrive(PROMPT, params(PROMPT, name), max_tokens=max_tokens)
    engine.step()
    eventually(lambda: any(isinstance(m, messages.Claim) and m.request == name for m in prefill.heard))
    blocks = [10 * len(prefill.heard) + index for index in range(1, 5)]
    prefill.say(granted(PROMPT, name, BLOCKS if name == "prompt" else blocks))
    eventually(lambda: engine.step() and request.num_output_tokens)
    while not prefill.inbox.empty():
        if isinstance(prefill.inbox.queue[0], messages.Lease):
            break
        prefill.inbox.get()
    return request


def grown(engine: Decode, prefill: Prefill, tokens: int = 60) -> Any:
    """Return a mapped request with `tokens` to generate, of which its lease holds those of the next blocks."""
    request = placed(engine, prefill, max_tokens=tokens)
    want = prefill.expect(messages.Lease).want
    prefill.say(messages.Leased(list(range(100, 100 + want))))
    eventually(lambda: engine.step() and request.num_tokens > len(PROMPT) + BLOCK)
    return request


def test_a_mapped_request_takes_no_local_block_and_its_ids_say_where_it_is(decode: Any, prefill: Prefill) -> None:
    engine = decode(pool="mapped", ratio="1")
    request = grown(engine, prefill)
    blocks = blocks_of(engine, request)
    assert {pool_of(block) for block in blocks} == {mapped_pool(0)}
    assert [index_of(block) for block in blocks[:4]] == [11, 12, 13, 14]
    assert engine.step().kv_connector_metadata.members == {0: "member 1"}
    assert engine.free_blocks == engine.free
    engine.abort(request)
    assert engine.step().kv_connector_metadata.members == {}
    eventually(lambda: released(prefill) == ["prompt"])
    assert engine.count("mapped_requests") == 1
    assert engine.count("offloaded_requests") == 0


def test_a_mapped_request_outlives_the_word_of_its_prefill_engine_and_then_lets_go(
    decode: Any, prefill: Prefill
) -> None:
    """The prefill engine takes nothing back before it hears so, for this engine may be in the middle of a step."""
    engine = decode(pool="mapped", ratio="1")
    request = grown(engine, prefill)
    prefill.forget()
    engine.step()
    other = engine.arrive(PROMPT, params(PROMPT, "other"))
    for _ in range(4):
        scheduled = engine.step()
        assert scheduled.num_scheduled_tokens[request.request_id] == 1, "it goes on"
        assert scheduled.kv_connector_metadata.members == {0: "member 1"}
    assert let_go(prefill) == []
    eventually(lambda: any(isinstance(m, messages.Claim) and m.request == "other" for m in prefill.heard))
    prefill.say(granted(PROMPT, "other", [31, 32, 33, 34]))
    reads: dict[str, list[int]] = {}
    eventually(lambda: reads.update(engine.pulls(engine.step())) or reads)
    assert list(reads) == [other.request_id], "what comes meanwhile is not mapped: one life is mapped at a time"
    engine.abort(request)
    engine.abort(other)
    engine.step(received={other.request_id})
    eventually(lambda: engine.step() and let_go(prefill) == ["member 1"])
    third = placed(engine, prefill, "third")
    assert engine.step().kv_connector_metadata.members == {0: "member 2"}
    finish(engine, third)
    assert engine.free_blocks == engine.free


def test_a_prefill_engine_whose_process_ends_is_noticed_at_once(decode: Any, prefill: Prefill) -> None:
    with subprocess.Popen(["sleep", "100"]) as process:
        prefill.be(process.pid)
        engine = decode(pool="both", ratio="1")
        remote, mapped = placed(engine, prefill), placed(engine, prefill, "second")
        process.kill()
        process.wait()
        eventually(lambda: engine.step().num_scheduled_tokens.get(remote.request_id, 0) > 1)
        assert engine.step().num_scheduled_tokens[mapped.request_id] == 1, "its memory is still there"
        assert engine.count("fallback_requests") == 1
        finish(engine, mapped)
        finish(engine, remote)


def test_an_engine_that_has_nothing_to_let_go_of_says_nothing(decode: Any, prefill: Prefill) -> None:
    engine = decode(pool="mapped", ratio="1")
    prefill.forget()
    for _ in range(5):
        engine.step()
    assert let_go(prefill) == []


def test_it_lets_go_even_if_the_next_life_ends_just_then(decode: Any, prefill: Prefill) -> None:
    """What is posted for a life that is over is not sent. This must be: else the blocks are out for ever."""
    engine = decode(pool="mapped", ratio="1")
    request = grown(engine, prefill)
    prefill.forget()
    engine.step()
    client = engine.scheduler.clients[0]
    eventually(lambda: client.welcome is not None and client.welcome.member == "member 2")
    scheduled = engine.schedule()
    prefill.forget()  # while the step runs
    engine.abort(request)
    engine.update(scheduled)
    eventually(lambda: engine.step() and let_go(prefill) == ["member 1"])


def test_memory_that_could_not_be_mapped_is_not_tried_again_at_once(
    decode: Any, prefill: Prefill, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every attempt costs a prompt, which is computed again here."""
    engine = decode(pool="mapped", ratio="1")
    request = placed(engine, prefill)
    engine.step(Report(frozenset({mapped_pool(0)}), frozenset(), frozenset(), frozenset(), 0.0, {}, 0.0))
    other = engine.arrive(PROMPT, params(PROMPT, "other"))
    engine.step()
    eventually(lambda: any(isinstance(m, messages.Claim) and m.request == "other" for m in prefill.heard))
    prefill.say(granted(PROMPT, "other", [31, 32, 33, 34]))
    eventually(lambda: engine.step() and other.kv_transfer_params)
    reads: dict[str, list[int]] = {}
    eventually(lambda: reads.update(engine.pulls(engine.step())) or other.num_computed_tokens)
    assert engine.count("mapped_requests") == 1, "the other one is pulled"
    engine.abort(other)
    monkeypatch.setattr("vllm_adrenaline.decode.request_table.MAP_AGAIN_S", 0.0)
    engine.scheduler.table.pools[0].unmapped_until = 0.0
    placed(engine, prefill, "third")
    assert engine.count("mapped_requests") == 2
    finish(engine, request)


def test_growth_that_nobody_leases_any_more_is_recomputed_here(
    decode: Any, prefill: Prefill, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(starvation, "STARVE_S", 0.0)
    engine = decode(pool="mapped", ratio="1")
    request = grown(engine, prefill, tokens=200)
    prefill.forget()
    computed = 0
    for _ in range(400):
        if request.is_finished():
            break
        scheduled = engine.step()
        assert engine.pulls(scheduled) == {}, "it is read from a prefill engine that has forgotten it"
        computed = max(computed, scheduled.num_scheduled_tokens.get(request.request_id, 0))
    assert request.is_finished()
    assert computed > len(PROMPT), "it is computed here, with what it had generated"
    assert request.num_output_tokens == 200
    assert engine.count("fallback_requests") == 1
    assert engine.free_blocks == engine.free
    eventually(lambda: engine.step() and let_go(prefill) == ["member 1"])


def test_rows_of_memory_that_could_not_be_mapped_are_recomputed_without_their_token(
    decode: Any, prefill: Prefill
) -> None:
    engine = decode(pool="mapped", ratio="1")
    request = placed(engine, prefill)
    tokens = request.num_output_tokens
    engine.step(Report(frozenset({mapped_pool(0)}), frozenset(), frozenset(), frozenset(), 0.0, {}, 0.0))
    assert request.num_output_tokens == tokens, "its token is worthless"
    assert engine.step().num_scheduled_tokens == {request.request_id: len(PROMPT) + tokens}
    eventually(lambda: released(prefill) == ["prompt"])
    assert engine.count("executor_failures") == 0
    assert not any(isinstance(message, messages.KillExecutors) for message in prefill.heard)
    finish(engine, request)


def test_an_executor_that_fails_costs_mapped_requests_nothing(decode: Any, prefill: Prefill) -> None:
    engine = decode(pool="both", ratio="1")
    remote, mapped = placed(engine, prefill), placed(engine, prefill, "second")
    kinds = {pool_of(blocks_of(engine, each)[0]) for each in (remote, mapped)}
    assert kinds == {1, mapped_pool(0)}
    tokens = mapped.num_output_tokens
    engine.step(Report(frozenset({1}), frozenset(), frozenset(), frozenset({0}), 0.0, {}, 0.0))
    assert mapped.num_output_tokens == tokens + 1
    assert engine.count("fallback_requests") == 1
    finish(engine, mapped)
    finish(engine, remote)
