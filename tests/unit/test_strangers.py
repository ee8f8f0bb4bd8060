"""Control sockets and strangers: who may listen and connect, what a peer may name, and what attacks come to."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
import zmq

from tests.unit.test_control import IDENTITY, WELCOME, Prefill
from tests.unit.test_keys import Echo, Relay, ask, make
from vllm_adrenaline.control import messages, sockets
from vllm_adrenaline.control.keys import Keys
from vllm_adrenaline.errors import AdrenalineError
from vllm_adrenaline.system.folders import private_folder
from vllm_adrenaline.system.ports import reserve_ports

KEY, OTHER_KEY = "ab" * 32, "cd" * 32
MIB = 1 << 20


@pytest.fixture
def umask(request: pytest.FixtureRequest) -> Iterator[None]:
    before = os.umask(request.param)
    yield
    os.umask(before)


# Folders and sockets of this user alone


@pytest.mark.parametrize("umask", [0, 0o077], indirect=True)
@pytest.mark.usefixtures("umask")
def test_a_socket_and_the_folders_made_for_it_are_this_users_alone_under_any_umask(tmp_path: Path) -> None:
    bound, address = sockets.bind(f"ipc://{tmp_path}/new/folder/p")
    modes = [stat.S_IMODE(os.stat(tmp_path / name).st_mode) for name in ("new", "new/folder", "new/folder/p")]
    sockets.unbind(bound, address)
    assert modes == [0o700, 0o700, 0o600]
    assert not (tmp_path / "new/folder/p").exists()


@pytest.mark.parametrize("mode", [0o777, 0o770, 0o702, 0o1777])
def test_a_folder_that_others_can_write_is_refused_on_both_sides(tmp_path: Path, mode: int) -> None:
    folder = tmp_path / "open"
    folder.mkdir()
    folder.chmod(mode)
    for use in (sockets.bind, sockets.connect):
        with pytest.raises(AdrenalineError, match=f"can be written by others .its mode is {mode:o}.*chmod 700"):
            use(f"ipc://{folder}/p")
    folder.chmod(0o755)
    private_folder(folder)


def test_a_link_in_place_of_the_folder_is_refused_on_both_sides(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir(mode=0o700)
    (tmp_path / "link").symlink_to(tmp_path / "real")
    for use in (sockets.bind, sockets.connect):
        with pytest.raises(AdrenalineError, match="is a link"):
            use(f"ipc://{tmp_path}/link/p")


def test_the_folder_of_another_user_is_refused_on_both_sides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.geteuid", lambda: os.getuid() + 1)
    for use in (sockets.bind, sockets.connect):
        with pytest.raises(AdrenalineError, match="belongs to the user"):
            use(f"ipc://{tmp_path}/p")


def test_who_connects_first_makes_the_folder_so_that_nobody_else_does(tmp_path: Path) -> None:
    line = sockets.connect(f"ipc://{tmp_path}/later/p")
    assert stat.S_IMODE(os.stat(tmp_path / "later").st_mode) == 0o700
    line.close()


def test_a_file_that_is_no_socket_is_not_replaced_and_a_socket_that_is_left_over_is(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("precious")
    with pytest.raises(AdrenalineError, match="no socket"):
        sockets.bind(f"ipc://{tmp_path}/file")
    assert (tmp_path / "file").read_text() == "precious"
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(tmp_path / "left"))
    with Echo(f"ipc://{tmp_path}/left", None) as echo:
        assert ask(echo.address, patience_s=10) == messages.Load(total=7)


# What a peer names


@pytest.mark.parametrize(
    ("by", "executor", "complaint"),
    [
        ("ipc:///r/p", "tcp://10.0.0.9:5", "not loopback"),
        ("ipc:///r/p", "ipc://relative", "neither ipc"),
        ("ipc:///r/p", f"tcp://{KEY}@127.0.0.1:5", "has not its key"),
        ("tcp://127.0.0.1:1", "tcp://10.0.0.9:5", "not loopback"),
        ("tcp://127.0.0.1:1", "tcp://0.0.0.0:5", "every interface"),
        ("tcp://127.0.0.1:1", "http://127.0.0.1:5", "neither ipc"),
        (f"tcp://{KEY}@10.0.0.1:1", f"tcp://{OTHER_KEY}@10.0.0.1:5", "has not its key"),
        (f"tcp://{KEY}@10.0.0.1:1", "tcp://10.0.0.1:5", "has not its key"),
        (f"tcp://{KEY}@10.0.0.1:1", "ipc:///tmp/x", "has not its key"),
    ],
)
def test_executors_are_not_looked_for_where_an_operator_could_not_say(by: str, executor: str, complaint: str) -> None:
    welcome = msgspec.structs.replace(WELCOME, executors=["", executor])
    with pytest.raises(AdrenalineError, match=complaint):
        sockets.check_welcome(welcome, by, beyond_loopback=True)


@pytest.mark.parametrize(
    ("by", "executor"),
    [
        ("ipc:///r/p", "ipc:///r/p.executor0"),
        ("tcp://127.0.0.1:1", "tcp://127.0.0.1:5"),
        ("tcp://10.0.0.1:1", "tcp://10.0.0.1:5"),  # the operator said --adrenaline-insecure of the first
        (f"tcp://{KEY}@10.0.0.1:1", f"tcp://{KEY}@10.0.0.1:5"),
    ],
)
def test_executors_are_looked_for_where_prefill_engines_put_them(
    tmp_path: Path, by: str, executor: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sockets, "_active", make(tmp_path, "d"))
    sockets.check_welcome(msgspec.structs.replace(WELCOME, executors=[executor]), by, beyond_loopback=False)


@pytest.mark.parametrize(
    ("host", "port", "beyond_loopback"),
    [
        ("10.0.0.9", 5600, False),
        ("0.0.0.0", 5600, True),
        ("*", 5600, True),
        ("", 5600, True),
        ("127.0.0.1;evil", 5600, True),
        ("evil/..", 5600, True),
        ("a@b", 5600, True),
        ("localhost", 0, True),
        ("localhost", 65536, True),
    ],
)
def test_nixl_does_not_connect_where_an_operator_could_not_say(host: str, port: int, beyond_loopback: bool) -> None:
    welcome = msgspec.structs.replace(WELCOME, nixl_host=host, nixl_port=port)
    with pytest.raises(AdrenalineError, match="ipc:///r/p"):
        sockets.check_welcome(welcome, "ipc:///r/p", beyond_loopback)


@pytest.mark.parametrize("host", ["10.0.0.9", "node-7.example", "localhost"])
def test_nixl_connects_to_hosts_where_the_operator_named_an_interface(host: str) -> None:
    sockets.check_welcome(msgspec.structs.replace(WELCOME, nixl_host=host), "ipc:///r/p", beyond_loopback=True)


# What strangers are told


@pytest.mark.parametrize("is_stranger", [True, False])
def test_what_does_not_fit_is_told_to_the_log_and_to_no_stranger(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, is_stranger: bool
) -> None:
    monkeypatch.setattr("vllm_adrenaline.control.server.POLL_MS", 100)
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    prefill = Prefill(f"tcp://127.0.0.1:{reserve_ports(1)[0]}" if is_stranger else f"ipc://{tmp_path}/p")
    try:
        other = msgspec.structs.replace(IDENTITY, model="another-model")
        answer = sockets.ask_once(prefill.control.address, messages.Hello(other, borrows=True, engine="d"), 10)
    finally:
        prefill.control.stop()
    assert isinstance(answer, messages.Refused)
    both = "model is m on the prefill engine and another-model on the decode engine"
    assert (answer.reason == both) != is_stranger
    assert "model" not in answer.reason or not is_stranger
    assert both in caplog.text


# Attacks on TCP


def read_until_closed(line: socket.socket) -> None:
    """Wait until the other side hangs up. Raises TimeoutError if it does not."""
    line.settimeout(10)
    with contextlib.suppress(ConnectionResetError):
        while line.recv(4096):
            pass


def port_of(address: str) -> int:
    return int(address.rpartition(":")[2])


@pytest.fixture
def decode(tmp_path: Path) -> Keys:
    return make(tmp_path, "decode")


@pytest.fixture
def prefill(tmp_path: Path, decode: Keys) -> Iterator[Echo]:
    with Echo("tcp://127.0.0.1:*", make(tmp_path, "prefill", [decode.public.hex()])) as echo:
        yield echo


def test_what_was_recorded_on_the_way_and_is_sent_again_reaches_nobody(prefill: Echo, decode: Keys) -> None:
    relay = Relay(port_of(prefill.address))
    relay.start()
    key, _, _ = prefill.address.rpartition(":")
    assert ask(f"{key}:{relay.listener.getsockname()[1]}", decode, 10) is not None
    assert prefill.heard == 1
    relay.join(10)
    assert len(relay.near_said) > 500, "a handshake and a message were recorded"
    with socket.create_connection(("127.0.0.1", port_of(prefill.address))) as again:
        again.sendall(relay.near_said)
        read_until_closed(again)
    assert prefill.heard == 1
    assert ask(prefill.address, decode, 10) is not None, "others are served as before"


def test_who_offers_no_encryption_is_hung_up_on(prefill: Echo) -> None:
    greeting = b"\xff" + bytes(8) + b"\x7f" + b"\x03\x01" + b"NULL".ljust(20, b"\0") + b"\0" + bytes(31)
    with socket.create_connection(("127.0.0.1", port_of(prefill.address))) as plain:
        plain.sendall(greeting + b"\x04\x19\x05READY\x0bSocket-Type\0\0\0\x06DEALER" + b"\0\x01x")
        read_until_closed(plain)
    assert prefill.heard == 0


def test_a_decode_engine_that_wants_a_key_says_nothing_to_who_offers_none(decode: Keys) -> None:
    with Echo("tcp://127.0.0.1:*", None) as impostor:
        assert ask(f"tcp://{KEY}@127.0.0.1:{port_of(impostor.address)}", decode) is None
        assert impostor.heard == 0


def test_connections_that_say_nothing_are_closed_and_hold_nobody_up(
    tmp_path: Path, decode: Keys, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sockets, "HANDSHAKE_MS", 1000)
    with Echo("tcp://127.0.0.1:*", make(tmp_path, "p", [decode.public.hex()])) as echo:
        silent = [socket.create_connection(("127.0.0.1", port_of(echo.address))) for _ in range(200)]
        assert ask(echo.address, decode, 10) == messages.Load(total=7)
        for each in silent:
            read_until_closed(each)
            each.close()


SLEEPER = """
import sys, time
from vllm_adrenaline.control import sockets
socket, address = sockets.bind("tcp://127.0.0.1:*")
print(address, flush=True)
sys.stdin.read()
"""
"""A server that reads nothing."""


def resident_mib(pid: int) -> float:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / MIB


def test_a_flood_fills_the_senders_memory_and_not_the_servers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sockets, "MAX_UNSENT", 8)  # the sender's is not what is asked for
    command = [sys.executable, "-c", SLEEPER]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        line = sockets.connect(server.stdout.readline().strip())
        line.setsockopt(zmq.SNDTIMEO, 1000)
        before, sent, frame = resident_mib(server.pid), 0, bytes(MIB)
        try:
            while sent < 1000:
                line.send(frame)
                sent += 1
        except zmq.Again:
            pass
        grown = resident_mib(server.pid) - before
        line.close()
        server.kill()
    print(f"{sent} MiB were sent until the sender had to wait; the server grew by {grown:.0f} MiB")
    assert sent < 200, "who floods has to wait"
    assert 32 < grown < sockets.MAX_UNREAD + 64


def test_a_flood_of_messages_holds_other_clients_up_a_moment_only() -> None:
    with Echo("tcp://127.0.0.1:*", None) as echo:
        flood, honest, took = sockets.connect(echo.address), sockets.connect(echo.address), []
        beat = messages.encode(messages.Heartbeat())
        for _ in range(30):
            try:
                while True:
                    flood.send(beat, zmq.NOBLOCK)
            except zmq.Again:
                pass
            began = time.monotonic()
            assert sockets.ask(honest, messages.Heartbeat(), 10) == messages.Load(total=7)
            took.append(time.monotonic() - began)
        heard = echo.heard
        flood.close()
        honest.close()
    median, longest = 1000 * sorted(took)[15], 1000 * max(took)
    print(f"{heard} messages; an honest one was answered in {median:.1f} ms, at most {longest:.0f}")
    assert heard > 200, "it was a flood"
    assert median < 2000
