"""What is sampled of engines and their proxy while they serve."""

from __future__ import annotations

import contextlib
import os
import re
from collections import defaultdict
from pathlib import Path

from tests.soak.trends import Trend, trend
from vllm_adrenaline.errors import AdrenalineError
from vllm_adrenaline.launch.engine_metrics import EngineMetrics
from vllm_adrenaline.launch.process import group_members

PAGE = os.sysconf("SC_PAGE_SIZE")
MIB = 1 << 20
BOUNDS = {
    "memory": ("MiB", 32.0),
    "descriptors": ("", 4.0),
    "threads": ("", 4.0),
    "memory files": ("", 2.0),
    "/dev/shm": ("MiB", 1.0),
    "blocks in use": ("%", 2.0),
    "time of a token": ("ms", 2.0),
}
"""Of each kind its unit, and the growth in an hour that does not matter."""
EXECUTOR = b"vllm_adrenaline.attention"


def lasting(group: int) -> list[int]:
    """Return the processes of an engine that live as long as it does: not its executors, which faults end."""
    found = []
    for pid in group_members(group):
        with contextlib.suppress(OSError):
            if EXECUTOR not in Path(f"/proc/{pid}/cmdline").read_bytes():
                found.append(pid)
    return found


class Samples:
    """Values over time, by kind and engine. A life of an engine is a series of its own; the longest one counts."""

    def __init__(self) -> None:
        self.points: dict[tuple[str, str], dict[int, list[tuple[float, float]]]] = defaultdict(
            lambda: defaultdict(list)
        )
        self.offloaded: dict[str, list[tuple[float, float]]] = defaultdict(list)

    def offloads(self, engine: str, since: float) -> bool:
        """Say whether an engine has had rows attended by executors since a time."""
        rows = [rows for at, rows in self.offloaded[engine] if at >= since]
        return bool(rows) and rows[-1] > rows[0]

    def add(self, kind: str, engine: str, life: int, at: float, value: float) -> None:
        """Add a value at a time in seconds."""
        self.points[kind, engine][life].append((at, value))

    def take(self, at: float, engines: dict[str, tuple[int, str]]) -> None:
        """Sample everything. `engines`: process group and URL by name."""
        for name, (group, url) in engines.items():
            pages = descriptors = threads = files = 0
            for pid in lasting(group):
                with contextlib.suppress(OSError, ValueError):
                    pages += int(Path(f"/proc/{pid}/statm").read_text().split()[1])
                    threads += len(os.listdir(f"/proc/{pid}/task"))
                    targets = [_target(fd) for fd in Path(f"/proc/{pid}/fd").iterdir()]
                    descriptors += len(targets)
                    files += sum("memfd:" in target for target in targets)
            self.add("memory", name, group, at, pages * PAGE / MIB)
            if name != "proxy":  # its are connections of requests under way
                self.add("descriptors", name, group, at, descriptors)
            self.add("threads", name, group, at, threads)
            self.add("memory files", name, group, at, files)
            if name != "proxy":
                with contextlib.suppress(AdrenalineError):
                    metrics = EngineMetrics(url).read()
                    self.add("blocks in use", name, group, at, 100 * metrics.value("vllm:kv_cache_usage_perc"))
                    self.offloaded[name].append((at, metrics.value("vllm:adrenaline_remote_attention_rows_total")))
        size = 0
        for entry in os.scandir("/dev/shm"):
            with contextlib.suppress(OSError):
                size += entry.stat().st_blocks * 512
        self.add("/dev/shm", "all", 0, at, size / MIB)

    def trends(self, since: float, until: float) -> list[Trend]:
        """Return the trend of every series between two times."""
        made = []
        for (kind, engine), lives in self.points.items():
            points = max(([p for p in life if since <= p[0] <= until] for life in lives.values()), key=len)
            unit, bound = BOUNDS[kind]
            made.append(trend(f"{kind}, {engine}", unit, bound, points))
        return made


def _target(fd: Path) -> str:
    with contextlib.suppress(OSError):
        return re.sub(r"\s.*", "", os.readlink(fd))
    return ""
