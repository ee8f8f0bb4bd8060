"""What the machine offers: free ports, processor cores, and whether vLLM here is the CPU build."""

from __future__ import annotations

import os
import platform
import socket
import time
from importlib import metadata
from pathlib import Path

CORES_ENV = "VLLM_CPU_OMP_THREADS_BIND"


def cpu_model() -> str:
    """Return the name of this machine's processor."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")


def machine() -> dict[str, str | int | None]:
    """Return what measured figures depend on."""
    kernel, today = platform.release(), time.strftime("%Y-%m-%d")
    return {"cpu": cpu_model(), "cores_count": os.cpu_count(), "kernel": kernel, "date": today}


def free_ports(count: int) -> list[int]:
    """Return different TCP ports that nothing listens on at 127.0.0.1."""
    listeners = [socket.socket() for _ in range(count)]
    try:
        for listener in listeners:
            listener.bind(("127.0.0.1", 0))
        return [int(listener.getsockname()[1]) for listener in listeners]
    finally:
        for listener in listeners:
            listener.close()


def is_cpu_build() -> bool:
    """Say whether vLLM runs on the CPU here. Reads package metadata: importing vLLM takes ten seconds."""
    for name in ("vllm", "vllm-cpu"):
        try:
            if name == "vllm-cpu" or "cpu" in metadata.version(name):
                metadata.version(name)
                return True
        except metadata.PackageNotFoundError:
            continue
    return False


def physical_cores() -> list[int]:
    """Return one processor number per physical core that this process may use."""
    allowed = sorted(os.sched_getaffinity(0))
    first: dict[str, int] = {}
    for cpu in allowed:
        siblings = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        try:
            first.setdefault(siblings.read_text().strip(), cpu)
        except OSError:
            first[str(cpu)] = cpu
    cores = list(first.values())
    return cores if len(cores) > 1 else allowed


def split_cores(cores: list[int]) -> tuple[str, str]:
    """Return the cores of the decode and of the prefill engine, as vLLM's variable wants them; one core is shared."""
    half = (len(cores) + 1) // 2
    decode, prefill = cores[:half], cores[half:] or cores
    return ",".join(map(str, decode)), ",".join(map(str, prefill))
