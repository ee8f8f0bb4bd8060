"""Descriptors that processes pass to each other: to whom they are meant for, once, and to nobody who misuses it."""

from __future__ import annotations

import os
import socket
import struct
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.unit.test_control import eventually
from vllm_adrenaline.control import addresses
from vllm_adrenaline.errors import AdrenalineError
from vllm_adrenaline.system import descriptors, machine, unix_socket
from vllm_adrenaline.system.descriptors import MAX_DEPOSITS, MAX_DESCRIPTORS, Server, Unreachable, exchange
from vllm_adrenaline.system.process import PeerProcess, pid_of


@pytest.fixture(params=["a file", "a name"])
def server(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Server]:
    made = Server(f"{tmp_path}/p.fd" if request.param == "a file" else f"\0adrenaline-test/{tmp_path}")
    made.start()
    yield made
    made.stop()


def packet(token: bytes = b"t" * 16, wanted: int = 0, magic: bytes = b"adrpass1") -> bytes:
    return struct.pack("<8s16sI", magic, token, wanted)


def send(server: Server, data: bytes, files: int = 1) -> tuple[bytes, list[int]]:
    """Send a packet with so many descriptors, and return the answer."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as line, open("/dev/null") as null:
        line.settimeout(5)
        line.connect(server.address)
        socket.send_fds(line, [data], [null.fileno()] * files)
        answer, found, _, _ = socket.recv_fds(line, 10, 10)
    return answer, found


def count() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_both_sides_get_open_descriptors_of_the_other(server: Server, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("what it says")
    with path.open() as ours:
        token, theirs = exchange(server.address, [ours.fileno()])
    (file,) = server.take(token, 1)
    assert os.pread(file, 100, 0) == b"what it says"
    assert not os.get_inheritable(file)
    os.close(file)
    process = PeerProcess(theirs)
    assert pid_of(process.pidfd) == os.getpid()
    assert process.works(), "we run, or else we could not ask"
    process.close()


def test_an_offer_is_got_by_its_number_and_stays_open(server: Server) -> None:
    server.offers[3] = [os.memfd_create("third")]
    for _ in range(2):
        _, found = exchange(server.address, [], wanted=3)
        assert os.fstat(found[0]).st_ino == os.fstat(server.offers[3][0]).st_ino
        descriptors.close(found)
    descriptors.close(server.offers.pop(3))


def test_what_is_not_offered_yet_is_asked_for_again_and_nothing_is_kept_for_it(server: Server) -> None:
    before = count()
    with pytest.raises(Unreachable, match="not yet"):
        exchange(server.address, [0], wanted=7)
    eventually(lambda: count() == before)


def test_a_deposit_is_taken_once_by_its_token_and_has_as_many_as_were_expected(server: Server) -> None:
    before = count()
    token, theirs = exchange(server.address, [0, 1])
    descriptors.close(server.take(token, 2))
    for unknown in (token, b"", b"x" * 16):
        with pytest.raises(AdrenalineError, match="no descriptors"):
            server.take(unknown, 2)
    token, more = exchange(server.address, [0, 1])
    with pytest.raises(AdrenalineError, match=r"2 descriptors were passed .* not 1"):
        server.take(token, 1)
    descriptors.close([*theirs, *more])
    eventually(lambda: count() == before)


def test_a_token_that_is_in_use_is_not_taken_over(server: Server) -> None:
    answer, found = send(server, packet())
    descriptors.close(found)
    assert answer == b"\x01"
    assert send(server, packet(), files=2) == (b"\x00", [])
    descriptors.close(server.take(b"t" * 16, 1))


@pytest.mark.parametrize(
    ("data", "files"),
    [
        (packet(magic=b"adrpass0"), 1),
        (packet()[:-1], 1),
        (packet() + b"x", 1),
        (b"x", 1),
        (b"x" * 5000, 0),
        (packet(), MAX_DESCRIPTORS + 1),
        (packet(), 200),
    ],
    ids=["another protocol", "half a packet", "more than one", "a byte", "much", "too many", "far too many"],
)
def test_what_is_no_request_is_refused_and_leaves_nothing_open(server: Server, data: bytes, files: int) -> None:
    before = count()
    assert send(server, data, files) == (b"\x00", [])
    with pytest.raises(AdrenalineError, match="no descriptors"):
        server.take(b"t" * 16, 1)
    eventually(lambda: count() == before)


def test_who_says_nothing_is_left_alone_and_others_are_served_meanwhile(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(descriptors, "CLIENT_S", 0.3)
    monkeypatch.setattr(descriptors, "MAX_CLIENTS", 8)
    before = count()
    silent = [socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) for _ in range(20)]
    for each in silent:
        each.connect(server.address)
    token, theirs = exchange(server.address, [])
    descriptors.close([*server.take(token, 0), *theirs])
    for each in silent:
        each.settimeout(5)
        assert each.recv(1) == b"", "it is told to go"
        each.close()
    eventually(lambda: count() == before)


def test_a_server_that_says_nothing_is_waited_for_a_moment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(descriptors, "CLIENT_S", 0.1)
    with unix_socket.listen(f"{tmp_path}/p.fd", socket.SOCK_SEQPACKET):
        began = time.monotonic()
        with pytest.raises(Unreachable, match="timed out"):
            exchange(f"{tmp_path}/p.fd", [])
    assert time.monotonic() - began < 2
    with pytest.raises(Unreachable, match="nobody passes descriptors"):
        exchange(f"{tmp_path}/p.fd", [])


def test_what_nobody_takes_is_closed_in_the_end(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(descriptors, "KEEP_S", 0.1)
    before = count()
    token, theirs = exchange(server.address, [0])
    descriptors.close(theirs)
    eventually(lambda: count() == before)
    with pytest.raises(AdrenalineError, match="no descriptors"):
        server.take(token, 1)


def test_deposits_without_end_fill_nothing_and_the_last_ones_are_there(server: Server) -> None:
    before, tokens = count(), []
    for _ in range(MAX_DEPOSITS + 10):
        token, theirs = exchange(server.address, [0])
        descriptors.close(theirs)
        tokens.append(token)
    assert count() <= before + MAX_DEPOSITS + 2
    for token in tokens[:10]:
        with pytest.raises(AdrenalineError, match="no descriptors"):
            server.take(token, 1)
    for token in tokens[10:]:
        descriptors.close(server.take(token, 1))
    eventually(lambda: count() == before)


def test_another_user_gets_and_leaves_nothing(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel says who connects. Here both are this user, so each takes itself for another in turn."""
    with monkeypatch.context() as patch:
        patch.setattr(os, "geteuid", lambda: 12345)
        with pytest.raises(AdrenalineError, match="runs as user"):
            exchange(server.address, [0])
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as line:
            line.settimeout(5)
            line.connect(server.address)
            assert line.recv(1) == b""
    _, theirs = exchange(server.address, [])
    descriptors.close(theirs)


