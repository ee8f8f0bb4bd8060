"""The plugin's counters and gauges, on their way from scheduler and workers to the engine's /metrics.

NIXL's own statistics travel along and keep their metrics. Checked against
vllm/distributed/kv_transfer/kv_connector/v1/metrics.py of 0.32 (run) and 0.33 (read).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorPromMetrics, KVConnectorStats
from vllm.distributed.kv_transfer.kv_connector.v1.nixl.stats import NixlKVConnectorStats, NixlPromMetrics
from vllm.v1.metrics.utils import create_metric_per_engine

from vllm_adrenaline.config import Options

ADVICE = " If high: "
"""What stands between a metric's meaning and what to do, in each description below. Prometheus shows both, and the
table in docs/metrics.md is made of them."""
COUNTERS = {
    "offloaded_requests": "Requests placed on an attention executor: their KV cache stays on the prefill engine. "
    "If high: nothing to do, the decode engine is short of memory or its steps are shorter so.",
    "mapped_requests": "Requests that are attended here over the prefill engine's memory, which is mapped. "
    "If high: nothing to do.",
    "local_requests": "Requests whose prompt KV was pulled from the prefill engine. If high: nothing to do.",
    "moved_requests": "Offloaded requests that went on on the decode engine, their KV cache pulled there. "
    "If high: prefill engines run short of KV blocks, so give them more, or lower --adrenaline-offload-ratio.",
    "fallback_requests": "Requests that lost their KV cache on a prefill engine, or had to leave it; recomputed here. "
    "If high: look at executor_failures, at the prefill engine's log, and whether its KV cache is full.",
    "refused_params": "Requests whose kv_transfer_params are malformed, unknown or not theirs; computed here. "
    "If high: see unsigned_params; else a router sends one prompt's parameters with several prompts, or clients leave.",
    "unsigned_params": "Those of them whose kv_transfer_params no prefill engine of ours has signed. "
    "If high: a prefill engine started again, a router drops fields, or somebody forges them.",
    "remote_attention_rows": "Rows x layers attended by attention executors, as counted by the executors. "
    "If high: nothing to do.",
    "mapped_attention_rows": "Rows x layers attended here over mapped memory of prefill engines. "
    "If high: nothing to do.",
    "executor_failures": "Failures of attention executors: one for each executor that failed in a step. "
    "If high: the decode engine's log says why; executors that are late want more cores or fewer neighbours.",
    "executor_returns": "Executors that failed, answered again, and are used again. "
    "If high: executors are late again and again: give them more cores, or a longer --adrenaline-executor-timeout.",
    "remote_attention_tokens": "Tokens of context that executors attended, each token once a step. "
    "If high: nothing to do.",
    "local_attention_seconds": "Seconds of local attention in steps with offloaded rows. If high: nothing to do.",
    "remote_attention_seconds": "Seconds of remote attention in the same steps, of the slowest executor each. "
    "If high: far above local_attention_seconds, executors are too slow for what they get.",
    "exposed_wait_seconds": "Seconds the decode engine waited for remote attention with nothing else to do. "
    "If high: more than some percent of the time, give executors more (--adrenaline-executor-cores, "
    "--adrenaline-executor-share), or offload less.",
}
PLACEMENTS = "placements/"
"""Counters of this prefix have two labels: placements/<placement>/<reason>."""
PLACED = (
    "Decisions of placement: where a request went, or that it had to wait or move, and why. "
    "If high: with placement wait, both sides are full: more KV memory, or fewer requests at once."
)
GAUGES = {
    "local_attention_seconds_per_token": "What a token of context costs in local attention, as placement believes. "
    "If high: other work takes the decode engine's cores.",
    "remote_attention_seconds_per_token": "The same in the slowest executor. "
    "If high: other work takes the executors' cores.",
    "step_seconds_without_attention": "A step of the present batch without attention, as placement believes. "
    "If high: other work takes the decode engine's cores, or the batch is large.",
    "offload_bound_ratio": "The bound on offloaded over local attention, of the executor with the lowest; 0: no bound. "
    "If high: nothing to do.",
    "executor_share": "What the attention executors of this prefill engine get of their device. "
    "If high: nothing to do.",
    "prefill_share": "What prefill may use of this prefill engine's device, by its objectives; 0 without an objective. "
    "If high: nothing to do.",
    "decode_share": "What decode may use of the same device: executors, or decode engines that map its memory. "
    "If high: nothing to do.",
    "borrowed_blocks": "KV blocks of prefill engines that are held here: of offloaded requests, and leased ahead. "
    "If high: near all that prefill engines have, prompts wait there: give them more KV memory.",
    "waiting_blocks": "KV blocks of prefill engines that hold prompts which wait here to be placed. "
    "If high: the decode side is full.",
    "lendable_blocks": "KV blocks of prefill engines that requests here could still get. If high: nothing to do.",
    "unavailable_executors": "Attention executors that failed and are not used, for they have not answered again. "
    "If high: above 0 for minutes, look at the prefill engine's log.",
    "local_rows": "Requests in the batch whose KV cache is the decode engine's own. If high: nothing to do.",
    "mapped_rows": "Requests in the batch that are attended here over mapped memory of prefill engines. "
    "If high: nothing to do.",
    "offloaded_rows": "Requests in the batch whose attention runs on executors. If high: nothing to do.",
}
GPU_GAUGES = {
    "gpu_busy_share": "The part of the time in which a kernel was on the GPU, of any process; one that waits counts. "
    "If high: nothing to do.",
    "gpu_memory_busy_share": "The part of the time in which the GPU's memory was read or written, however much. "
    "If high: nothing to do, on a prefill engine this is what offloading is for.",
    "gpu_memory_used_bytes": "Memory of the GPU that is used, by all processes and the driver. "
    "If high: nothing to do, an engine takes what --gpu-memory-utilization says.",
}
"""Gauges of an engine's GPUs, on CUDA alone. They are reported as <gauge>/<GPU>, and the GPU becomes one more label. A
sample is there once it is reported: what NVML does not tell is absent, and not 0 (system/nvml.py)."""


@dataclass
class AdrenalineStats(KVConnectorStats):
    """What a connector has to report, NIXL's statistics and ours.

    Attributes:
        data: {"nixl": NIXL's own data, "counts": {counter: increment}, "gauges": {gauge: value}}.
    """

    def __post_init__(self) -> None:
        if not self.data:
            self.reset()

    @classmethod
    def merged(
        cls, nixl: KVConnectorStats | None, counts: Mapping[str, float], gauges: Mapping[str, float]
    ) -> AdrenalineStats | None:
        """Return NIXL's statistics with ours; None when there is nothing to report. Counts of 0 are left out."""
        stats = cls()
        if nixl is not None:
            stats.data["nixl"] = nixl.data
        unknown = {name for name in counts if name not in COUNTERS and not name.startswith(PLACEMENTS)}
        unknown |= {name for name in gauges if name.partition("/")[0] not in (GPU_GAUGES if "/" in name else GAUGES)}
        assert not unknown, "a metric is described in COUNTERS, GAUGES or GPU_GAUGES first"
        stats.data["counts"] = {name: count for name, count in counts.items() if count}
        stats.data["gauges"] = dict(gauges)
        return None if stats.is_empty() else stats

    def reset(self) -> None:
        self.data = {"nixl": NixlKVConnectorStats().data, "counts": {}, "gauges": {}}

    def _nixl(self) -> NixlKVConnectorStats:
        return NixlKVConnectorStats(data=self.data["nixl"])

    def aggregate(self, other: KVConnectorStats) -> KVConnectorStats:
        self.data["nixl"] = self._nixl().aggregate(NixlKVConnectorStats(data=other.data["nixl"])).data
        counts = self.data["counts"]
        for name, count in other.data["counts"].items():
            counts[name] = counts.get(name, 0) + count
        self.data["gauges"] |= other.data["gauges"]
        return self

    def reduce(self) -> dict[str, int | float]:
        return {
            **self._nixl().reduce(),
            **{name.replace("_", " "): round(count, 3) for name, count in self.data["counts"].items()},
        }

    def is_empty(self) -> bool:
        return not self.data["counts"] and not self.data["gauges"] and self._nixl().is_empty()


class AdrenalinePromMetrics(KVConnectorPromMetrics):
    """The metrics of an engine: `vllm:adrenaline_<counter>_total`, `vllm:adrenaline_<gauge>`, placements, NIXL's."""

    def __init__(self, vllm_config: Any, metric_types: Any, labelnames: list[str], per_engine_labelvalues: Any) -> None:
        super().__init__(vllm_config, metric_types, labelnames, per_engine_labelvalues)
        self._nixl = NixlPromMetrics(vllm_config, metric_types, labelnames, per_engine_labelvalues)
        self._counters = self._of_each(self._counter_cls, COUNTERS)
        self._gauges = self._of_each(self._gauge_cls, GAUGES)
        self._placements = self._counter_cls(
            name="vllm:adrenaline_placements",
            documentation=PLACED,
            labelnames=[*labelnames, "placement", "reason"],
        )
        on_gpus = GPU_GAUGES if Options.of(vllm_config).experimental_cuda else {}
        self._gpu_gauges = {
            name: self._gauge_cls(name=f"vllm:adrenaline_{name}", documentation=text, labelnames=[*labelnames, "gpu"])
            for name, text in on_gpus.items()
        }

    def _of_each(self, kind: Any, described: Mapping[str, str]) -> dict[str, Any]:
        return {
            name: create_metric_per_engine(
                kind(name=f"vllm:adrenaline_{name}", documentation=text, labelnames=self._labelnames),
                self.per_engine_labelvalues,
            )
            for name, text in described.items()
        }

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        self._nixl.observe(transfer_stats_data["nixl"], engine_idx)
        for name, count in transfer_stats_data["counts"].items():
            if name.startswith(PLACEMENTS):
                labels = [*self.per_engine_labelvalues[engine_idx], *name.removeprefix(PLACEMENTS).split("/")]
                self._placements.labels(*labels).inc(count)
            else:
                self._counters[name][engine_idx].inc(count)
        for key, value in transfer_stats_data["gauges"].items():
            name, _, gpu = key.partition("/")
            if gpu:
                self._gpu_gauges[name].labels(*self.per_engine_labelvalues[engine_idx], gpu).set(value)
            else:
                self._gauges[name][engine_idx].set(value)
