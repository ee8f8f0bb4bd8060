"""What the kernel says of other processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager

import pytest

from vllm_adrenaline.errors import AdrenalineError
from vllm_adrenaline.system.process import PeerProcess, has_ended, open_own, pid_of


@contextmanager
def child(program: str) -> Iterator[tuple[PeerProcess, int]]:
    with subprocess.Popen([sys.executable, "-c", program]) as process:
        folder = os.open(f"/proc/{process.pid}", os.O_RDONLY | os.O_DIRECTORY)
        with closing(PeerProcess([os.pidfd_open(process.pid), folder])) as peer:
            try:
                yield peer, process.pid
            finally:
                process.kill()


def soon(check: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + 10
    while not (holds := check()) and time.monotonic() < deadline:
        time.sleep(0.01)
    return holds


def test_who_computes_works_and_who_sleeps_or_was_stopped_does_not() -> None:
    with child("while True: pass") as (peer, pid):
        assert soon(peer.works)
        assert not peer.is_stopped()
        os.kill(pid, signal.SIGSTOP)
        assert soon(peer.is_stopped)
        assert not peer.works()
    with child("import time; time.sleep(60)") as (peer, _):
        assert soon(lambda: not peer.works())
        assert not peer.is_stopped()


def test_one_thread_that_works_is_enough() -> None:
    program = (
        "import threading, time; threading.Thread(target=lambda: [0 for _ in iter(int, 1)]).start(); time.sleep(60)"
    )
    with child(program) as (peer, _):
        assert soon(peer.works)


def test_who_has_ended_neither_works_nor_was_stopped() -> None:
    with child("import time; time.sleep(60)") as (peer, pid):
        assert not peer.has_ended()
        assert pid_of(peer.pidfd) == pid
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        assert peer.has_ended()
        assert not peer.works()
        assert not peer.is_stopped()
        assert pid_of(peer.pidfd) == 0


def test_a_process_that_is_known_no_more_has_no_open_descriptor_and_is_no_other_process() -> None:
    before = os.listdir("/proc/self/fd")
    peer = PeerProcess(open_own())
    assert not peer.has_ended()
    for _ in range(2):
        peer.close()
    assert os.listdir("/proc/self/fd") == before
    assert peer.has_ended()
    assert not peer.works()
    assert not peer.is_stopped()


def test_descriptors_of_something_else_are_no_process() -> None:
    before = os.listdir("/proc/self/fd")
    for count in (1, 2, 3):
        with pytest.raises(AdrenalineError):
            PeerProcess([os.open("/dev/null", os.O_RDONLY) for _ in range(count)])
    assert os.listdir("/proc/self/fd") == before


def test_the_end_of_a_process_is_seen() -> None:
    with subprocess.Popen(["sleep", "100"]) as process:
        pidfd = os.pidfd_open(process.pid)
        assert not has_ended(pidfd)
        process.kill()
    assert has_ended(pidfd)
    os.close(pidfd)
