"""The metrics of an engine, read from outside over HTTP."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property

from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

from vllm_adrenaline.errors import AdrenalineError
from vllm_adrenaline.proxy.limits import api_key
from vllm_adrenaline.system import http_get

TIMEOUT_S = 10
KV_USED = "vllm:kv_cache_usage_perc"
PLACEMENTS = "vllm:adrenaline_placements_total"


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

    def value(self, name: str) -> float:
        """Return a metric, added up over its labels; 0 if the engine does not have it."""
        return sum(value for _, value in self.labelled(name))

    def labelled(self, metric: str) -> list[tuple[dict[str, str], float]]:
        """Return every sample of a metric with its labels.

        Only its own lines are parsed. A whole page takes 24 ms, on cores that the engines need.
        """
        lines = "".join(f"{line}\n" for line in self._text.splitlines() if line.startswith(metric))
        return [(dict(each.labels), float(each.value)) for each in _samples(lines) if each.name == metric]

    def placements(self) -> dict[tuple[str, str], float]:
        """Return how often the plugin decided what, by placement and reason."""
        return {(each["placement"], each["reason"]): count for each, count in self.labelled(PLACEMENTS)}


def get_page(url: str, path: str) -> bytes:
    """Return a page of an engine, or of a proxy that may want the API key.

    Raises OSError or ValueError when there is none.
    """
    key = api_key(None)
    headers = {} if key is None else {"Authorization": f"Bearer {key}"}
    status, page = http_get.get(url, path, TIMEOUT_S, headers)
    if status != 200:
        raise ValueError(f"status {status}")
    return page


class EngineMetrics:
    """The metrics of one engine, read anew at every call."""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")

    def text(self) -> str:
        """Return the page itself. Raises OSError or ValueError when there is none."""
        return get_page(self.url, "/metrics").decode()

    def read(self) -> Snapshot:
        """Return all metrics. Raises AdrenalineError when no engine answers within ten seconds."""
        try:
            text = self.text()
            if "\nvllm:" not in text:
                raise ValueError("what is there has no metrics of vLLM")
            return Snapshot(text)
        except (OSError, ValueError) as error:
            raise AdrenalineError(f"no engine answers at {self.url}/metrics: {error}") from None

    def _now(self) -> Snapshot:
        try:
            return self.read()
        except AdrenalineError:
            return Snapshot("")

    def value(self, name: str) -> float:
        """Return the sum of a metric over its labels; 0 if the engine does not have it."""
        return self._now().value(name)

    def all(self) -> dict[str, float]:
        """Return every metric by name, added up over its labels."""
        return self._now().values

    def blocks(self) -> int:
        """Return how many KV blocks the engine has."""
        infos = [labels for labels, _ in self._now().labelled("vllm:cache_config_info")]
        return int(infos[0]["num_gpu_blocks"]) if infos else 0

    def offloaded(self) -> int:
        """Return how many requests had their attention run elsewhere so far."""
        return int(self.value("vllm:adrenaline_offloaded_requests_total"))
