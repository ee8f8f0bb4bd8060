"""Control messages and sockets: bounded, validated, and refusals that name both sides."""

from __future__ import annotations

import contextlib
import threading
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_adrenaline.control import messages, sockets
from vllm_adrenaline.errors import AdrenalineError
from vllm_adrenaline.prefill.control import ControlServer
from vllm_adrenaline.prefill.lender import Lender, Offer

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


class Pool:
    def get_num_free_blocks(self) -> int:
        return 0

    def get_new_blocks(self, num_blocks: int) -> list[object]:
        raise AssertionError("nothing is free")

    def touch(self, blocks: object) -> None: ...

    def free_blocks(self, ordered_blocks: object) -> None: ...


@pytest.mark.parametrize(
    "message",
    [
        messages.Hello(IDENTITY, borrows=True),
        WELCOME,
        messages.Claimed("r", [1, 2], 200, b"digest"),
        messages.Release(["r"], [3]),
        messages.Fault([17]),
        messages.Attach(IDENTITY, "d", 0, 1, 2, 3, [0], 4, 5, 6),
    ],
)
def test_a_message_survives_the_wire(message: messages.Message) -> None:
    assert messages.decode(messages.encode(message)) == message


@given(st.binary(max_size=200))
def test_bytes_that_are_no_message_raise_what_the_loops_expect(frame: bytes) -> None:
    with contextlib.suppress(msgspec.ValidationError, msgspec.DecodeError):
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
        sockets.check_address(address)


def test_an_address_of_another_machine_is_refused_for_there_is_no_key_exchange() -> None:
    with pytest.raises(AdrenalineError, match="loopback"):
        sockets.check_address("tcp://10.0.0.1:5000")


@pytest.fixture
def server(tmp_path: Path) -> ControlServer:
    lender = Lender(Pool(), 0, 60, lambda: 0.0)
    lender.offer("prompt", Offer([], 7, b"d"))
    control = ControlServer(
        f"ipc://{tmp_path}/c",
        IDENTITY,
        lender,
        threading.RLock(),
        lambda: WELCOME,
        lambda: LOAD,
        lambda: None,
        lambda pids: None,
    )
    control.start()
    yield control
    control.stop()


def test_an_address_in_use_is_refused_and_not_taken_over(server: ControlServer) -> None:
    with pytest.raises(AdrenalineError, match="in use"):
        sockets.bind(server.address)


def test_the_server_survives_nonsense_and_counts_it(server: ControlServer) -> None:
    socket = sockets.connect(server.address)
    for frames in ([b"\xff\x00nonsense"], [b"a", b"b", b"c"], [msgspec.msgpack.encode({"type": "Nothing"})]):
        socket.send_multipart(frames)
    assert sockets.ask(socket, messages.Hello(IDENTITY, borrows=True), 5) == WELCOME
    assert server.bad_frames == 3
    socket.close()


def test_a_prompt_can_be_claimed_once_and_only_after_hello(server: ControlServer) -> None:
    socket = sockets.connect(server.address)
    assert isinstance(sockets.ask(socket, messages.Claim("prompt"), 5), messages.Refused)
    assert sockets.ask(socket, messages.Hello(IDENTITY, borrows=True), 5) == WELCOME
    assert sockets.ask(socket, messages.Claim("prompt"), 5) == messages.Claimed("prompt", [], 7, b"d")
    assert sockets.ask(socket, messages.Claim("prompt"), 5) == messages.Gone("prompt")
    socket.close()


def test_an_engine_that_does_not_fit_is_refused(server: ControlServer) -> None:
    socket = sockets.connect(server.address)
    other = msgspec.structs.replace(IDENTITY, block_size=64)
    answer = sockets.ask(socket, messages.Hello(other, borrows=True), 5)
    assert isinstance(answer, messages.Refused)
    assert "block size is 128 on the prefill engine and 64 on the decode engine" in answer.reason
    socket.close()


def test_nothing_pickles() -> None:
    for path in Path("vllm_adrenaline").rglob("*.py"):
        text = path.read_text()
        for word in ("import pickle", "recv_pyobj", "send_pyobj", "torch.load", "tcp://*"):
            assert word not in text, f"{path} contains {word}"
