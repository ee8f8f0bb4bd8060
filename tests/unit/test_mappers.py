"""Blocks of a decode engine that maps the KV cache are not taken back before it cannot write any more."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import zmq

from tests.unit.test_control import IDENTITY, LOAD, Prefill, eventually
from tests.unit.test_mapped_memory import Cache
from vllm_adrenaline.control import messages, sockets
from vllm_adrenaline.errors import AdrenalineError
from vllm_adrenaline.prefill.mappers import MAX_WORKERS, Mappers


@pytest.fixture
def worker() -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen(["sleep", "100"]) as process:
        yield process
        process.kill()


@pytest.fixture
def prefill(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Prefill]:
    monkeypatch.setattr("vllm_adrenaline.control.server.POLL_MS", 50)
    made = Prefill(f"ipc://{tmp_path}/c")
    made.lending.exports = [Cache(4).export]
    yield made
    made.control.stop()


def ask_to_map(prefill: Prefill, engine: str, pid: int) -> messages.AnyMessage | None:
    message = messages.Map(IDENTITY, 0, prefill.members[engine], prefill.deposit(pid))
    return sockets.ask_once(prefill.control.address, message, 5)


def mapping(prefill: Prefill, engine: str, pid: int) -> zmq.Socket[bytes]:
    """Return the line of a decode engine with two leased blocks, of which a worker has the KV cache mapped."""
    line = prefill.connect(engine)
    assert ask_to_map(prefill, engine, pid) == messages.Mappable(prefill.lending.exports[0])
    return line


def test_a_worker_is_told_where_the_cache_is_without_belonging_to_anything(prefill: Prefill) -> None:
    answer = sockets.ask_once(prefill.control.address, messages.Map(IDENTITY, 0, "", prefill.deposit(os.getpid())), 5)
    assert answer == messages.Mappable(prefill.lending.exports[0])
    other = sockets.ask_once(prefill.control.address, messages.Map(IDENTITY, 1, "", prefill.deposit(os.getpid())), 5)
    assert isinstance(other, messages.Refused)


def test_silence_is_no_end_while_a_worker_lives_for_it_would_wake_up_and_write(
    prefill: Prefill, worker: subprocess.Popen[bytes]
) -> None:
    silent, other = mapping(prefill, "a", worker.pid), prefill.connect("b")
    worker.send_signal(signal.SIGSTOP)
    prefill.now = 100  # 60 s are a lease
    eventually(lambda: prefill.pool.get_num_free_blocks() == 8)
    assert isinstance(sockets.ask(other, messages.Heartbeat(), 5), messages.Refused), "the other one cannot write"
    assert sockets.ask(silent, messages.Heartbeat(), 5) == LOAD, "it has lost nothing"
    assert prefill.pool.get_num_free_blocks() == 8


def test_what_it_has_is_free_when_its_workers_have_ended(prefill: Prefill, worker: subprocess.Popen[bytes]) -> None:
    with subprocess.Popen(["sleep", "100"]) as second:
        line = mapping(prefill, "a", worker.pid)
        ask_to_map(prefill, "a", second.pid)
        line.send(messages.encode(messages.Leave()))
        eventually(lambda: prefill.revoked == ["a"])
        worker.kill()
        worker.wait()
        assert prefill.pool.get_num_free_blocks() == 8, "one of two ranks still lives"
        second.kill()
        second.wait()
        eventually(lambda: prefill.pool.get_num_free_blocks() == 10)


def test_a_decode_engine_that_comes_back_says_when_it_has_let_go(
    prefill: Prefill, worker: subprocess.Popen[bytes]
) -> None:
    mapping(prefill, "a", worker.pid)
    before = prefill.members["a"]
    again = prefill.connect("a")
    assert prefill.members["a"] != before
    eventually(lambda: prefill.revoked == ["a"])
    assert prefill.pool.get_num_free_blocks() == 6, "a step over the old blocks may still run"
    refused = sockets.ask_once(
        prefill.control.address, messages.Map(IDENTITY, 0, before, prefill.deposit(worker.pid)), 5
    )
    assert isinstance(refused, messages.Refused), "nobody joins what is about to be taken back"
    again.send(messages.encode(messages.LetGo("nobody")))
    again.send(messages.encode(messages.LetGo(before)))
    eventually(lambda: prefill.pool.get_num_free_blocks() == 8)


def test_a_decode_engine_that_has_not_joined_lets_go_of_what_it_had(
    prefill: Prefill, worker: subprocess.Popen[bytes]
) -> None:
    """It may have been parted with a second time meanwhile. What it had first would be out for ever."""
    mapping(prefill, "a", worker.pid).send(messages.encode(messages.Leave()))
    eventually(lambda: prefill.revoked == ["a"])
    stranger = sockets.connect(prefill.control.address)
    stranger.send(messages.encode(messages.LetGo(prefill.members["a"])))
    eventually(lambda: prefill.pool.get_num_free_blocks() == 10)


def test_one_that_has_nothing_when_it_leaves_is_forgotten(prefill: Prefill, worker: subprocess.Popen[bytes]) -> None:
    mappers = prefill.lending.mappers
    for number in range(3):
        line = mapping(prefill, f"{number}", worker.pid)
        assert mappers.pids()
        line.send(messages.encode(messages.Release([], list(range(10)))))
        line.send(messages.encode(messages.Leave()))
        eventually(lambda: mappers.pids() == [])
    assert prefill.revoked == [], "nothing is taken back from it"


def add(mappers: Mappers, member: str, pid: int) -> None:
    pidfd = os.pidfd_open(pid)
    try:
        mappers.add(member, pidfd)
    finally:
        os.close(pidfd)


def test_who_maps_nothing_is_waited_for_by_nobody() -> None:
    mappers = Mappers()
    mappers.wait("nobody")
    mappers.let_go("nobody")
    assert not mappers.may_write("nobody")


def test_it_names_the_living_processes_that_map(worker: subprocess.Popen[bytes]) -> None:
    mappers = Mappers()
    with subprocess.Popen(["sleep", "100"]) as other:
        add(mappers, "a", worker.pid)
        add(mappers, "b", other.pid)
        assert sorted(mappers.pids()) == sorted([worker.pid, other.pid])
        other.kill()
    assert mappers.pids() == [worker.pid]
    mappers.let_go("a")
    mappers.let_go("b")
    mappers.wait("a")
    mappers.wait("b")
    assert mappers.pids() == []


def test_letting_go_leaves_no_descriptor_behind(worker: subprocess.Popen[bytes]) -> None:
    mappers = Mappers()
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        add(mappers, "a", worker.pid)
        add(mappers, "a", worker.pid)
        waiting = threading.Thread(target=mappers.wait, args=("a",), daemon=True)
        waiting.start()
        assert mappers.may_write("a")
        mappers.let_go("a")
        waiting.join(5)
        assert not waiting.is_alive()
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_worker_that_has_ended_cannot_be_added() -> None:
    mappers = Mappers()
    with subprocess.Popen(["sleep", "100"]) as process:
        pidfd = os.pidfd_open(process.pid)
        process.kill()
    with pytest.raises(AdrenalineError, match="has ended"):
        mappers.add("a", pidfd)
    mappers.wait("a")
    os.close(pidfd)


def test_a_decode_engine_that_asks_again_and_again_is_refused_in_the_end(worker: subprocess.Popen[bytes]) -> None:
    mappers = Mappers()
    for _ in range(MAX_WORKERS):
        add(mappers, "a", worker.pid)
    with pytest.raises(AdrenalineError, match="workers already"):
        add(mappers, "a", worker.pid)
    add(mappers, "b", worker.pid)
    mappers.forget("a")
    mappers.forget("b")
