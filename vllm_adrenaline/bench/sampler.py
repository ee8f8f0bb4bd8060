"""What engines use while a load runs: KV memory, sampled from their /metrics, and CPU time, from /proc."""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping
from pathlib import Path

from vllm_adrenaline.engine_metrics import EngineMetrics
from vllm_adrenaline.launch.process import group_members

EVERY_S = 1.0
TICKS = os.sysconf("SC_CLK_TCK")


def cpu_seconds(pid: int) -> float:
    """Return the CPU time of an engine's processes so far; those that ended are not counted."""
    total = 0
    for member in group_members(pid):
        try:
            fields = Path(f"/proc/{member}/stat").read_text().rsplit(")", 1)[1].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        total += int(fields[11]) + int(fields[12])
    return total / TICKS


class Sampler:
    """A context manager around a run; `usage` is the KV blocks' used share by engine, one value a second."""

    def __init__(self, urls: Mapping[str, str]) -> None:
        self.usage: dict[str, list[float]] = {name: [] for name in urls}
        self._engines = {name: EngineMetrics(url) for name, url in urls.items()}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def _sample(self) -> None:
        while not self._stop.wait(EVERY_S):
            for name, engine in self._engines.items():
                self.usage[name].append(engine.usage())

    def __enter__(self) -> Sampler:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def mean(self, name: str) -> float:
        """Return the mean use of an engine in the middle half of the run: after filling, before draining."""
        values = self.usage[name]
        middle = values[len(values) // 4 : -(len(values) // 4) or None]
        return sum(middle) / len(middle) if middle else 0.0
