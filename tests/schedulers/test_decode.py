"""What a decode engine does with prompts of a prefill engine, whatever that one says and whenever it ends."""

from __future__ import annotations

import subprocess
import sys
import time
from typing import Any

import pytest

from tests.schedulers.conftest import BLOCK, ENGINE, KEY, Decode, Prefill, eventually
from tests.unit.test_control import NESTED
from vllm_adrenaline.control import client, messages
from vllm_adrenaline.decode import request_table
from vllm_adrenaline.decode.report import Report
from vllm_adrenaline.kv.prompt_hash import prompt_hash
from vllm_adrenaline.kv.space import remote_pool
from vllm_adrenaline.kv.stamp import stamped
from vllm_adrenaline.placement import starvation

PROMPT = list(range(10, 10 + 3 * BLOCK + 5))
BLOCKS = [11, 12, 13, 14]


def params(prompt: list[int], name: str = "prompt", **other: Any) -> dict[str, Any]:
    """Return the kv_transfer_params that a prefill engine answers with, signed; its stamp may be replaced."""
    stamp = {"adrenaline": other.pop("adrenaline")} if "adrenaline" in other else {}
    made = {
        "do_remote_prefill": True,
        "do_remote_decode": False,
        "remote_block_ids": [BLOCKS],
        "remote_engine_id": ENGINE,
        "remote_request_id": name,
        "remote_host": "127.0.0.1",
        "remote_port": 5600,
        "tp_size": 1,
        **other,
    }
    return stamped(made, prompt_hash(prompt), len(prompt), KEY) | stamp


def granted(prompt: list[int], name: str = "prompt", blocks: list[int] = BLOCKS) -> messages.Claimed:
    return messages.Claimed(name, blocks, len(prompt), prompt_hash(prompt))


def offloaded(decode: Decode, prefill: Prefill, name: str = "prompt", max_tokens: int = 8) -> Any:
    """Return a request that decodes over the prefill engine's KV cache and has made a token."""
    prompt = PROMPT
    request = decode.arrive(prompt, params(prompt, name), max_tokens=max_tokens)
    decode.step()
    assert prefill.expect(messages.Claim).request == name
    prefill.say(granted(prompt, name))
    eventually(lambda: decode.step().num_scheduled_tokens)
    assert request.num_output_tokens == 1
    return request


def pulled(decode: Decode, prefill: Prefill, name: str = "prompt") -> Any:
    """Return a request whose prompt NIXL was told to pull."""
    prompt = PROMPT
    request = decode.arrive(prompt, params(prompt, name))
    decode.step()
    assert prefill.expect(messages.Claim).request == name
    prefill.say(granted(prompt, name))
    assert decode.until_pull() == {request.request_id: BLOCKS}, "what is read is what the claim says"
    return request


def released(prefill: Prefill) -> list[str]:
    """Return the claims that were given back so far."""
    return [name for m in prefill.heard if isinstance(m, messages.Release) for name in m.requests]


def report(failed: bool = False, writing: bool = False, hung: int = 0, unavailable: bool = True) -> Report:
    """What a worker reports of the executor: whether it failed in a step, may still write, hangs, is not used."""

    def those(condition: object) -> frozenset[int]:
        return frozenset({0}) if condition else frozenset()

    pools = frozenset(map(remote_pool, those(failed)))
    pids = frozenset((executor, hung) for executor in those(hung))
    return Report(pools, those(writing), pids, those(unavailable), 0.0, {}, 0.0)


def failure() -> Report:
    """What a worker reports of a step in which an executor did not answer and let go at once."""
    return report(failed=True)


def finish(decode: Decode, request: Any) -> None:
    """Run a request to its end."""
    for _ in range(100):
        if request.is_finished():
            return
        decode.step()
    raise AssertionError(f"request {request.request_id} does not end: {request.status}")


# Life of a request


