"""What each process uses of a GPU, by NVML (pynvml). Tested against a fake of it, not run on a GPU yet."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import msgspec

from vllm_adrenaline.errors import AdrenalineError


class ProcessUse(msgspec.Struct, frozen=True):
    """`memory`: bytes, None where the driver does not say (MIG, WSL). `sm_percent`: of the last samples, None when
    there is none yet."""

    pid: int
    memory: int | None
    sm_percent: int | None


def processes(device: int, nvml: Any = None) -> list[ProcessUse]:
    """Return what every computing process uses of a device; raises AdrenalineError when NVML fails.

    nvmlDeviceGetComputeRunningProcesses and nvmlDeviceGetProcessUtilization, which reports NVML_ERROR_NOT_FOUND when it
    has no samples and may hold several for a process: the newest counts.
    """
    nvml = nvml or _pynvml()
    try:
        with _session(nvml):
            handle = nvml.nvmlDeviceGetHandleByIndex(device)
            running = nvml.nvmlDeviceGetComputeRunningProcesses(handle)
            try:
                samples = nvml.nvmlDeviceGetProcessUtilization(handle, 0)
            except nvml.NVMLError_NotFound:
                samples = []
    except nvml.NVMLError as error:
        raise AdrenalineError(f"NVML does not answer for GPU {device}: {error}") from None
    used = {sample.pid: sample.smUtil for sample in sorted(samples, key=lambda sample: sample.timeStamp)}
    return [ProcessUse(each.pid, each.usedGpuMemory, used.get(each.pid)) for each in running]


def _pynvml() -> Any:
    try:
        return importlib.import_module("pynvml")
    except ImportError:
        raise AdrenalineError("NVML is not installed: pip install nvidia-ml-py") from None


@contextmanager
def _session(nvml: Any) -> Iterator[None]:
    nvml.nvmlInit()
    try:
        yield
    finally:
        nvml.nvmlShutdown()
