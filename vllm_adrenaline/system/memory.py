"""The memory of this machine, or of the container that this process runs in."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

GIB = 1 << 30
UNLIMITED = 1 << 62


@dataclass(frozen=True)
class Memory:
    """The memory of a machine in bytes: `total` is all of it, as vLLM sees it; `available` is free or easily freed."""

    total: int
    available: int


def read(root: Path = Path("/")) -> Memory:
    """Return this machine's memory, or that of the container that this process runs in, if it has less.

    It is read as vLLM reads it (vllm/utils/cpu_resource_utils.py, get_memory_node_info; 0.32): from cgroup v2, then v1.
    Control groups below the container's, as systemd and Slurm make them, leave `total` as vLLM sees it, and limit what
    is available. /proc and /sys are looked for below `root`.
    """
    lines = (root / "proc/meminfo").read_text().splitlines()
    found = {line.partition(":")[0]: 1024 * int(line.split()[1]) for line in lines}
    total, available = found["MemTotal"], found["MemAvailable"]
    groups = root / "sys/fs/cgroup"
    for limit, usage in (
        (groups / "memory.max", groups / "memory.current"),
        (groups / "memory/memory.limit_in_bytes", groups / "memory/memory.usage_in_bytes"),
    ):
        if (most := _number(limit)) is not None:
            if most < min(total, UNLIMITED):
                total, available = most, max(0, min(available, most - (_number(usage) or 0)))
            break
    return Memory(total, min([available, *_left_in_own_groups(root, total)]))


def of_worker(memory: Memory, root: Path = Path("/")) -> int:
    """Return the bytes of which vLLM lets one worker take its --gpu-memory-utilization.

    They are those of one NUMA node, of the smallest if they differ, or of the container if it has less.
    """
    nodes = (root / "sys/devices/system/node").glob("node*/meminfo")
    lines = [line for file in nodes for line in file.read_text().splitlines() if "MemTotal:" in line]
    sizes = [1024 * int(line.split()[-2]) for line in lines]
    return min([memory.total, *(size for size in sizes if size)])


def _left_in_own_groups(root: Path, total: int) -> list[int]:
    """Return the bytes that the control group of this process, and those it is in, may still take."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    left = []
    for line in lines:
        number, kinds, path = line.split(":", 2)
        if number == "0":
            top, most, used, easily_freed = root / "sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"
        elif kinds == "memory":
            top, most, used = root / "sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
            easily_freed = "total_inactive_file"
        else:
            continue
        group = top / path.strip("/")
        while group != top and top in group.parents:
            if (limit := _number(group / most)) is not None and limit < total:
                taken = (_number(group / used) or 0) - _in_stat(group / "memory.stat", easily_freed)
                left.append(max(0, limit - max(0, taken)))
            group = group.parent
    return left


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):  # not there, or "max"
        return None


def _in_stat(path: Path, name: str) -> int:
    try:
        found = dict(line.split() for line in path.read_text().splitlines())
        return int(found.get(name, 0))
    except (OSError, ValueError):
        return 0
