"""Engines in different PID namespaces share memory and see each other's end; on different hosts they do not try to."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import pytest

from tests.unit.test_control import IDENTITY, WELCOME, Prefill, eventually
from tests.unit.test_mapped_memory import Cache
from vllm_adrenaline.control import addresses, messages
from vllm_adrenaline.control.client import PrefillClient
from vllm_adrenaline.engine.setup import is_far, out_of_sight
from vllm_adrenaline.system import descriptors, machine
from vllm_adrenaline.system.ports import reserve_ports

APART = ["unshare", "--pid", "--fork", "--mount-proc", "--kill-child"]
DECODE = f"""
import os, sys, time
import msgspec
from vllm_adrenaline.control import addresses, messages, sockets
from vllm_adrenaline.control.client import PrefillClient
from vllm_adrenaline.engine.setup import is_far
from vllm_adrenaline.system import descriptors
from vllm_adrenaline.system.process import pid_of
assert os.getpid() == 1, "it is in a PID namespace of its own"
identity = msgspec.json.decode({msgspec.json.encode(IDENTITY)!r}, type=messages.Identity)
client = PrefillClient(sys.argv[1], identity, "d")
client.start()
while client.welcome is None or client._process is None:
    time.sleep(0.01)
assert not is_far(client.address, client.welcome)
assert pid_of(client._process.pidfd) == 0, "no number here is that of the prefill engine"
ours = os.pidfd_open(os.getpid())
token, theirs = descriptors.exchange(addresses.for_descriptors(client.address), [ours], messages.offer_of(0))
answer = sockets.ask_once(client.address, messages.Map(identity, 0, client.welcome.member, token), 10)
print(os.pread(theirs[1], 5, 0).decode(), isinstance(answer, messages.Mappable), flush=True)
process, life = client._process, client._life
for _ in sys.stdin:
    print("it has ended" if client._life > life else (process.works(), process.is_stopped()), flush=True)
"""


def can_be_apart() -> bool:
    try:
        return subprocess.run([*APART, "true"], capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        return False


needs_namespaces = pytest.mark.skipif(
    not can_be_apart(), reason="no PID namespace can be made here: it takes CAP_SYS_ADMIN and unshare"
)


@pytest.fixture
def prefill(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Prefill]:
    monkeypatch.setattr("vllm_adrenaline.control.server.POLL_MS", 100)
    welcome = msgspec.structs.replace(WELCOME, vicinity=addresses.vicinity("ipc:///"))
    monkeypatch.setattr("tests.unit.test_control.WELCOME", welcome)
    made, cache = Prefill(f"ipc://{tmp_path}/c"), Cache(4)
    os.pwrite(cache.fd, b"hello", 0)
    made.lending.exports = [cache.export]
    made.passing.offers[messages.offer_of(0)] = [os.pidfd_open(os.getpid()), cache.fd]
    yield made
    made.control.stop()


@contextmanager
def container(prefill: Prefill) -> Iterator[subprocess.Popen[str]]:
    """A decode engine in a PID namespace of its own."""
    command = [*APART, sys.executable, "-c", DECODE, prefill.control.address]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


@needs_namespaces
def test_a_decode_engine_in_another_pid_namespace_reads_our_memory_and_sees_what_we_do(prefill: Prefill) -> None:
    with subprocess.Popen(["sleep", "100"]) as engine, playing(prefill, engine), container(prefill) as decode:

        def seen() -> str:
            assert decode.stdin is not None
            assert decode.stdout is not None
            print(file=decode.stdin, flush=True)
            return decode.stdout.readline().strip()

        assert decode.stdout is not None
        assert decode.stdout.readline() == "hello True\n"
        assert seen() == "(False, False)", "it sleeps"
        engine.send_signal(signal.SIGSTOP)
        eventually(lambda: seen() == "(False, True)")
        engine.kill()
        eventually(lambda: seen() == "it has ended")


@needs_namespaces
def test_the_end_of_a_decode_engine_in_another_pid_namespace_is_seen_at_once(prefill: Prefill) -> None:
    with container(prefill) as decode:
        assert decode.stdout is not None
        assert decode.stdout.readline() == "hello True\n"
        (member,) = (holder.member for holder in prefill.leases.holders.values())
        (number,) = prefill.lending.mappers.pids()
        assert Path(f"/proc/{number}/cmdline").read_bytes().startswith(sys.executable.encode())
        decode.kill()
        eventually(lambda: not prefill.lending.mappers.may_write(member))
        eventually(lambda: not prefill.leases.holders)
        assert prefill.now == 0, "no lease has ended"


ENDS_WITH_STARTER = """
import os, subprocess, sys
child = "import sys, time; from vllm_adrenaline.system.child import end_with_parent; end_with_parent(int(sys.argv[1]))"
print(os.getpid(), subprocess.run([sys.executable, "-c", child, str(os.getpid())]).returncode)
"""


@needs_namespaces
def test_a_child_of_a_container_s_first_process_does_not_take_it_for_an_orphan_s_new_parent() -> None:
    ended = subprocess.run([*APART, sys.executable, "-c", ENDS_WITH_STARTER], capture_output=True, text=True)
    assert ended.stdout == "1 0\n", ended.stderr


@contextmanager
def playing(prefill: Prefill, engine: subprocess.Popen[bytes]) -> Iterator[None]:
    """Have a prefill engine pass another process for its own."""
    ours = prefill.passing.offers[descriptors.PROCESS]
    folder = os.open(f"/proc/{engine.pid}", os.O_RDONLY | os.O_DIRECTORY)
    prefill.passing.offers[descriptors.PROCESS] = theirs = [os.pidfd_open(engine.pid), folder]
    try:
        yield
    finally:
        prefill.passing.offers[descriptors.PROCESS] = ours
        descriptors.close(theirs)
        engine.kill()


def test_over_tcp_on_loopback_processes_are_passed_too(monkeypatch: pytest.MonkeyPatch) -> None:
    (port,) = reserve_ports(1)
    welcome = msgspec.structs.replace(WELCOME, vicinity=machine.network(), executors=[])
    monkeypatch.setattr("tests.unit.test_control.WELCOME", welcome)
    other = Prefill(f"tcp://127.0.0.1:{port}")
    client = PrefillClient(f"tcp://localhost:{port}", IDENTITY, "d")
    client.start()
    eventually(lambda: client._process is not None)
    eventually(lambda: other.control._processes)
    client.stop()
    other.control.stop()


def test_what_is_said_of_the_other_tells_hosts_from_network_namespaces() -> None:
    assert addresses.where_is(f"{machine.boot()}/4026500000") == "in another network namespace of this host"
    assert addresses.where_is("00000000-0000-0000-0000-000000000000/4026531836") == "on another host"


def test_over_tcp_one_in_another_network_namespace_is_far_and_is_told_what_to_do() -> None:
    there = msgspec.structs.replace(WELCOME, vicinity=f"{machine.boot()}/4026500000")
    address = "tcp://10.0.0.1:7000"
    assert is_far(address, there)
    said = str(out_of_sight(address, there))
    assert "--adrenaline-interface" in said
    assert "an ipc:// address in a folder that both see" in said
    assert not is_far(address, msgspec.structs.replace(WELCOME, vicinity=machine.network()))
