"""What a prefill engine's scheduler does with finished prompts, and that it is quiet about it."""

from __future__ import annotations

import logging
import os
import random
import socket
import subprocess
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from typing import Any

import msgspec
import pytest
import zmq

from tests.schedulers.conftest import KEEP, PROMPT, PrefillEngine, eventually
from tests.unit.test_mapped_memory import Cache
from vllm_adrenaline.compat.side_channel import PORT
from vllm_adrenaline.control import addresses, messages
from vllm_adrenaline.kv.prompt_hash import prompt_hash
from vllm_adrenaline.kv.stamp import GIVES_UP, Stamp
from vllm_adrenaline.prefill import executor_pool
from vllm_adrenaline.system import descriptors


@pytest.fixture
def prefill(prefill_engine: Callable[..., PrefillEngine]) -> Callable[..., PrefillEngine]:
    return prefill_engine


def test_a_finished_prompt_carries_the_proof_of_what_it_is(prefill: Any) -> None:
    engine = prefill()
    told = engine.finish()
    stamp = msgspec.convert(told["adrenaline"], Stamp)
    assert (stamp.version, stamp.num_tokens) == (2, len(PROMPT))
    assert stamp.prompt_hash == prompt_hash(PROMPT).hex()
    assert stamp.is_signed(engine.welcome.key, told)
    assert len(engine.welcome.key) == 32


def test_only_who_borrows_is_told_the_key(prefill: Any) -> None:
    engine = prefill()
    welcome = engine.ask(messages.Hello(engine.scheduler.control.identity, borrows=False))
    assert isinstance(welcome, messages.Welcome)
    assert welcome.key == b""


def test_a_dropped_prompt_is_free_at_once(prefill: Any) -> None:
    engine = prefill()
    told = engine.finish()
    assert engine.free_blocks < engine.free
    engine.line.send(messages.encode(messages.Drop([told["remote_request_id"]])))
    eventually(lambda: engine.let_go() or engine.free_blocks == engine.free)


@pytest.mark.parametrize("when", ["before it ends", "when it is on offer"])
def test_a_prompt_is_given_up_by_its_ticket_whenever_its_client_left(prefill: Any, when: str) -> None:
    engine = prefill()
    if when == "before it ends":
        engine.arrive([7], {GIVES_UP: "t"}, max_tokens=1)
    assert engine.finish(ticket="t") is not None
    assert engine.free_blocks < engine.free
    if when != "before it ends":
        engine.arrive([7], {GIVES_UP: "t"}, max_tokens=1)
    for _ in range(2):
        engine.let_go()
    assert engine.free_blocks == engine.free


def test_a_prompt_without_a_ticket_cannot_be_given_up(prefill: Any) -> None:
    engine = prefill()
    name = engine.finish()["remote_request_id"]
    for said in ("", None, 7, "x" * 100, ["t"]):
        engine.arrive([7], {GIVES_UP: said}, max_tokens=1)
        engine.let_go()
    assert isinstance(engine.ask(messages.Claim(name)), messages.Claimed)


def test_a_claimed_prompt_is_kept_until_it_is_released_whatever_is_dropped(prefill: Any) -> None:
    engine = prefill()
    name = engine.finish()["remote_request_id"]
    assert isinstance(engine.ask(messages.Claim(name)), messages.Claimed)
    engine.line.send(messages.encode(messages.Drop([name])))
    engine.let_go()
    assert engine.free_blocks < engine.free
    engine.line.send(messages.encode(messages.Release([name], [])))
    assert isinstance(engine.ask(messages.Heartbeat()), messages.Load)
    assert engine.free_blocks == engine.free


def test_a_prompt_whose_name_is_too_long_to_be_claimed_is_not_kept(prefill: Any) -> None:
    engine = prefill()
    assert engine.finish("x" * 600) is None
    assert engine.free_blocks == engine.free


