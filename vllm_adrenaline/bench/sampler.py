"""What engines use while a load runs: KV memory, sampled from their /metrics, and CPU time, from /proc."""

from __future__ import annotations

import os
import threading
from contextlib import suppress
from pathlib import Path

from vllm_adrenaline.errors import AdrenalineError
from vllm_adrenaline.launch.engine_metrics import EngineMetrics
from vllm_adrenaline.launch.process import group_members
from vllm_adrenaline.proxy.snapshot import KV_USED

EVERY_S = 1.0
TICKS = os.sysconf("SC_CLK_TCK")


def cpu_seconds(pid: int) -> float:
    """Return the CPU time in seconds that an engine's processes have taken. Those that ended are not counted."""
    total = 0
    for member in group_members(pid):
        try:
            fields = Path(f"/proc/{member}/stat").read_text().rsplit(")", 1)[1].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        total += int(fields[11]) + int(fields[12])
    return total / TICKS


class Sampler:
    """A context manager around a run that samples how much of the KV cache is in use, every `every_s` seconds.

    `usage` has the samples of the decode side, and of the prefill side if there is one: the share of its KV blocks in
    use, 0 to 1. A moment at which an engine does not answer has no sample.
    """

    def __init__(self, decode: EngineMetrics, prefill: EngineMetrics | None = None, every_s: float = EVERY_S) -> None:
        self.usage: dict[str, list[float]] = {"prefill": [], "decode": []}
        self._decode, self._prefill, self._every_s = decode, prefill, every_s
        self._blocks = prefill.blocks() if prefill else 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def _run(self) -> None:
        while not self._stop.wait(self._every_s):
            with suppress(AdrenalineError):
                self._sample()

    def _sample(self) -> None:
        decode = self._decode.read()
        if self._prefill:
            # A prefill engine's own gauge stands still while it has no step: the decode engine knows what is in use.
            elsewhere = sum(decode.value(f"vllm:adrenaline_{what}_blocks") for what in ("borrowed", "waiting"))
            used = elsewhere / self._blocks if elsewhere else self._prefill.read().value(KV_USED)
            self.usage["prefill"].append(used)
        self.usage["decode"].append(decode.value(KV_USED))

    def __enter__(self) -> Sampler:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def mean(self, side: str) -> float:
        """Return the mean use of a side in the middle half of the run: after it filled and before it drained."""
        values = self.usage[side]
        middle = values[len(values) // 4 : -(len(values) // 4) or None]
        return sum(middle) / len(middle) if middle else 0.0

    def peak(self, side: str) -> float:
        """Return the largest use of a side."""
        return max(self.usage[side], default=0.0)
