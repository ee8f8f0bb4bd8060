"""Ports of engines: bound from the beginning, and what listens there survives whatever it is asked."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from collections.abc import Iterator

import msgspec
import pytest
import zmq

from vllm_adrenaline.compat import side_channel
from vllm_adrenaline.compat.side_channel import PORT, SideChannel
from vllm_adrenaline.errors import AdrenalineError
from vllm_adrenaline.system.ports import reserve_ports


@pytest.fixture(autouse=True)
def no_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(PORT, raising=False)
    monkeypatch.setattr(side_channel, "POLL_MS", 20)  # how long stopping one takes


@pytest.fixture
def channel() -> Iterator[SideChannel]:
    made = SideChannel("localhost")
    yield made
    made.stop()


def ask(channel: SideChannel, *frames: bytes) -> list[bytes] | None:
    """Ask as vLLM's worker does; return the answer, None for a question that is counted as bad instead."""
    before, deadline = channel.bad_frames, time.monotonic() + 10
    with zmq.Context.instance().socket(zmq.REQ if len(frames) == 1 else zmq.DEALER) as socket:
        socket.setsockopt(zmq.LINGER, 0)
        socket.connect(f"tcp://127.0.0.1:{channel.port}")
        socket.send_multipart(frames)
        while time.monotonic() < deadline:
            if socket.poll(20):
                return socket.recv_multipart()
            if channel.bad_frames > before:
                return socket.recv_multipart() if socket.poll(50) else None
    raise AssertionError("neither answered nor counted")


def test_every_engine_has_a_side_channel_of_its_own_from_the_beginning(channel: SideChannel) -> None:
    others = [SideChannel("localhost") for _ in range(20)]
    assert len({channel.port, *(each.port for each in others)}) == 21
    for each in others:
        each.serve({})
    with socket.socket() as thief, pytest.raises(OSError, match="in use"):
        thief.bind(("127.0.0.1", channel.port))
    for each in others:
        each.stop()


def test_vllms_question_is_answered_with_the_ranks_metadata_and_our_clock(channel: SideChannel) -> None:
    channel.serve({(0, 0): b"first", (0, 1): b"second"})
    answer = ask(channel, msgspec.msgpack.encode((b"get_meta_msg", 0, 1)))
    assert answer is not None
    assert answer[0] == b"second"
    assert msgspec.msgpack.decode(answer[1], type=float) > 0


def test_metadata_that_is_told_again_takes_the_place_of_what_was_told_before(channel: SideChannel) -> None:
    channel.serve({(0, 0): b"first"})
    channel.serve({(0, 0): b"second"})
    answer = ask(channel, msgspec.msgpack.encode((b"get_meta_msg", 0, 0)))
    assert answer is not None
    assert answer[0] == b"second"


def test_what_cannot_be_answered_is_counted_and_ends_nothing(channel: SideChannel) -> None:
    channel.serve({(0, 0): b"first"})
    nested = b"\x94\xc4\x01x\x00\x00" + b"\x91" * 5000 + b"\xc0"  # one field more than there are, deep
    wrong = [b"", b"\xff", nested, msgspec.msgpack.encode((b"x", 0, 7)), msgspec.msgpack.encode({"a": 1})]
    for frame in wrong:
        assert ask(channel, frame) is None
    assert ask(channel, b"one", b"two", b"three", b"four") is None
    assert ask(channel, msgspec.msgpack.encode((b"get_meta_msg", 0, 0))) is not None
    assert channel.bad_frames == len(wrong) + 1


def test_a_port_that_an_operator_chose_is_taken_or_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    (port,) = reserve_ports(1)
    monkeypatch.setenv(PORT, str(port))
    chosen = SideChannel("localhost")
    assert chosen.port == port
    with pytest.raises(AdrenalineError, match=f"port {port}: Address already in use.*{PORT}"):
        SideChannel("localhost")
    chosen.serve({})
    chosen.stop()


def test_a_held_port_is_nobody_elses_until_an_engine_of_ours_listens_there() -> None:
    ports = reserve_ports(50)
    code = "import socket, sys; s = socket.socket(); s.bind(('127.0.0.1', int(sys.argv[1]))); s.listen()"
    stolen = subprocess.run([sys.executable, "-c", code, str(ports[0])], capture_output=True, text=True)
    assert "Address already in use" in stolen.stderr
    with socket.create_server(("127.0.0.1", 0)) as server:
        taken = set()
        for _ in range(200):  # ports of connections come from the same range
            with socket.create_connection(server.getsockname()) as connection:
                taken.add(connection.getsockname()[1])
                server.accept()[0].close()
    assert not taken & set(ports)
    with socket.create_server(("127.0.0.1", ports[0])) as engine:
        socket.create_connection(engine.getsockname()).close()