def test_an_address_in_use_is_not_taken_over_and_one_that_was_left_is(server: Server, tmp_path: Path) -> None:
    with pytest.raises(AdrenalineError, match="in use"):
        Server(server.address)
    left = f"{tmp_path}/left.fd"
    unix_socket.listen(left, socket.SOCK_SEQPACKET).close()
    assert os.path.exists(left)
    again = Server(left)
    again.start()
    assert os.stat(left).st_mode & 0o777 == 0o600
    again.stop()
    assert not os.path.exists(left)


def test_a_server_that_stops_leaves_nothing_open(tmp_path: Path) -> None:
    before = count()
    server = Server(f"{tmp_path}/p.fd")
    server.start()
    _, theirs = exchange(server.address, [0, 1])
    descriptors.close(theirs)
    server.stop()
    assert count() == before


def test_where_descriptors_are_passed_follows_from_the_control_address() -> None:
    assert addresses.for_descriptors("ipc:///run/me/p") == "/run/me/p.fd"
    name = "\0vllm-adrenaline/127.0.0.1:7000"
    for address in ("tcp://127.0.0.1:7000", "tcp://localhost:7000", f"tcp://{'ab' * 32}@127.0.0.1:7000"):
        assert addresses.for_descriptors(address) == name
    assert addresses.vicinity("ipc:///run/me/p") == machine.boot()
    assert addresses.vicinity("tcp://127.0.0.1:7000") == machine.network() != machine.boot()
