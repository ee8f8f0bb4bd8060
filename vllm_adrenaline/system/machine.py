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


_held: list[socket.socket] = []


def held_ports(count: int) -> list[int]:
    """Return different TCP ports of 127.0.0.1 that are ours as long as this process lives.

    They are bound, so that nobody else gets them, and not listened at, so that an engine of ours can: it sets
    SO_REUSEADDR, as servers do. A port that is only looked for and then left is soon somebody's: any connection that
    any process makes may take it before an engine, half a minute later, binds it.
    """
    made = [socket.socket() for _ in range(count)]
    for each in made:
        for option in (socket.SO_REUSEADDR, socket.SO_REUSEPORT):  # vLLM sets both
            each.setsockopt(socket.SOL_SOCKET, option, 1)
        each.bind(("127.0.0.1", 0))
    _held.extend(made)
    return [int(each.getsockname()[1]) for each in made]


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
