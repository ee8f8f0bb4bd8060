"""Control messages and sockets: bounded, validated, and refusals that name both sides."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import zmq
from hypothesis import given
from hypothesis import strategies as st

from vllm_adrenaline.control import addresses, messages, sockets
from vllm_adrenaline.control.server import FAILED, ControlServer
from vllm_adrenaline.errors import AdrenalineError
from vllm_adrenaline.prefill.leases import LeaseManager, Offer
from vllm_adrenaline.prefill.lending import Lending
from vllm_adrenaline.system import descriptors
from vllm_adrenaline.system.device_handle import Handle

HANDLE = Handle(b"h" * 64, 0, 1)
IDENTITY = messages.Identity(
    protocol=messages.PROTOCOL,
    vllm="0.32.0",
    model="m",
    architecture="LlamaForCausalLM",
    dtype="float32",
    kv_cache_dtype="auto",
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_size=32,
    block_size=128,
    kv_layout="LBHNC",
    isa="vec/AVX512",
    split_kv=True,
    tensor_parallel_size=1,
)
WELCOME = messages.Welcome("engine", "localhost", 5600, 100, ["ipc:///x"], "1 thread", 60.0)
LOAD = messages.Load(total=100, free=60, reserve=5, busy=0.25)
LEAVE_AND = b"\x82\xa4type\xa5Leave\xa1x"
NESTED = LEAVE_AND + b"\x91" * 5000 + b"\xc0"
"""A message with one field more than we know, which is 5000 lists deep: msgspec gives up on it in its own way."""


class Pool:
    """Ten blocks, by their number of references."""

    def __init__(self) -> None:
        self.references = Counter[int]()

    def get_num_free_blocks(self) -> int:
        return 10 - len(+self.references)

    def get_new_blocks(self, num_blocks: int) -> list[Any]:
        blocks = [SimpleNamespace(block_id=i) for i in range(10) if not self.references[i]][:num_blocks]
        self.touch(blocks)
        return blocks

    def touch(self, blocks: Sequence[Any]) -> None:
        self.references.update(block.block_id for block in blocks)

    def free_blocks(self, ordered_blocks: Iterable[Any]) -> None:
        self.references.subtract(block.block_id for block in ordered_blocks)


@pytest.mark.parametrize(
    "message",
    [
        messages.Hello(IDENTITY, borrows=True),
        WELCOME,
        messages.Claimed("r", [1, 2], 200, b"digest"),
        messages.Release(["r"], [3]),
        messages.KillExecutors([17]),
        messages.Attach(IDENTITY, "d", 0, messages.MemoryFile(b"t" * 16, [0]), 3, 4, 5, 6),
        messages.Attach(IDENTITY, "d", 0, messages.Group(messages.Contact("h", 1, {"0/0": b"x"})), 3, 4, 5, 6),
        messages.Attach(IDENTITY, "d", 0, messages.GpuMemory(messages.MemoryFile(b"t" * 16, [0]), HANDLE), 3, 4, 5, 6),
        messages.Attached(["a"], 1, [0], messages.Contact("h", 1, {"0/1": b"x"})),
        messages.Attached(["a"], 1, [0], inbox=HANDLE),
        messages.Drop(["r"]),
        messages.Leave(),
        messages.Revoke("d"),
        messages.Revoked("d"),
    ],
)
def test_a_message_survives_the_wire(message: messages.Message) -> None:
    assert messages.decode(messages.encode(message)) == message


nested = st.recursive(
    st.binary(max_size=64) | st.integers(-(2**63), 2**64 - 1) | st.text(max_size=8), st.lists, max_leaves=500
)


deep = st.integers(1, 20_000).map(b"\x91".__mul__)


@given(st.binary(max_size=4096) | nested.map(msgspec.msgpack.encode) | deep | deep.map(LEAVE_AND.__add__))
def test_bytes_that_are_no_message_raise_one_error(frame: bytes) -> None:
    with contextlib.suppress(msgspec.DecodeError):
        messages.decode(frame)


@pytest.mark.parametrize(
    ("frame", "error"),
    [
        (NESTED, RecursionError),
        (b"\x81\xa1x" * 2000, RecursionError),
        (b"\x81\xa4type\xa4\xff\xff\xff\xff", UnicodeDecodeError),
        (b"\x91" * 5000, msgspec.DecodeError),
    ],
)
def test_deep_nesting_and_broken_text_are_no_messages(frame: bytes, error: type[Exception]) -> None:
    with pytest.raises(error):  # msgspec's own word for it
        msgspec.msgpack.Decoder(messages.AnyMessage).decode(frame)
    with pytest.raises(msgspec.DecodeError):
        messages.decode(frame)


def test_numbers_outside_their_bounds_are_refused() -> None:
    frame = msgspec.msgpack.encode({"type": "Lease", "want": 1 << 40})
    with pytest.raises(msgspec.ValidationError):
        messages.decode(frame)
    with pytest.raises(msgspec.ValidationError):
        messages.decode(msgspec.msgpack.encode({"type": "Leased", "blocks": [1 << 24]}))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("model", "other"),
        ("dtype", "bfloat16"),
        ("block_size", 64),
        ("isa", "amx/AVX512"),
        ("kv_layout", "LHBNC"),
        ("vllm", "0.33.0"),
        ("tensor_parallel_size", 2),
        ("protocol", 99),
    ],
)
def test_a_mismatch_names_the_field_and_both_values(field: str, value: object) -> None:
    other = msgspec.structs.replace(IDENTITY, **{field: value})
    reason = messages.mismatch(IDENTITY, other, "prefill engine", "decode engine")
    assert reason is not None
    assert field.replace("_", " ") in reason
    assert str(getattr(IDENTITY, field)) in reason
    assert str(value) in reason
    assert messages.mismatch(IDENTITY, IDENTITY, "a", "b") is None


@pytest.mark.parametrize("address", ["", "http://x:1", "ipc://relative", "tcp://127.0.0.1", "ipc:///" + "x" * 200])
def test_an_address_that_cannot_work_is_refused(address: str) -> None:
    with pytest.raises(AdrenalineError):
        addresses.check(address)


class Prefill:
    """A control server over ten blocks. `revoked`: whose channels were closed; that waits while `executors_hang`."""

    def __init__(self, address: str) -> None:
        self.pool, self.now, self.revoked, self.killed = Pool(), 0.0, [], []
        self.executors_hang, self.ended = threading.Event(), []
        self.members: dict[str, str] = {}
        self.leases = LeaseManager(self.pool, 0, 60, lambda: self.now)
        self.leases.offer("prompt", Offer([], 7, b"d"))
        self.tick: Callable[[], None] = bool
        self.lending = Lending(
            self.leases,
            threading.RLock(),
            lambda member: msgspec.structs.replace(WELCOME, member=member),
            lambda: LOAD,
            lambda: self.tick() or None,
            self.killed.extend,
            self.revoke,
        )
        self.passing = descriptors.Server(addresses.for_descriptors(address))
        self.passing.start()
        self.control = ControlServer(address, IDENTITY, self.lending, self.passing, self.ended.append)
        self.control.start()

    def revoke(self, engine: str) -> None:
        while self.executors_hang.is_set():
            time.sleep(0.005)
        self.revoked.append(engine)

    def deposit(self, pid: int) -> bytes:
        """Return the token under which a process passes us its pidfd."""
        pidfd = os.pidfd_open(pid)
        token, theirs = descriptors.exchange(self.passing.address, [pidfd])
        descriptors.close([pidfd, *theirs])
        return token

    def connect(self, engine: str, pid: int = 0) -> zmq.Socket[bytes]:
        """Return the line of a decode engine that has said hello and has leased two blocks.

        It is the process `pid`, and then it says so as decode engines do: in a second hello.
        """
        socket = sockets.connect(self.control.address)
        welcome = sockets.ask(socket, messages.Hello(IDENTITY, True, engine), 5)
        if pid:
            again = sockets.ask(socket, messages.Hello(IDENTITY, True, engine, self.deposit(pid)), 5)
            assert again == welcome
        assert isinstance(welcome, messages.Welcome)
        self.members[engine] = welcome.member
        leased = sockets.ask(socket, messages.Lease(2), 5)
        assert isinstance(leased, messages.Leased)
        assert len(leased.blocks) == 2
        return socket


def eventually(condition: Callable[[], object], seconds: float = 5.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come to that"
        time.sleep(0.005)


@pytest.fixture
def prefill(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Prefill]:
    monkeypatch.setattr("vllm_adrenaline.control.server.POLL_MS", 100)  # how long stopping it takes
    made = Prefill(f"ipc://{tmp_path}/c")
    yield made
    made.executors_hang.clear()
    made.control.stop()


@pytest.fixture
def server(prefill: Prefill) -> ControlServer:
    return prefill.control


def test_an_address_in_use_is_refused_and_not_taken_over(server: ControlServer) -> None:
    with pytest.raises(AdrenalineError, match="in use"):
        sockets.bind(server.address)


def test_the_server_survives_nonsense_and_counts_it(server: ControlServer) -> None:
    socket = sockets.connect(server.address)
    nonsense = [
        [b"\xff\x00nonsense"],
        [b"a", b"b", b"c"],
        [msgspec.msgpack.encode({"type": "Nothing"})],
        [NESTED],
        [b""],
    ]
    for frames in nonsense:
        socket.send_multipart(frames)
    assert sockets.ask(socket, messages.Hello(IDENTITY, False, "a"), 5) == WELCOME
    assert server.bad_frames == len(nonsense)
    socket.close()


def test_an_answer_that_is_no_message_is_none(tmp_path: Path) -> None:
    socket, address = sockets.bind(f"ipc://{tmp_path}/x")
    asking = sockets.connect(address)
    asking.send(b"")
    peer, _ = socket.recv_multipart()
    socket.send_multipart([peer, NESTED])
    assert sockets.ask(asking, messages.Hello(IDENTITY, borrows=False), 5) is None
    asking.close()
    sockets.unbind(socket, address)


def test_a_tick_that_fails_ends_nothing(prefill: Prefill) -> None:
    ticked = []

    def fail() -> None:
        ticked.append(1)
        raise OSError("no such process")

    prefill.tick = fail
    eventually(lambda: len(ticked) > 1)
    prefill.connect("a").close()


def test_an_engine_whose_control_thread_ends_says_so_and_ends(prefill: Prefill) -> None:
    def give_up() -> None:
        raise SystemExit("out of memory, say")

    prefill.tick = give_up
    eventually(lambda: prefill.ended == [FAILED])


def test_a_process_whose_control_thread_ends_fails_and_says_why(tmp_path: Path) -> None:
    code = r"""
