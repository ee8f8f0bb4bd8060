"""What an engine says of itself at one moment, from its /metrics: for the proxy's page and for commands."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import Any

from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

OURS = "vllm:adrenaline_"
KV_USED = "vllm:kv_cache_usage_perc"
PLACEMENTS = f"{OURS}placements_total"
ENGINE = {
    "running": "vllm:num_requests_running",
    "waiting": "vllm:num_requests_waiting",
    "kv_used": KV_USED,
}
DECODE = {
    "local_rows": f"{OURS}local_rows",
    "offloaded_rows": f"{OURS}offloaded_rows",
    "mapped_rows": f"{OURS}mapped_rows",
    "borrowed_blocks": f"{OURS}borrowed_blocks",
    "bound": f"{OURS}offload_bound_ratio",
    "local_us_per_token": f"{OURS}local_attention_seconds_per_token",
    "remote_us_per_token": f"{OURS}remote_attention_seconds_per_token",
    "moved": f"{OURS}moved_requests_total",
    "recomputed": f"{OURS}fallback_requests_total",
    "refused": f"{OURS}refused_params_total",
    "exposed_wait_s": f"{OURS}exposed_wait_seconds_total",
    "executor_failures": f"{OURS}executor_failures_total",
    "unavailable_executors": f"{OURS}unavailable_executors",
    "executor_share": f"{OURS}executor_share",
}
"""What engines with the plugin have besides."""
COUNTERS = {
    "output_tokens": "vllm:generation_tokens_total",
    "ttft_s": "vllm:time_to_first_token_seconds_sum",
    "ttft_count": "vllm:time_to_first_token_seconds_count",
    "tpot_s": "vllm:inter_token_latency_seconds_sum",
    "tpot_count": "vllm:inter_token_latency_seconds_count",
    "exposed_wait_s": DECODE["exposed_wait_s"],
}
"""What rates are made of (Recent)."""


def _samples(text: str) -> Iterator[Sample]:
    return (sample for family in text_string_to_metric_families(text) for sample in family.samples)


class Snapshot:
    """The metrics of an engine at one moment.

    `text` is the body of /metrics. What is read of it raises ValueError if it is something else.
    """

    def __init__(self, text: str) -> None:
        self._text = text

    @cached_property
    def values(self) -> dict[str, float]:
        """Every metric by name, added up over its labels."""
        values: dict[str, float] = {}
        for sample in _samples(self._text):
            values[sample.name] = values.get(sample.name, 0.0) + float(sample.value)
        return values

    @cached_property
    def _lines(self) -> dict[str, str]:
        """The lines of each metric."""
        found: dict[str, list[str]] = {}
        for line in self._text.splitlines():
            if line and not line.startswith("#"):
                found.setdefault(line.partition(" ")[0].partition("{")[0], []).append(f"{line}\n")
        return {name: "".join(lines) for name, lines in found.items()}

    def value(self, name: str) -> float:
        """Return a metric, added up over its labels; 0 if the engine does not have it."""
        return sum(value for _, value in self.labelled(name))

    def labelled(self, metric: str) -> list[tuple[dict[str, str], float]]:
        """Return every sample of a metric with its labels.

        Only its own lines are parsed. A whole page takes 24 ms, on cores that the engines need.
        """
        return [(dict(each.labels), float(each.value)) for each in _samples(self._lines.get(metric, ""))]

    def placements(self) -> dict[tuple[str, str], float]:
        """Return how often the plugin decided what, by placement and reason."""
        return {(each["placement"], each["reason"]): count for each, count in self.labelled(PLACEMENTS)}

    def blocks(self) -> int:
        """Return how many KV blocks the engine has; 0 if it does not say."""
        return self._cache_config("num_gpu_blocks") or 0

    def room(self) -> int | None:
        """Return the tokens of KV that the engine has room for: its own memory, and what executors could attend.

        None if it does not say how much memory it has.
        """
        size, blocks = self._cache_config("block_size"), self.blocks()
        if size is None or not blocks:
            return None
        own = blocks * (1.0 - min(1.0, max(0.0, self.value(KV_USED))))
        return size * int(own + self.value(f"{OURS}lendable_blocks"))

    def _cache_config(self, name: str) -> int | None:
        """Return a number of vLLM's cache configuration; None if the engine does not say it."""
        infos = [labels for labels, _ in self.labelled("vllm:cache_config_info")]
        said = infos[0].get(name, "") if infos else ""
        return int(said) if said.isdecimal() else None

    @property
    def has_plugin(self) -> bool:
        """Say whether the engine runs with the plugin."""
        return f"{OURS}local_rows" in self._lines

    def state(self) -> dict[str, Any]:
        """Return what the engine does, as plain data: what all engines have, DECODE with the plugin, placements."""
        found: dict[str, Any] = {name: self.value(metric) for name, metric in ENGINE.items()}
        found["kv_blocks"] = self.blocks()
        if self.has_plugin:
            found |= {name: self.value(metric) for name, metric in DECODE.items()}
            for name in ("local_us_per_token", "remote_us_per_token"):
                found[name] *= 1e6
        found["placements"] = [
            {"placement": placement, "reason": reason, "count": int(count)}
            for (placement, reason), count in sorted(self.placements().items(), key=lambda sample: -sample[1])
        ]
        return found

    def counters(self) -> dict[str, float]:
        """Return COUNTERS."""
        return {name: self.value(metric) for name, metric in COUNTERS.items()}


class Recent:
    """The counters of one engine over the last seconds, for what it does a second and how long that takes."""

    SPAN_S = 10.0

    def __init__(self) -> None:
        self._seen: deque[tuple[float, Mapping[str, float]]] = deque()

    def rates(self, now: float, counters: Mapping[str, float]) -> dict[str, float | None]:
        """Note the counters and return what they grew by since the oldest of the last ten seconds.

        Args:
            now: seconds of a clock that does not jump.
            counters: of `Snapshot.counters`.

        Returns:
            `output_tok_s`; `ttft_ms` and `tpot_ms`, means over the requests and tokens of that time; `exposed_share`,
            of the time that the engine waited for executors with nothing else to do. None where nothing is known.
        """
        if self._seen and any(counters[name] < value for name, value in self._seen[-1][1].items()):
            self._seen.clear()  # the engine was started again
        self._seen.append((now, counters))
        while len(self._seen) > 2 and self._seen[1][0] <= now - self.SPAN_S:
            self._seen.popleft()
        began, before = self._seen[0]
        grown = {name: value - before[name] for name, value in counters.items()}
        seconds = now - began
        return {
            "output_tok_s": grown["output_tokens"] / seconds if seconds else None,
            "exposed_share": grown["exposed_wait_s"] / seconds if seconds else None,
            "ttft_ms": 1e3 * grown["ttft_s"] / grown["ttft_count"] if grown["ttft_count"] else None,
            "tpot_ms": 1e3 * grown["tpot_s"] / grown["tpot_count"] if grown["tpot_count"] else None,
        }
