"""What measured figures depend on: the processor, the kernel and the date."""

from __future__ import annotations

import os
import platform
import time
from pathlib import Path


def cpu_model() -> str:
    """Return the name of this machine's processor, or "unknown"."""
    return _said_of_cpu("model name", otherwise="unknown")


def cpu_flags() -> set[str]:
    """Return what /proc/cpuinfo says that this machine's processor can do, e.g. "avx512f", or "bf16" of Arm."""
    return set((_said_of_cpu("flags", otherwise="") or _said_of_cpu("Features", otherwise="")).split())


def _said_of_cpu(field: str, otherwise: str) -> str:
    """Return what /proc/cpuinfo says of the first processor, or `otherwise` if it does not say that."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith(field)), otherwise)


def description() -> dict[str, str | int | None]:
    """Return what a report says of the machine that its figures were measured on."""
    kernel, today = platform.release(), time.strftime("%Y-%m-%d")
    return {"cpu": cpu_model(), "cores_count": os.cpu_count(), "kernel": kernel, "date": today}


def boot() -> str:
    """Return what names this run of the kernel, and so is equal in all processes of this host, and in no others."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def network() -> str:
    """Return what is equal in processes of this host with the same network namespace, and in no others."""
    return f"{boot()}/{os.stat('/proc/self/ns/net').st_ino}"
