"""What engines use while a load runs: KV memory, sampled from their /metrics, and CPU time, from /proc."""

from __future__ import annotations

import os
import threading
from pathlib import Path

from vllm_adrenaline.launch.engine_metrics import KV_USED, EngineMetrics
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
    """A context manager around a run; `usage` is the used share of the KV blocks of the prefill and of the decode side,
    one value a second."""

    def __init__(self, prefill: EngineMetrics, decode: EngineMetrics) -> None:
        self.usage: dict[str, list[float]] = {"prefill": [], "decode": []}
        self._prefill, self._decode = prefill, decode
        self._blocks = prefill.blocks()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def _sample(self) -> None:
        while not self._stop.wait(EVERY_S):
            decode = self._decode.read()
            # A prefill engine's own gauge stands still while it has no step: the decode engine knows what is in use.
            elsewhere = sum(decode.value(f"vllm:adrenaline_{what}_blocks") for what in ("borrowed", "waiting"))
            self.usage["prefill"].append(elsewhere / self._blocks if elsewhere else self._prefill.usage())
            self.usage["decode"].append(decode.value(KV_USED))

    def __enter__(self) -> Sampler:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def mean(self, side: str) -> float:
        """Return the mean use of a side in the middle half of the run: after filling, before draining."""
        values = self.usage[side]
        middle = values[len(values) // 4 : -(len(values) // 4) or None]
        return sum(middle) / len(middle) if middle else 0.0
