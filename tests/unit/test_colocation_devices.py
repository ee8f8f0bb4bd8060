"""How a share is enforced: priorities on CPU; MPS, green contexts and NVML against fakes that behave as documented."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_adrenaline.colocation import choose, cpu, green, mps, nvml
from vllm_adrenaline.errors import AdrenalineError

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
    niceness = cpu.niceness_of(share)
    assert niceness is not None
    weight = cpu.NICE_FACTOR**-niceness
    assert weight / (1 + weight) == pytest.approx(share, abs=0.06)


def test_all_of_a_core_is_real_time_priority() -> None:
    assert cpu.niceness_of(1.0) is None
    assert cpu.niceness_of(0.5) == 0


@pytest.mark.skipif(os.geteuid() != 0, reason="higher priorities need privileges")
def test_every_thread_gets_the_priority_and_gives_it_back(child: int) -> None:
    assert len(threads(child)) == 4
    assert cpu.take_share(child, 1.0) == "real-time priority"
    assert {os.sched_getscheduler(thread) for thread in threads(child)} == {os.SCHED_FIFO}
    assert cpu.take_share(child, 0.25) == "niceness 5"
    assert {os.sched_getscheduler(thread) for thread in threads(child)} == {os.SCHED_OTHER}
    assert {os.getpriority(os.PRIO_PROCESS, thread) for thread in threads(child)} == {5}
    cpu.keep_to(child, [0])
    assert {tuple(os.sched_getaffinity(thread)) for thread in threads(child)} == {(0,)}


def priority(*launcher: str) -> tuple[str, int, int]:
    """Ask for a whole share in a process of its own; return what it says, its scheduling class and its niceness."""
    code = (
        "import os; from vllm_adrenaline.colocation.cpu import take_share as take; "
        "print(take(os.getpid(), 1.0), os.sched_getscheduler(0), os.getpriority(os.PRIO_PROCESS, 0), sep=',')"
    )
    command = [*launcher, sys.executable, "-c", code]
    said, kind, nice = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip().split(",")
    return said, int(kind), int(nice)


def test_a_process_says_which_priority_it_got() -> None:
    said, kind, nice = priority()
    got = {"real-time priority": kind == os.SCHED_FIFO, "niceness -10": nice == -10}
    assert got.get(said, (kind, nice) == (os.SCHED_OTHER, 0))


@pytest.mark.skipif(os.geteuid() != 0, reason="gives up rights that only root has")
def test_without_rights_the_priority_stays_ordinary() -> None:
    drop = ("setpriv", "--bounding-set", "-sys_nice", "--inh-caps", "-sys_nice", "--")
    assert priority(*drop) == (cpu.ORDINARY, os.SCHED_OTHER, 0)


def test_a_process_that_is_gone_is_no_error() -> None:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    time.sleep(0.05)
    cpu.take_share(process.pid, 0.5)
    cpu.keep_to(process.pid, [0])


def test_threads_are_whole_and_at_least_one() -> None:
    assert [cpu.threads_of(share, 8) for share in (0.01, 0.25, 0.5, 1.0)] == [1, 2, 4, 8]


# MPS


@pytest.fixture
def daemon(tmp_path: Path) -> dict[str, str]:
    (tmp_path / "control").touch()
    return {mps.PIPES: str(tmp_path)}


def answers(command: str, env: Mapping[str, str]) -> str:
    assert command == "get_server_list"
    return "4711\n"


def test_a_running_mps_daemon_passes_the_preflight(daemon: dict[str, str]) -> None:
    mps.preflight(daemon, answers)


def test_no_mps_daemon_is_refused_with_the_command_that_starts_it(tmp_path: Path) -> None:
    with pytest.raises(AdrenalineError, match="nvidia-cuda-mps-control -d"):
        mps.preflight({mps.PIPES: str(tmp_path)}, answers)


@pytest.mark.parametrize(
    ("failure", "said"),
    [
        (FileNotFoundError(), "comes with the NVIDIA driver"),
        (subprocess.TimeoutExpired("x", 5), "does not answer"),
        (subprocess.CalledProcessError(1, "x"), "does not answer"),
    ],
)
def test_a_daemon_that_fails_is_refused_in_a_sentence(daemon: dict[str, str], failure: Exception, said: str) -> None:
    def fails(*_: Any) -> str:
        raise failure

    with pytest.raises(AdrenalineError, match=said):
        mps.preflight(daemon, fails)


def test_a_share_is_a_percentage_of_active_threads() -> None:
    assert mps.environment(0.2) == {"CUDA_MPS_ACTIVE_THREAD_PERCENTAGE": "20"}
    for wrong in (0.0, -1.0, 1.1):
        with pytest.raises(AdrenalineError):
            mps.environment(wrong)


# Green contexts


class FakeGreen:
    """torch.cuda.green_contexts.GreenContext."""

    def __init__(self, num_sms: int, device_id: int) -> None:
        self.num_sms, self.device_id, self.entered = num_sms, device_id, False

    @staticmethod
    def create(num_sms: int, device_id: int) -> FakeGreen:
        return FakeGreen(num_sms, device_id)

    def set_context(self) -> None:
        self.entered = True


CUDA = SimpleNamespace(
    green_contexts=SimpleNamespace(GreenContext=FakeGreen),
    get_device_properties=lambda device: SimpleNamespace(multi_processor_count=132),
)


def test_a_green_context_has_whole_groups_of_sms() -> None:
    context = green.enter(0.2, 0, CUDA)
    assert (context.num_sms, context.entered) == (24, True)
    with pytest.raises(AdrenalineError, match="use CUDA MPS"):
        green.enter(0.2, 0, SimpleNamespace())


@given(st.floats(0.001, 1), st.integers(8, 200))
def test_sms_are_never_none_and_never_more_than_there_are(share: float, total: int) -> None:
    assert 8 <= green.sms_of(share, total) <= total


# The choice


def test_the_mechanism_is_chosen_by_what_is_there(daemon: dict[str, str], tmp_path: Path) -> None:
    nothing = {mps.PIPES: str(tmp_path / "none")}
    assert choose.choose("cpu", {}) is choose.Mechanism.PRIORITY
    assert choose.choose("cuda", daemon, CUDA, answers) is choose.Mechanism.MPS
    assert choose.choose("cuda", nothing, CUDA, answers) is choose.Mechanism.GREEN_CONTEXT
    with pytest.raises(AdrenalineError, match=r"nvidia-cuda-mps-control -d.*no green contexts"):
        choose.choose("cuda", nothing, SimpleNamespace(), answers)


# NVML


class NVMLError(Exception):
    """As in pynvml: every error has a class of its own below this one."""


class NVMLError_NotFound(NVMLError):
    """No samples."""


class FakeNvml(SimpleNamespace):
    NVMLError, NVMLError_NotFound = NVMLError, NVMLError_NotFound

    def __init__(self, samples: list[Any] | None) -> None:
        super().__init__(samples=samples, sessions=0)

    def nvmlInit(self) -> None:
        self.sessions += 1

    def nvmlShutdown(self) -> None:
        self.sessions -= 1

    def nvmlDeviceGetHandleByIndex(self, device: int) -> int:
        assert self.sessions == 1
        if device > 0:
            raise NVMLError("Invalid Argument")
        return device

    def nvmlDeviceGetComputeRunningProcesses(self, handle: int) -> list[Any]:
        return [SimpleNamespace(pid=1, usedGpuMemory=1 << 30), SimpleNamespace(pid=2, usedGpuMemory=None)]

    def nvmlDeviceGetProcessUtilization(self, handle: int, since: int) -> list[Any]:
        if self.samples is None:
            raise NVMLError_NotFound
        return self.samples


def test_the_newest_sample_of_each_process_counts() -> None:
    samples = [SimpleNamespace(pid=1, smUtil=util, timeStamp=at) for util, at in ((70, 2), (30, 1))]
    fake = FakeNvml(samples)
    assert nvml.processes(0, fake) == [nvml.ProcessUse(1, 1 << 30, 70), nvml.ProcessUse(2, None, None)]
    assert fake.sessions == 0, "NVML was not shut down"


def test_no_samples_yet_is_no_error_but_no_device_is() -> None:
    fake = FakeNvml(None)
    assert nvml.processes(0, fake)[0].sm_percent is None
    with pytest.raises(AdrenalineError, match="GPU 1"):
        nvml.processes(1, fake)
    assert fake.sessions == 0
