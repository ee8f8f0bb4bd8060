"""Shares of CPU cores are priorities of processes that run."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import pytest

from vllm_adrenaline.colocation.controller import Limits, Phase, Shares
from vllm_adrenaline.colocation.cpu import ExecutorShares, WorkerShares
from vllm_adrenaline.system import priority

LOW = Limits().low
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="higher priorities need privileges")


@pytest.fixture
def start() -> Iterator[Callable[[int], int]]:
    """Starts processes of a niceness."""
    running: list[subprocess.Popen[bytes]] = []

    def begin(niceness: int) -> int:
        running.append(subprocess.Popen(["sleep", "100"]))
        priority.set_niceness(running[-1].pid, niceness)
        return running[-1].pid

    yield begin
    for process in running:
        process.kill()
        process.wait()


def niceness(pid: int) -> int:
    return os.getpriority(os.PRIO_PROCESS, pid)


def weight(pid: int) -> float:
    return priority.NICE_FACTOR ** -niceness(pid)


# Prefill against executors


@needs_root
def test_executors_get_the_part_of_the_cores_that_is_decodes() -> None:
    given: list[float] = []

    def set_share(share: float) -> str:
        given.append(share)
        return "niceness 5"

    device = ExecutorShares(set_share)
    assert device.take(Shares(1.0, 0.25)) == "niceness 5"
    assert device.advance(), "it is in force at once"
    device.take(Shares(LOW, 1.0))
    assert given == [0.2, 1.0], "where prefill has its least, executors come first: 1 is real-time priority"


# Prefill workers against decode workers


@needs_root
@pytest.mark.parametrize("decode_niceness", [priority.PROMPT_NICENESS, 0])
@pytest.mark.parametrize("shares", [Shares(1.0, 1.0), Shares(0.5, 1.0), Shares(1.0, 0.4), Shares(LOW, 1.0)])
def test_the_weights_of_both_sides_are_in_the_ratio_of_their_shares(
    start: Callable[[int], int], decode_niceness: int, shares: Shares
) -> None:
    prefill, decode = [start(0), start(0)], start(decode_niceness)
    device = WorkerShares(prefill, lambda: [decode])
    device.take(shares)
    assert device.advance()
    for each in prefill:
        assert weight(decode) / (weight(decode) + weight(each)) == pytest.approx(shares.part(Phase.DECODE), abs=0.06)
    assert niceness(decode) == decode_niceness, "a decode engine keeps the priority that it gave itself"


@needs_root
def test_decode_workers_that_set_their_own_priority_have_what_they_have_today(start: Callable[[int], int]) -> None:
    prefill, decode = start(0), start(priority.PROMPT_NICENESS)
    device = WorkerShares([prefill], lambda: [decode])
    device.take(Shares.dividing(1.0, LOW))
    assert niceness(prefill) == 0


@needs_root
def test_shares_are_in_force_as_soon_as_a_decode_worker_maps(start: Callable[[int], int]) -> None:
    prefill, mapping = start(0), list[int]()
    device = WorkerShares([prefill], lambda: mapping)
    device.take(Shares(1.0, 1.0))
    assert not device.advance()
    assert niceness(prefill) == 0
    mapping.append(start(priority.PROMPT_NICENESS))
    assert device.advance()
    assert niceness(prefill) == priority.PROMPT_NICENESS


@needs_root
def test_a_decode_worker_that_has_ended_is_nobody(start: Callable[[int], int]) -> None:
    with subprocess.Popen(["true"]) as ended:
        ended.wait()
    device = WorkerShares([start(0)], lambda: [ended.pid])
    device.take(Shares(1.0, 1.0))
    assert not device.advance()


@needs_root
@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="takes two cores")
def test_workers_without_a_common_core_share_nothing_and_it_says_so_once(
    start: Callable[[int], int], caplog: pytest.LogCaptureFixture
) -> None:
    first, second = sorted(os.sched_getaffinity(0))[:2]
    prefill, decode = start(0), start(0)
    priority.keep_to(prefill, [first])
    priority.keep_to(decode, [second])
    device = WorkerShares([prefill], lambda: [decode])
    device.take(Shares(1.0, 0.2))
    assert not device.advance()
    assert not device.advance()
    assert len(caplog.records) == 1
    assert niceness(prefill) == 0


BUSY = [sys.executable, "-c", "while True: pass"]


def seconds(pid: int) -> float:
    """Return the CPU time of a process."""
    with open(f"/proc/{pid}/stat") as stat:
        fields = stat.read().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@needs_root
@pytest.mark.parametrize("shares", [Shares(1.0, 0.25), Shares(0.5, 1.0)])
def test_two_workers_that_want_the_same_core_get_their_parts_of_it(shares: Shares) -> None:
    with subprocess.Popen(BUSY) as prefill, subprocess.Popen(BUSY) as decode:
        for each in (prefill, decode):
            priority.keep_to(each.pid, [max(os.sched_getaffinity(0))])
        priority.set_niceness(decode.pid, priority.PROMPT_NICENESS)
        WorkerShares([prefill.pid], lambda: [decode.pid]).take(shares)
        while min(seconds(prefill.pid), seconds(decode.pid)) < 0.1:  # until both have started
            time.sleep(0.05)
        before = seconds(prefill.pid), seconds(decode.pid)
        used = (0.0, 0.0)
        while sum(used) < 1.4:
            time.sleep(0.05)
            used = seconds(prefill.pid) - before[0], seconds(decode.pid) - before[1]
        prefill.kill()
        decode.kill()
    assert used[1] / sum(used) == pytest.approx(shares.part(Phase.DECODE), abs=0.15)


@needs_root
def test_workers_of_different_sessions_are_warned_of(
    start: Callable[[int], int], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(priority, "is_grouped_apart", lambda pid, other: True)
    prefill, decode = start(0), start(0)
    device = WorkerShares([prefill], lambda: [decode])
    device.take(Shares(1.0, 1.0))
    device.advance()
    assert len(caplog.records) == 1
    assert "sched_autogroup_enabled" in caplog.text


@needs_root
def test_processes_of_one_session_are_not_grouped_apart(start: Callable[[int], int]) -> None:
    assert not priority.is_grouped_apart(os.getpid(), start(0))


# Without permission

TRY = """
import os
from vllm_adrenaline.colocation.controller import Shares
from vllm_adrenaline.colocation.cpu import ExecutorShares, WorkerShares
for device in (ExecutorShares(lambda share: os._exit(3)), WorkerShares([os.getpid()], lambda: [os.getppid()])):
    try:
        device.take(Shares(0.5, 1.0))
    except PermissionError as error:
        print(os.getpriority(os.PRIO_PROCESS, 0), error)
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="gives up rights that only root has")
def test_without_permission_nothing_is_taken_that_could_not_be_given_back() -> None:
    drop = ("setpriv", "--bounding-set", "-sys_nice", "--inh-caps", "-sys_nice", "--")
    done = subprocess.run([*drop, sys.executable, "-c", TRY], check=True, capture_output=True, text=True)
    said = done.stdout.splitlines()
    assert len(said) == 2
    assert all(line.startswith(f"{niceness(0)} ") and "CAP_SYS_NICE" in line for line in said)


@needs_root
def test_asking_for_permission_changes_nothing() -> None:
    before = niceness(0)
    priority.require_permission()
    assert niceness(0) == before