import sys, threading
from tests.unit.test_control import IDENTITY, LOAD, WELCOME, Pool
from vllm_adrenaline.control.server import ControlServer
from vllm_adrenaline.prefill.leases import LeaseManager
from vllm_adrenaline.prefill.lending import Lending
from vllm_adrenaline.system import descriptors
leases = LeaseManager(Pool(), 0, 60, lambda: 0.0)
calls = [lambda member: WELCOME, lambda: LOAD, lambda: sys.exit("the reason"), lambda pids: None, lambda engine: None]
passing = descriptors.Server("\0" + sys.argv[1])
ControlServer(sys.argv[1], IDENTITY, Lending(leases, threading.RLock(), *calls), passing).start()
threading.Event().wait(30)
"""
    command = [sys.executable, "-c", code, f"ipc://{tmp_path}/c"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == FAILED
    assert "control thread" in done.stderr
    assert "the reason" in done.stderr


def test_a_control_thread_that_ends_because_it_shall_ends_no_engine(prefill: Prefill) -> None:
    stopping = threading.Event()

    def interrupted() -> None:
        assert stopping.wait(5)
        raise SystemExit("the sockets are closed")

    prefill.tick = interrupted
    time.sleep(0.6)
    prefill.control.stop()
    stopping.set()
    prefill.control.join(5)
    assert prefill.ended == []


# Decode engines that go


def test_what_a_silent_decode_engine_had_is_free_when_no_executor_can_write_for_it(prefill: Prefill) -> None:
    gone, other = prefill.connect("a"), prefill.connect("b")
    prefill.executors_hang.set()
    prefill.now = 50
    assert sockets.ask(other, messages.Heartbeat(), 5) == LOAD
    prefill.now = 70
    for _ in range(10):  # it is answered while executors let go of the other
        began = time.monotonic()
        assert sockets.ask(other, messages.Heartbeat(), 5) == LOAD
        assert time.monotonic() - began < 1
        time.sleep(0.1)
    assert isinstance(sockets.ask(gone, messages.Heartbeat(), 5), messages.Refused)
    assert prefill.pool.get_num_free_blocks() == 6, "an executor may still write"
    prefill.executors_hang.clear()
    eventually(lambda: prefill.pool.get_num_free_blocks() == 8)
    assert prefill.revoked == ["a"]
    assert prefill.killed == [], "executors serve others"


def test_a_decode_engine_whose_process_ends_is_noticed_at_once(prefill: Prefill) -> None:
    with subprocess.Popen(["sleep", "100"]) as process:
        socket = prefill.connect("a", process.pid)
        time.sleep(0.1)
        assert prefill.pool.get_num_free_blocks() == 8
        process.kill()
    eventually(lambda: prefill.pool.get_num_free_blocks() == 10, seconds=2)
    assert prefill.revoked == ["a"]
    socket.close()


def test_a_decode_engine_that_leaves_has_nothing_left(prefill: Prefill) -> None:
    socket = prefill.connect("a")
    socket.send(messages.encode(messages.Leave()))
    eventually(lambda: prefill.pool.get_num_free_blocks() == 10, seconds=2)
    assert prefill.revoked == ["a"]
    socket.close()


def test_a_decode_engine_that_comes_back_has_nothing_of_before(prefill: Prefill) -> None:
    before, other = prefill.connect("a"), prefill.connect("b")
    after = prefill.connect("a")
    eventually(lambda: prefill.pool.get_num_free_blocks() == 6, seconds=2)
    assert prefill.revoked == ["a"]
    assert isinstance(sockets.ask(before, messages.Heartbeat(), 5), messages.Refused)
    for socket in (other, after):
        assert sockets.ask(socket, messages.Heartbeat(), 5) == LOAD


def test_a_decode_engine_that_leaves_and_ends_at_once_ends_no_prefill_engine(prefill: Prefill) -> None:
    with subprocess.Popen(["sleep", "100"]) as process:
        socket, other = prefill.connect("a", process.pid), prefill.connect("b")
        with prefill.lending.lock:  # vLLM schedules; the control thread waits, and then finds both
            other.send(messages.encode(messages.Heartbeat()))
            time.sleep(0.1)
            socket.send(messages.encode(messages.Leave()))
            process.kill()
            process.wait()
            time.sleep(0.1)
    eventually(lambda: prefill.pool.get_num_free_blocks() == 8)
    assert messages.decode(other.recv()) == LOAD
    time.sleep(0.1)
    assert prefill.ended == []
    assert sockets.ask(other, messages.Heartbeat(), 5) == LOAD
    for each in (socket, other):
        each.close()


def test_who_says_hello_again_before_all_is_taken_back_has_a_second_account(prefill: Prefill) -> None:
    socket = prefill.connect("a")
    prefill.executors_hang.set()
    for _ in range(2):
        socket.send(messages.encode(messages.Leave()))
        assert isinstance(sockets.ask(socket, messages.Hello(IDENTITY, True, "a"), 5), messages.Welcome)
        assert sockets.ask(socket, messages.Lease(2), 5) != messages.Leased([])
    assert prefill.pool.get_num_free_blocks() == 4
    prefill.executors_hang.clear()
    eventually(lambda: prefill.pool.get_num_free_blocks() == 8)
    socket.send(messages.encode(messages.Leave()))
    eventually(lambda: prefill.pool.get_num_free_blocks() == 10)
    socket.close()


def test_who_does_not_say_its_name_borrows_nothing(prefill: Prefill) -> None:
    socket = sockets.connect(prefill.control.address)
    answer = sockets.ask(socket, messages.Hello(IDENTITY, borrows=True), 5)
    assert isinstance(answer, messages.Refused), "its channels could not be told from others' when it goes"
    assert sockets.ask(socket, messages.Hello(IDENTITY, borrows=False), 5) == WELCOME
    socket.close()


@pytest.mark.parametrize("lends", [False, True])
def test_books_that_cannot_be_closed_end_nobody_else(prefill: Prefill, lends: bool) -> None:
    def fail(ordered_blocks: Iterable[Any]) -> None:
        raise AssertionError("a reference too few")

    socket, other = prefill.connect("a"), prefill.connect("b")
    if not lends:
        socket.send(messages.encode(messages.Release([], [0, 1])))
        assert sockets.ask(socket, messages.Heartbeat(), 5) == LOAD
    prefill.pool.free_blocks = fail
    prefill.now = 50
    assert sockets.ask(other, messages.Heartbeat(), 5) == LOAD
    prefill.now = 70
    eventually(lambda: b"a" not in prefill.leases.holders and len(prefill.leases.holders) == 1)
    time.sleep(0.1)
    assert prefill.ended == []
    assert sockets.ask(other, messages.Heartbeat(), 5) == LOAD
    for each in (socket, other):
        each.close()


def test_a_failing_step_ends_the_executor_that_may_still_write_and_no_other(prefill: Prefill) -> None:
    socket = prefill.connect("a")
    socket.send(messages.encode(messages.KillExecutors([77])))
    assert sockets.ask(socket, messages.Heartbeat(), 5) == LOAD
    assert prefill.killed == [77]
    stranger = sockets.connect(prefill.control.address)
    assert isinstance(sockets.ask(stranger, messages.KillExecutors([78]), 5), messages.Refused)
    assert prefill.killed == [77], "only who was served can tell"
    stranger.close()


def test_a_prompt_that_is_dropped_is_held_by_nobody_and_a_claimed_one_by_its_claim(prefill: Prefill) -> None:
    socket = prefill.connect("a")
    assert isinstance(sockets.ask(socket, messages.Claim("prompt"), 5), messages.Claimed)
    assert prefill.leases.take_let_go() == {"prompt"}
    prefill.leases.offer("second", Offer([], 7, b"d"))
    socket.send(messages.encode(messages.Drop(["prompt", "second", "third"])))
    assert sockets.ask(socket, messages.Claim("second"), 5) == messages.ClaimRejected("second")
    assert prefill.leases.take_let_go() == {"second"}
    assert prefill.leases.lent == (1, 2)


def test_a_prompt_can_be_claimed_once_and_only_after_hello(server: ControlServer) -> None:
    socket = sockets.connect(server.address)
    assert isinstance(sockets.ask(socket, messages.Claim("prompt"), 5), messages.Refused)
    assert isinstance(sockets.ask(socket, messages.Hello(IDENTITY, True, "a"), 5), messages.Welcome)
    assert sockets.ask(socket, messages.Claim("prompt"), 5) == messages.Claimed("prompt", [], 7, b"d")
    assert sockets.ask(socket, messages.Claim("prompt"), 5) == messages.ClaimRejected("prompt")
    socket.close()


def test_an_engine_that_does_not_fit_is_refused(server: ControlServer) -> None:
    socket = sockets.connect(server.address)
    other = msgspec.structs.replace(IDENTITY, block_size=64)
    answer = sockets.ask(socket, messages.Hello(other, borrows=True), 5)
    assert isinstance(answer, messages.Refused)
    assert "block size is 128 on the prefill engine and 64 on the decode engine" in answer.reason
    socket.close()


def test_a_decode_engine_that_passes_no_process_is_not_taken_for_another_one(prefill: Prefill) -> None:
    other = prefill.connect("a")
    with subprocess.Popen(["sleep", "100"]) as process:
        near = prefill.connect("b", process.pid)
        token = prefill.deposit(process.pid)
        prefill.passing.take(token, 1)
        late = messages.Hello(IDENTITY, True, "a", token)
        assert isinstance(sockets.ask(other, late, 5), messages.Welcome), "its silence will show when it has gone"
        process.kill()
        eventually(lambda: prefill.revoked == ["b"])
        assert isinstance(sockets.ask(other, messages.Heartbeat(), 5), messages.Load), "it is still there"
    other.close()
    near.close()


def test_a_decode_worker_whose_process_was_not_passed_maps_nothing(prefill: Prefill) -> None:
    for token in (b"", b"t" * 16):
        answer = sockets.ask_once(prefill.control.address, messages.Map(IDENTITY, 0, "", token), 5)
        assert isinstance(answer, messages.Refused)
        assert "no descriptors were passed" in answer.reason
