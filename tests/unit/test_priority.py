"""How a share of CPU cores is enforced: by the priority of every thread of a process."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_adrenaline.system import priority

OWN_NICENESS = os.getpriority(os.PRIO_PROCESS, 0)
"""Of the tests, which their child processes inherit."""
THREADS = """
import threading, time
for _ in range(3):
    threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
print("up", flush=True)
time.sleep(60)
"""


@pytest.fixture
def child() -> Iterator[int]:
    process = subprocess.Popen([sys.executable, "-c", THREADS], stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    yield process.pid
    process.kill()
    process.communicate()


def threads(pid: int) -> list[int]:
    return [int(name) for name in os.listdir(f"/proc/{pid}/task")]


@given(st.floats(0.02, 0.98))
def test_niceness_gives_the_share_by_the_schedulers_weights(share: float) -> None:
    niceness = priority.niceness_of(share)
    assert niceness is not None
    weight = priority.NICE_FACTOR**-niceness
    assert weight / (1 + weight) == pytest.approx(share, abs=0.06)


def test_all_of_a_core_is_real_time_priority() -> None:
    assert priority.niceness_of(1.0) is None
    assert priority.niceness_of(0.5) == 0


@pytest.mark.skipif(os.geteuid() != 0, reason="higher priorities need privileges")
def test_every_thread_gets_the_priority_and_gives_it_back(child: int) -> None:
    assert len(threads(child)) == 4
    assert priority.take_share(child, 1.0) == "real-time priority"
    assert {os.sched_getscheduler(thread) for thread in threads(child)} == {os.SCHED_FIFO}
    assert priority.take_share(child, 0.25) == "niceness 5"
    assert {os.sched_getscheduler(thread) for thread in threads(child)} == {os.SCHED_OTHER}
    assert {os.getpriority(os.PRIO_PROCESS, thread) for thread in threads(child)} == {5}
    priority.keep_to(child, [0])
    assert {tuple(os.sched_getaffinity(thread)) for thread in threads(child)} == {(0,)}


def taken(*launcher: str) -> tuple[str, int, int]:
    """Ask for a whole share in a process of its own; return what it says, its scheduling class and its niceness."""
    code = (
        "import os; from vllm_adrenaline.system.priority import take_share as take; "
        "print(take(os.getpid(), 1.0), os.sched_getscheduler(0), os.getpriority(os.PRIO_PROCESS, 0), sep=',')"
    )
    command = [*launcher, sys.executable, "-c", code]
    said, kind, nice = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip().split(",")
    return said, int(kind), int(nice)


def test_a_process_says_which_priority_it_got() -> None:
    said, kind, nice = taken()
    got = {"real-time priority": kind == os.SCHED_FIFO, "niceness -10": nice == -10}
    assert got.get(said, (kind, nice) == (os.SCHED_OTHER, OWN_NICENESS))


@pytest.mark.skipif(os.geteuid() != 0, reason="gives up rights that only root has")
def test_without_rights_the_priority_stays_ordinary() -> None:
    drop = ("setpriv", "--bounding-set", "-sys_nice", "--inh-caps", "-sys_nice", "--")
    assert taken(*drop) == (priority.ORDINARY, os.SCHED_OTHER, OWN_NICENESS)


def test_a_process_that_is_gone_is_no_error() -> None:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    time.sleep(0.05)
    priority.take_share(process.pid, 0.5)
    priority.keep_to(process.pid, [0])


def test_threads_are_whole_and_at_least_one() -> None:
    assert [priority.threads_of(share, 8) for share in (0.01, 0.25, 0.5, 1.0)] == [1, 2, 4, 8]
