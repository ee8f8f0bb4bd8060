"""What the kernel says of other processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from vllm_adrenaline.system.process import is_stopped, works


@contextmanager
def child(program: str) -> Iterator[int]:
    with subprocess.Popen([sys.executable, "-c", program]) as process:
        try:
            yield process.pid
        finally:
            process.kill()


def soon(check: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + 10
    while not (holds := check()) and time.monotonic() < deadline:
        time.sleep(0.01)
    return holds


def test_who_computes_works_and_who_sleeps_or_was_stopped_does_not() -> None:
    with child("while True: pass") as pid:
        assert soon(lambda: works(pid))
        assert not is_stopped(pid)
        os.kill(pid, signal.SIGSTOP)
        assert soon(lambda: is_stopped(pid))
        assert not works(pid)
    with child("import time; time.sleep(60)") as pid:
        assert soon(lambda: not works(pid))
        assert not is_stopped(pid)


def test_one_thread_that_works_is_enough() -> None:
    program = (
        "import threading, time; threading.Thread(target=lambda: [0 for _ in iter(int, 1)]).start(); time.sleep(60)"
    )
    with child(program) as pid:
        assert soon(lambda: works(pid))


def test_who_is_not_there_neither_works_nor_was_stopped() -> None:
    with child("pass") as pid:
        pass
    assert not works(pid)
    assert not is_stopped(pid)