def test_a_prompt_that_nobody_claims_is_kept_for_a_short_time_of_its_own(prefill: Any) -> None:
    engine = prefill(claim_seconds=7, lease_seconds=600)
    name = engine.finish()["remote_request_id"]
    before = time.perf_counter()
    until = engine.schedule().kv_connector_metadata.reqs_to_send[name]
    assert before + 5 < until <= before + 7


def test_nixl_is_answered_at_the_port_that_decode_engines_are_told_whoever_has_another(
    prefill: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm.distributed.kv_transfer.kv_connector.v1.nixl.metadata import NixlHandshakePayload

    monkeypatch.delenv(PORT, raising=False)
    with ExitStack() as stack:
        with suppress(OSError):  # if it fails somebody else has NIXL's own choice
            stack.enter_context(socket.create_server(("127.0.0.1", 5600)))
        engine = prefill()
        metadata = {(0, 0): NixlHandshakePayload(compatibility_hash="h", agent_metadata_bytes=b"m")}
        serve = engine.scheduler.connector.set_xfer_handshake_metadata_pp_aware
        thread = threading.Thread(target=serve, args=(metadata,), daemon=True)
        thread.start()
        thread.join(10)
        assert not thread.is_alive(), "the engine core waits for a thread that has ended"
        asking = stack.enter_context(zmq.Context.instance().socket(zmq.REQ))
        asking.setsockopt(zmq.LINGER, 0)
        asking.connect(f"tcp://{engine.welcome.nixl_host}:{engine.welcome.nixl_port}")
        asking.send(msgspec.msgpack.encode((b"get_meta_msg", 0, 0)))
        assert asking.poll(5000)
        assert asking.recv_multipart()[0] == msgspec.msgpack.encode(metadata[0, 0])


@pytest.mark.parametrize("asked", ["UNPAUSED", "PAUSED_NEW", "PAUSED_ALL"])
def test_steps_without_news_say_nothing_and_leave_a_pause_of_the_operator_alone(
    prefill: Any, caplog: pytest.LogCaptureFixture, asked: str
) -> None:
    """This engine steps every millisecond while a prompt can be had."""
    from vllm.v1.core.sched.interface import PauseState

    engine = prefill()
    engine.finish()
    engine.scheduler.set_pause_state(PauseState[asked])
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    vllm_logger = logging.getLogger("vllm")
    vllm_logger.addHandler(handler)
    for _ in range(100):
        engine.step()
    vllm_logger.removeHandler(handler)
    assert said == []
    assert engine.scheduler.pause_state is PauseState[asked]


def test_prompts_that_would_take_what_offloaded_requests_grow_into_wait(prefill: Any) -> None:
    engine = prefill(growth_reserve=0.9)
    name = engine.finish()["remote_request_id"]
    assert isinstance(engine.ask(messages.Claim(name)), messages.Claimed)
    engine.let_go()
    assert isinstance(engine.ask(messages.Lease(2)), messages.Leased)
    waiting = engine.arrive(PROMPT[::-1], KEEP)
    assert engine.step().num_scheduled_tokens == {}
    engine.line.send(messages.encode(messages.Leave()))
    eventually(lambda: engine.step().num_scheduled_tokens == {waiting.request_id: len(PROMPT)})


def test_both_sides_racing_for_the_last_block_never_get_the_same_one(
    prefill: Callable[..., PrefillEngine],
) -> None:
    """semi-PD's hazard: two workers ask how much memory is free, and both take it (arXiv 2504.19867, section 4)."""
    engine = prefill(prefill_reserve=0.0, growth_reserve=0.0)
    pool = engine.scheduler.kv_cache_manager.block_pool
    lent: set[int] = set()
    stopping, wrong = threading.Event(), list[object]()

    def borrow() -> None:
        rng = random.Random(1)
        while not stopping.is_set():
            leased = engine.ask(messages.Lease(rng.choice([3, 64])))
            assert isinstance(leased, messages.Leased)
            if lent & set(leased.blocks):
                wrong.append(leased)
            lent.update(leased.blocks)
            time.sleep(rng.choice([0, 0.005]))
            back = rng.sample(sorted(lent), rng.randrange(len(lent) + 1))
            lent.difference_update(back)
            engine.line.send(messages.encode(messages.Release([], back)))

    borrower = threading.Thread(target=borrow, daemon=True)
    first = engine.ask(messages.Lease(64))
    assert isinstance(first, messages.Leased)
    lent.update(first.blocks)  # memory has run out when the race begins
    full = computed = 0
    for number in range(300):
        request = engine.arrive([number % 500, *PROMPT], None, max_tokens=1)
        for _ in range(5000):
            scheduled = engine.schedule()
            with engine.scheduler.kv_lock:
                (mine,) = engine.scheduler.kv_cache_manager.get_block_ids(request.request_id)
                wrong += [block for block in mine if block in lent and pool.blocks[block].ref_cnt > 1]
            full += not scheduled.num_scheduled_tokens
            computed += bool(scheduled.num_scheduled_tokens)
            engine.update(scheduled)
            if borrower.ident is None:
                borrower.start()
            if request.is_finished():
                break
        assert request.is_finished(), "the prefill engine starves"
    stopping.set()
    borrower.join(5)
    assert not borrower.is_alive()
    assert wrong == []
    assert full > 0, "memory never ran out: the test says nothing"
    assert computed >= 300
    engine.line.send(messages.encode(messages.Release([], sorted(lent))))
    assert isinstance(engine.ask(messages.Heartbeat()), messages.Load)
    assert pool.get_num_free_blocks() == pool.num_gpu_blocks - 1


# Shares of the device, kept by objectives

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="higher priorities need privileges")


