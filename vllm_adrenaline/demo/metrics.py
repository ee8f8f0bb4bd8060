"""Reading an engine's /metrics: the few figures that the demonstration shows."""

from __future__ import annotations

import re
import urllib.request


class EngineMetrics:
    """The metrics of one engine."""

    def __init__(self, url: str) -> None:
        self._url = f"{url}/metrics"

    def _text(self) -> str:
        try:
            with urllib.request.urlopen(self._url, timeout=10) as answer:
                return str(answer.read().decode())
        except OSError:
            return ""

    def value(self, name: str) -> float:
        """Return the sum of a metric over its labels; 0 if the engine does not have it."""
        lines = re.findall(rf"^{re.escape(name)}(?:\{{.*\}})? (\S+)$", self._text(), re.MULTILINE)
        return sum(float(line) for line in lines)

    def blocks(self) -> int:
        """Return how many KV blocks the engine has."""
        found = re.search(r'^vllm:cache_config_info\{.*num_gpu_blocks="(\d+)"', self._text(), re.MULTILINE)
        return int(found.group(1)) if found else 0

    def usage(self) -> float:
        """Return the share of KV blocks in use, 0 to 1."""
        return self.value("vllm:kv_cache_usage_perc")

    def offloaded(self) -> int:
        """Return how many requests had their attention run elsewhere so far."""
        return int(self.value("vllm:adrenaline_offloaded_requests_total"))
