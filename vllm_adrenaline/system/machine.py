"""What measured figures depend on: the processor, the kernel and the date."""

from __future__ import annotations

import os
import platform
import time
from pathlib import Path


def cpu_model() -> str:
    """Return the name of this machine's processor, or "unknown"."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")


def cpu_flags() -> set[str]:
    """Return what /proc/cpuinfo says that this machine's processor can do, e.g. "avx512f"."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return set(next((line.split(":", 1)[1] for line in lines if line.startswith("flags")), "").split())


def description() -> dict[str, str | int | None]:
    """Return what a report says of the machine that its figures were measured on."""
    kernel, today = platform.release(), time.strftime("%Y-%m-%d")
    return {"cpu": cpu_model(), "cores_count": os.cpu_count(), "kernel": kernel, "date": today}


def process_space() -> str:
    """Return what is equal in two processes that see each other under the same process ids, and in no others."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot}/{os.stat('/proc/self/ns/pid').st_ino}"


SHARE_PIDS = "--pid=container:NAME or --pid=host of Docker, shareProcessNamespace of Kubernetes"
"""How containers come to see each other's processes."""


def where_is(space: str) -> str:
    """Return in words where processes of another process space than ours are."""
    if space.partition("/")[0] == process_space().partition("/")[0]:
        return "in another PID namespace of this host"
    return "on another host"


def how_to_share_memory(space: str) -> str:
    """Return what lets processes of another process space share memory with ours, to be said after a refusal."""
    return "" if where_is(space) == "on another host" else f"; or start both in one PID namespace ({SHARE_PIDS})"