def gauges(engine: PrefillEngine) -> dict[str, float]:
    return dict(engine.scheduler.connector.connector_scheduler.gauges())


def test_without_an_objective_no_share_is_decided(prefill: Any) -> None:
    engine = prefill(executor_share=0.4)
    time.sleep(1.2)  # two turns of the control thread
    assert gauges(engine) == {"executor_share": 1.0}, "the pool keeps what it started with"


@needs_root
@pytest.mark.parametrize("pool", ["remote", "both"])
def test_with_executors_an_objective_is_kept_by_their_share(prefill: Any, pool: str) -> None:
    engine = prefill(pool=pool, executor_share=0.4, tpot_slo_ms=50)
    eventually(lambda: "decode_share" in gauges(engine))
    found = gauges(engine)
    assert found["executor_share"] == pytest.approx(0.4)
    assert found["prefill_share"] == 1.0
    assert found["decode_share"] == pytest.approx(0.4 / 0.6)


@needs_root
def test_without_executors_an_objective_is_kept_by_prefill_workers_against_decode_workers_that_map(
    prefill: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with ExitStack() as stack:
        worker, mapping = (stack.enter_context(subprocess.Popen(["sleep", "100"])) for _ in range(2))
        stack.callback(worker.kill)
        stack.callback(mapping.kill)
        os.setpriority(os.PRIO_PROCESS, mapping.pid, -10)
        monkeypatch.setattr(executor_pool.active(), "exports", [Cache(4).export])
        monkeypatch.setattr(executor_pool.ExecutorPool, "worker_pids", [worker.pid])
        engine = prefill(pool="mapped", tpot_slo_ms=50)
        time.sleep(1.2)
        assert "decode_share" not in gauges(engine), "nobody is there to share with"
        control, pidfd = engine.scheduler.control, os.pidfd_open(mapping.pid)
        token, theirs = descriptors.exchange(addresses.for_descriptors(control.address), [pidfd])
        descriptors.close([pidfd, *theirs])
        ask = messages.Map(control.identity, 0, engine.welcome.member, token)
        assert isinstance(engine.ask(ask), messages.Mappable)
        eventually(lambda: "decode_share" in gauges(engine))
        assert os.getpriority(os.PRIO_PROCESS, worker.pid) == -10, "to begin with, half of the device is prefill's"
        assert gauges(engine)["executor_share"] == 1.0, "there is no executor to give less"
