"""What the plugin counts, on its way from scheduler and workers to the engine's /metrics.

One table of counters; NIXL's own statistics travel along and keep their metrics. Checked against
vllm/distributed/kv_transfer/kv_connector/v1/metrics.py of 0.32 (run) and 0.33 (read).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorPromMetrics, KVConnectorStats
from vllm.distributed.kv_transfer.kv_connector.v1.nixl.stats import NixlKVConnectorStats, NixlPromMetrics
from vllm.v1.metrics.utils import create_metric_per_engine

COUNTERS = {
    "offloaded_requests": "Requests placed on an attention executor: their KV cache stays on the prefill engine.",
    "local_requests": "Requests whose prompt KV was pulled from the prefill engine.",
    "fallback_requests": "Offloaded requests that were moved to the decode engine and recomputed there.",
    "refused_params": "Requests whose kv_transfer_params named no known prefill engine; computed locally.",
    "remote_attention_rows": "Rows x layers attended by attention executors, as counted by the executors.",
    "executor_failures": "Steps in which an attention executor did not answer in time.",
    "local_attention_seconds": "Seconds of local attention in steps with offloaded rows.",
    "remote_attention_seconds": "Seconds of remote attention in the same steps, of the slowest executor each.",
    "exposed_wait_seconds": "Seconds the decode engine waited for remote attention with nothing else to do.",
}


@dataclass
class AdrenalineStats(KVConnectorStats):
    """`data`: {"nixl": NIXL's own data, "counts": {counter: increment}}."""

    def __post_init__(self) -> None:
        if not self.data:
            self.reset()

    @classmethod
    def merged(cls, nixl: KVConnectorStats | None, counts: Mapping[str, float]) -> AdrenalineStats | None:
        """Return both as one, or None when there is nothing to say."""
        stats = cls()
        if nixl is not None:
            stats.data["nixl"] = nixl.data
        stats.data["counts"] = {name: count for name, count in counts.items() if count}
        return None if stats.is_empty() else stats

    def reset(self) -> None:
        self.data = {"nixl": NixlKVConnectorStats().data, "counts": {}}

    def _nixl(self) -> NixlKVConnectorStats:
        return NixlKVConnectorStats(data=self.data["nixl"])

    def aggregate(self, other: KVConnectorStats) -> KVConnectorStats:
        self.data["nixl"] = self._nixl().aggregate(NixlKVConnectorStats(data=other.data["nixl"])).data
        counts = self.data["counts"]
        for name, count in other.data["counts"].items():
            counts[name] = counts.get(name, 0) + count
        return self

    def reduce(self) -> dict[str, int | float]:
        return {
            **self._nixl().reduce(),
            **{name.replace("_", " "): round(count, 3) for name, count in self.data["counts"].items()},
        }

    def is_empty(self) -> bool:
        return not self.data["counts"] and self._nixl().is_empty()


class AdrenalinePromMetrics(KVConnectorPromMetrics):
    """`vllm:adrenaline_<counter>_total` for every counter, beside NIXL's metrics."""

    def __init__(self, vllm_config: Any, metric_types: Any, labelnames: list[str], per_engine_labelvalues: Any) -> None:
        super().__init__(vllm_config, metric_types, labelnames, per_engine_labelvalues)
        self._nixl = NixlPromMetrics(vllm_config, metric_types, labelnames, per_engine_labelvalues)
        self._counters = {
            name: create_metric_per_engine(
                self._counter_cls(name=f"vllm:adrenaline_{name}", documentation=text, labelnames=labelnames),
                per_engine_labelvalues,
            )
            for name, text in COUNTERS.items()
        }

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        self._nixl.observe(transfer_stats_data["nixl"], engine_idx)
        for name, count in transfer_stats_data["counts"].items():
            self._counters[name][engine_idx].inc(count)