def test_an_offloaded_request_takes_no_local_block_and_gives_its_claim_back(decode: Any, prefill: Prefill) -> None:
    engine = decode(ratio="1")
    request = offloaded(engine, prefill)
    assert engine.free_blocks == engine.free
    engine.abort(request)
    engine.step()
    eventually(lambda: released(prefill) == ["prompt"])
    assert engine.count("offloaded_requests") == 1


def test_a_local_request_reads_the_blocks_of_its_claim_and_holds_them_until_it_has_read(
    decode: Any, prefill: Prefill
) -> None:
    engine = decode(ratio="0")
    request = pulled(engine, prefill)
    engine.step()
    assert prefill.silent()
    scheduled = engine.step(received={request.request_id})
    eventually(lambda: released(prefill) == ["prompt"])
    scheduled = engine.step()
    assert scheduled.num_scheduled_tokens == {request.request_id: 1}, "only the last token is computed"
    assert scheduled.kv_connector_metadata.received == {request.request_id}, "and not written"
    finish(engine, request)
    assert engine.free_blocks == engine.free
    assert engine.count("local_requests") == 1


def test_a_decode_engine_that_ends_says_so(decode: Any, prefill: Prefill) -> None:
    engine = decode(ratio="1")
    offloaded(engine, prefill)
    engine.stop()
    prefill.expect(messages.Leave)


def test_nothing_is_offloaded_while_the_prefill_engine_may_have_taken_it_back(
    decode: Any, prefill: Prefill, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A decode engine that slept for a lease does not know yet that its blocks are somebody else's."""
    engine = decode(ratio="1")
    request = engine.arrive(PROMPT, params(PROMPT))
    engine.step()
    prefill.expect(messages.Claim)
    monkeypatch.setattr(client, "MARGIN", 0.0)
    prefill.say(granted(PROMPT))
    reads: dict[str, list[int]] = {}

    def told() -> bool:
        scheduled = engine.schedule()
        reads.update(engine.pulls(scheduled))
        engine.update(scheduled)
        return bool(reads) or request.num_output_tokens > 0

    eventually(told)
    assert reads == {request.request_id: BLOCKS}
    assert engine.count("offloaded_requests") == 0


# Prompts that do not fit


def test_kv_of_another_prompt_is_not_read_and_given_up_at_once(decode: Any, prefill: Prefill) -> None:
    engine = decode(ratio="0")
    request = engine.arrive(PROMPT, params(PROMPT[1:]))
    scheduled = engine.step()
    assert engine.pulls(scheduled) == {}
    assert scheduled.num_scheduled_tokens == {request.request_id: len(PROMPT)}, "it is computed here"
    assert prefill.expect(messages.Drop).requests == ["prompt"]
    assert engine.count("refused_params") == 1


OTHERS = list(range(100, 100 + len(PROMPT)))
"""A prompt of another user's."""


@pytest.mark.parametrize(
    "forged",
    [
        stamped(params(OTHERS), prompt_hash(OTHERS), len(OTHERS), b"a guess"),
        params(OTHERS) | {"remote_request_id": "another"},
        params(OTHERS) | {"do_remote_prefill": False},
        params(OTHERS, adrenaline=params(PROMPT)["adrenaline"] | {"signature": ""}),
        params(OTHERS, adrenaline=params(PROMPT)["adrenaline"] | {"prompt_hash": prompt_hash(OTHERS).hex()}),
        params(OTHERS, adrenaline=params(OTHERS)["adrenaline"] | {"signature": "\ud800"}),
    ],
    ids=["other key", "other name", "called a beginning", "unsigned", "other hash", "no text"],
)
def test_what_the_prefill_engine_has_not_signed_reaches_no_prompt(
    decode: Any, prefill: Prefill, forged: dict[str, Any]
) -> None:
    """Not even to drop it: the prompt may be another user's."""
    engine = decode(ratio="0")
    request = engine.arrive(OTHERS, forged)
    scheduled = engine.step()
    assert engine.pulls(scheduled) == {}
    assert scheduled.num_scheduled_tokens == {request.request_id: len(OTHERS)}, "it is computed here"
    assert prefill.silent()
    assert engine.count("refused_params") == engine.count("unsigned_params") == 1


def test_prompts_that_are_given_up_say_nothing_of_how_long_answers_get(decode: Any, prefill: Prefill) -> None:
    """As the proxy gives them up, one for each client that leaves: with a request for another prompt, and one token."""
    engine = decode(ratio="1")
    lengths = engine.scheduler.table.admission.lengths
    before = lengths.expected_growth(0, 1000)
    for number in range(lengths.ENOUGH):
        finish(engine, engine.arrive([0], params(PROMPT, f"prompt {number}"), max_tokens=1))
        assert prefill.expect(messages.Drop).requests == [f"prompt {number}"]
    assert lengths.expected_growth(0, 1000) == before
    for _ in range(lengths.ENOUGH):
        finish(engine, engine.arrive([0], max_tokens=2))
    assert lengths.expected_growth(0, 1000) == 2


def test_addresses_may_be_changed_by_routers(decode: Any, prefill: Prefill) -> None:
    engine = decode(ratio="0")
    engine.arrive(
        PROMPT, params(PROMPT) | {"remote_host": "prefill.example", "remote_port": 1, "remote_block_ids": None}
    )
    engine.step()
    assert prefill.expect(messages.Claim).request == "prompt"


def test_what_an_earlier_life_of_the_prefill_engine_signed_is_not_believed(decode: Any, prefill: Prefill) -> None:
    engine = decode(ratio="0")
    prefill.key = b"the next"
    prefill.forget()
    engine.step()
    request = engine.arrive(PROMPT, params(PROMPT))
    assert engine.step().num_scheduled_tokens == {request.request_id: len(PROMPT)}
    assert engine.count("unsigned_params") == 1


def test_an_idle_engine_takes_the_first_prompt_of_a_prefill_engine_that_came_back(
    decode: Any, prefill: Prefill
) -> None:
    engine = decode(ratio="1")
    for _ in range(2):
        prefill.forget()
    assert not engine.scheduler.has_requests(), "no step is made in which it would be heard of"
    first, second = (engine.arrive(PROMPT, params(PROMPT, name)) for name in ("first", "second"))
    assert engine.step().num_scheduled_tokens == {}
    for request in (first, second):
        claim = prefill.expect(messages.Claim).request
        prefill.say(granted(PROMPT, claim, BLOCKS if request is first else [21, 22, 23, 24]))
    finish(engine, first)
    finish(engine, second)
    assert (engine.count("offloaded_requests"), engine.count("refused_params")) == (2, 0)


def test_a_prompt_is_taken_once(decode: Any, prefill: Prefill) -> None:
    """As a router passes on the parameters of the first of several prompts, or of `n` answers to one."""
    engine = decode(ratio="0")
    first, second, third = (engine.arrive(p, params(PROMPT)) for p in (PROMPT, PROMPT, PROMPT[::-1]))
    scheduled = engine.step()
    assert scheduled.num_scheduled_tokens == {each.request_id: len(PROMPT) for each in (second, third)}
    assert engine.pulls(scheduled) == {}
    prefill.expect(messages.Claim)
    prefill.say(granted(PROMPT))
    prompts: dict[str, list[int]] = {}
    eventually(lambda: prompts.update(engine.pulls(engine.step())) or prompts)
    assert prompts == {first.request_id: BLOCKS}


def test_a_claim_that_turns_out_to_be_of_another_prompt_is_given_back(decode: Any, prefill: Prefill) -> None:
    engine = decode(ratio="0")
    request = engine.arrive(PROMPT, params(PROMPT))
    engine.step()
    prefill.expect(messages.Claim)
    prefill.say(messages.Claimed("prompt", BLOCKS, len(PROMPT), b"another"))
    reads: dict[str, list[int]] = {}

    def step() -> bool:
        scheduled = engine.schedule()
        reads.update(engine.pulls(scheduled))
        engine.update(scheduled)
        return bool(reads or scheduled.num_scheduled_tokens)

    eventually(step)
    assert reads == {}, "KV of another prompt is read"
    eventually(lambda: engine.step() and released(prefill) == ["prompt"])
    finish(engine, request)


@pytest.mark.parametrize("blocks", [[11, 12, 13], [11, 12, 13, 14, 15], [11, 12, 13, 1000], [11, 12, 12, 13], []])
def test_a_claim_with_impossible_blocks_is_given_back(decode: Any, prefill: Prefill, blocks: list[int]) -> None:
    engine = decode(ratio="1")
    request = engine.arrive(PROMPT, params(PROMPT))
    engine.step()
    prefill.expect(messages.Claim)
    prefill.say(granted(PROMPT, blocks=blocks))
    eventually(lambda: engine.step().num_scheduled_tokens == {request.request_id: len(PROMPT)})
    eventually(lambda: released(prefill) == ["prompt"])
    finish(engine, request)
    assert engine.free_blocks == engine.free


@pytest.mark.parametrize("blocks", [[5, 6, 7, 8], [1000], [5, 5]])
def test_leases_that_cannot_be_are_not_used(decode: Any, prefill: Prefill, blocks: list[int]) -> None:
    engine = decode(ratio="1")
    request = offloaded(engine, prefill, max_tokens=40)
    assert prefill.expect(messages.Lease).want < 4
    prefill.say(messages.Leased(blocks))
    eventually(lambda: engine.step() and not prefill.inbox.empty())
    again = prefill.expect(messages.Lease)
    prefill.say(messages.Leased(list(range(100, 100 + again.want))))
    eventually(lambda: engine.step() and request.is_finished())
    assert engine.free_blocks == engine.free, "it goes on with blocks of the second lease"


@pytest.mark.parametrize(
    "raw",
    [
        {"do_remote_prefill": True},
        {"remote_engine_id": 5, "remote_request_id": []},
        {"remote_engine_id": ENGINE, "remote_request_id": "prompt", "adrenaline": "no"},
        {"remote_engine_id": "another", "remote_request_id": "prompt"},
        params(PROMPT) | {"remote_request_id": "\ud800"},  # text in JSON, and in nothing else
    ],
)
def test_malformed_parameters_cost_only_their_own_request_its_pull(
    decode: Any, prefill: Prefill, raw: dict[str, Any]
) -> None:
    engine = decode(ratio="0")
    request = engine.arrive(PROMPT, raw)
    assert engine.step().num_scheduled_tokens == {request.request_id: len(PROMPT)}
    finish(engine, request)


# Requests that end early


@pytest.mark.parametrize("when", ["claiming", "granted", "pulling", "offloaded"])
def test_a_request_that_ends_gives_its_prompt_back_at_once(decode: Any, prefill: Prefill, when: str) -> None:
    engine = decode(ratio="1" if when == "offloaded" else "0", blocks=3 if when == "granted" else 65)
    if when in ("pulling", "offloaded"):
        request = {"pulling": pulled, "offloaded": offloaded}[when](engine, prefill)
        engine.abort(request)
    else:
        request = engine.arrive(PROMPT, params(PROMPT))
        engine.step()
        prefill.expect(messages.Claim)
        if when == "claiming":
            engine.abort(request)
            prefill.say(granted(PROMPT))
            assert engine.scheduler.has_requests(), "the engine stays awake until the claim is settled"
        else:
            prefill.say(granted(PROMPT))
            for _ in range(20):
                engine.step()
            engine.abort(request)
    eventually(lambda: engine.step() and released(prefill) == ["prompt"])
    if when == "pulling":
        engine.step(received={request.request_id})
    assert engine.free_blocks == engine.free


def test_parameters_that_vllm_itself_refuses_are_given_up(decode: Any, prefill: Prefill) -> None:
    """vLLM then submits a request of the one token 0 with the same parameters, and aborts it."""
    engine = decode(ratio="0.5")
    engine.abort(engine.arrive([0], params(PROMPT)))
    assert prefill.expect(messages.Drop).requests == ["prompt"]
    engine.step()
    assert prefill.silent()


def test_nothing_is_released_while_an_executor_that_failed_may_still_write(decode: Any, prefill: Prefill) -> None:
    engine = decode(ratio="1")
    request = offloaded(engine, prefill)
    scheduled = engine.schedule()
    engine.abort(request)  # EngineCore.step takes aborts before it takes what the step gave
    engine.update(scheduled, report(failed=True, writing=True))
    for _ in range(5):
        assert engine.scheduler.has_requests(), "the engine stays awake until blocks are given back"
        engine.step(report(writing=True))
    assert prefill.silent(), "nobody is killed for being late, and no block comes free"
    engine.step(report())
    eventually(lambda: released(prefill) == ["prompt"])
    assert not any(isinstance(m, messages.KillExecutors) for m in prefill.heard)


def test_an_executor_that_does_not_let_go_is_killed_before_anything_is_released(decode: Any, prefill: Prefill) -> None:
    engine = decode(ratio="1")
    request = offloaded(engine, prefill)
    scheduled = engine.schedule()
    engine.abort(request)
    engine.update(scheduled, report(failed=True, writing=True))
    engine.step(report(writing=True, hung=77))
    assert prefill.expect(messages.KillExecutors).pids == [77]
    assert released(prefill) == []
    engine.step(report(writing=True))
    engine.step(report())
    eventually(lambda: released(prefill) == ["prompt"])
    engine.step(report(unavailable=False))
    assert engine.count("executor_returns") == 1


def test_leased_blocks_are_given_to_nobody_while_an_executor_may_write_into_them(decode: Any, prefill: Prefill) -> None:
    pool = decode(ratio="1").scheduler.table.pools[0]
    pool.asked = 3
    pool.add_leased([7, 8, 9])
    used = pool.take(1)
    pool.keep_from_use(True)
    pool.free_blocks(used)
    assert pool.free == [], "neither those that were free, nor one that comes free meanwhile"
    pool.asked = 1
    pool.add_leased([5])
    assert pool.free == [5], "what is leased meanwhile was never the executor's"
    pool.keep_from_use(False)
    assert sorted(pool.free) == [5, 7, 8, 9]


# Prefill engines that go away


@pytest.mark.parametrize("wakes", ["grants", "rejects"])
def test_a_prompt_that_a_hanging_prefill_engine_was_asked_for_is_computed_here(
    decode: Any, prefill: Prefill, monkeypatch: pytest.MonkeyPatch, wakes: str
) -> None:
    monkeypatch.setattr(client, "HANGS_S", 0.4)
    monkeypatch.setattr(client, "QUIET_S", 0.4)
    monkeypatch.setattr(request_table, "CLAIM_S", 0.2)
    engine = decode(ratio="1")
    prefill.answers_beats = False
    request = engine.arrive(PROMPT, params(PROMPT))
    prefill.expect(messages.Claim)
    eventually(lambda: request.request_id in engine.step().num_scheduled_tokens)
    assert engine.count("fallback_requests") == 1
    finish(engine, request)
    assert engine.scheduler.has_requests(), "the claim is under way"
    prefill.answers_beats = True
    prefill.say(granted(PROMPT) if wakes == "grants" else messages.ClaimRejected("prompt"))
    eventually(lambda: engine.step() and not engine.scheduler.has_requests())
    eventually(lambda: released(prefill) == (["prompt"] if wakes == "grants" else []))


def test_a_silent_prefill_engine_that_works_is_waited_for_longer(
    decode: Any, prefill: Prefill, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Others may have its cores."""
    monkeypatch.setattr(client, "HANGS_S", 0.4)
    monkeypatch.setattr(client, "BUSY_S", 1.5)
    monkeypatch.setattr(request_table, "CLAIM_S", 0.2)
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as busy:
        prefill.be(busy.pid)
        engine = decode(ratio="1")
        prefill.answers_beats = False
        engine.arrive(PROMPT, params(PROMPT))
        prefill.expect(messages.Claim)
        until = time.monotonic() + 1
        while time.monotonic() < until:
            assert not engine.step().num_scheduled_tokens
        eventually(lambda: engine.step().num_scheduled_tokens)
        busy.kill()
    assert engine.count("fallback_requests") == 1


def test_a_prefill_engine_that_is_only_slow_to_grant_is_waited_for(
    decode: Any, prefill: Prefill, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(request_table, "CLAIM_S", 0.0)
    engine = decode(ratio="1")
    engine.arrive(PROMPT, params(PROMPT))
    prefill.expect(messages.Claim)
    until = time.monotonic() + 1
    while time.monotonic() < until:
        assert not engine.step().num_scheduled_tokens
    assert engine.count("fallback_requests") == 0


@pytest.mark.parametrize(
    "answer",
    [
        messages.ClaimRejected("prompt"),
        messages.Claimed("prompt", BLOCKS, len(PROMPT), prompt_hash(PROMPT)),
        messages.Leased([1]),
    ],
)
def test_answers_behind_the_last_word_of_a_prefill_engine_harm_nobody(
    decode: Any, prefill: Prefill, answer: messages.Message
) -> None:
    engine = decode(ratio="1")
    request = engine.arrive(PROMPT, params(PROMPT))
    running = engine.arrive(PROMPT)
    engine.step()
    prefill.expect(messages.Claim)
    # The scheduler does nothing while both come, as on an idle engine that a burst wakes.
    prefill.forget()
    prefill.say(answer)
    time.sleep(0.1)
    engine.arrive(PROMPT[::-1])
    eventually(lambda: engine.step() and request.num_output_tokens)
    finish(engine, request)
    finish(engine, running)
    assert engine.free_blocks == engine.free


@pytest.mark.parametrize("when", ["waiting", "migrating", "pulling", "received", "offloaded"])
def test_what_a_prefill_engine_took_back_is_not_used(decode: Any, prefill: Prefill, when: str) -> None:
    """The decode engine slept over its lease: blocks it still knows of are somebody else's by now."""
    engine = decode(ratio="1" if when in ("offloaded", "migrating") else "0", blocks=40)
    blocker = None
    if when == "waiting":
        blocker = engine.arrive(list(range(500, 500 + 35 * BLOCK)), max_tokens=60)
        engine.step()
        request = engine.arrive(PROMPT * 2, params(PROMPT * 2))
        engine.step()
        prefill.expect(messages.Claim)
        prefill.say(granted(PROMPT * 2, blocks=[21, 22, 23, 24, 25, 26, 27]))
        for _ in range(10):
            engine.step()
    elif when == "offloaded":
        request = offloaded(engine, prefill)
    elif when == "migrating":  # no block is lent, so it moves to the decode engine
        request = offloaded(engine, prefill, max_tokens=40)
        eventually(lambda: engine.pulls(engine.step()))
    else:
        request = pulled(engine, prefill)
        if when == "received":
            engine.step(received={request.request_id})
    before = len(prefill.heard)
    prefill.forget()
    reads: dict[str, list[int]] = {}
    scheduled = engine.schedule()
    reads.update(engine.pulls(scheduled))
    computed = scheduled.num_scheduled_tokens.get(request.request_id, 0)
    # A read that was under way ends well, from NIXL's point of view.
    engine.update(scheduled, received={request.request_id} if when in ("pulling", "migrating") else None)
    for _ in range(200):
        if request.is_finished():
            break
        scheduled = engine.step()
        reads.update(engine.pulls(scheduled))
        computed = max(computed, scheduled.num_scheduled_tokens.get(request.request_id, 0))
    assert request.is_finished(), request.status
    assert reads == {}, "what was taken back is read"
    assert (computed >= len(PROMPT)) == (when != "received"), "it is computed here, unless it had arrived before"
    if blocker is not None:
        finish(engine, blocker)
    assert engine.free_blocks == engine.free
    assert released(prefill)[before:] == []


def test_what_was_to_be_pulled_when_there_is_room_is_not_pulled_after_it_was_taken_back(
    decode: Any, prefill: Prefill, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A request that moves to the decode engine waits there for local blocks when its prefill engine takes all back."""
    monkeypatch.setattr(starvation, "STARVE_S", 1000.0)
    engine = decode(ratio="1", blocks=9)
    request = offloaded(engine, prefill, max_tokens=40)
    prefill.expect(messages.Lease)  # which is not answered: with the fifth block it starves
    blocker = engine.arrive(list(range(500, 500 + 2 * BLOCK + 1)), max_tokens=60)
    eventually(lambda: request.request_id not in engine.step().num_scheduled_tokens)
    for _ in range(BLOCK):
        if blocker.num_tokens % BLOCK == 1:  # its next token needs one of the five blocks that are left
            break
        engine.step()
    assert engine.free_blocks == 5
    monkeypatch.setattr(starvation, "STARVE_S", 0.0)
    reads: dict[str, list[int]] = {}

    def step() -> int:
        scheduled = engine.schedule()
        reads.update(engine.pulls(scheduled))
        engine.update(scheduled)
        return int(scheduled.num_scheduled_tokens.get(request.request_id, 0))

    step()
    assert engine.count("moved_requests") == 1
    assert (reads, engine.free_blocks) == ({}, 4), "it waits for room"
    prefill.forget()
    computed = 0
    for _ in range(200):
        computed = max(computed, step())
    assert reads == {}, "what was taken back is read"
    assert computed >= len(PROMPT), "it is computed here"
    assert request.is_finished()
    assert blocker.is_finished()
    assert engine.free_blocks == engine.free


def test_a_pull_that_ends_after_the_lease_did_is_not_believed(decode: Any, prefill: Prefill) -> None:
    """The engine slept over its lease and finds its pull done before it hears that all was taken back."""
    prefill.lease_seconds = 0.5
    engine = decode(ratio="0")
    request = pulled(engine, prefill)
    prefill.answers_beats = False
    for _ in range(7):  # it is there, but no beat of ours gets through
        time.sleep(0.1)
        prefill.say(messages.Leased([]))
    engine.step(received={request.request_id})
    assert engine.step().num_scheduled_tokens == {request.request_id: len(PROMPT)}, "computed here"
    finish(engine, request)
    assert engine.free_blocks == engine.free


# What comes over the wire


def test_any_bytes_from_a_prefill_engine_are_survived(decode: Any, prefill: Prefill) -> None:
    engine = decode(ratio="1")
    for frame in (b"", b"\xff", NESTED, messages.encode(messages.Lease(3)), b"\xc1" * 100):
        prefill.say_bytes(frame)
    request = offloaded(engine, prefill)
    finish(engine, request)


def test_thousands_of_prompts_that_are_lost_at_once_do_not_end_the_engine(decode: Any, prefill: Prefill) -> None:
    engine = decode()
    prompts = [[1, 2, i % 256, i // 256] for i in range(3000)]
    requests = [engine.arrive(prompt, params(prompt, f"p{i}")) for i, prompt in enumerate(prompts)]
    prefill.say(*(granted(prompt, f"p{i}", [i % 1000]) for i, prompt in enumerate(prompts)))
    eventually(lambda: engine.step() and prefill.beat.waiting > 2900, seconds=30)
    prefill.refusal = "unknown decode engine"
    time.sleep(0.6)  # a beat is refused, and the line to the prefill engine rests for a second
    for _ in range(3):
        engine.step()
    assert any(request.num_output_tokens for request in requests)
