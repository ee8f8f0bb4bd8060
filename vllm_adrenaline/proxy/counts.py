"""What the proxy counts, for its own /metrics."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, generate_latest

PREFIX = "adrenaline_proxy"


class Counts:
    """The metrics of one proxy."""

    def __init__(self) -> None:
        registry = self._registry = CollectorRegistry()
        self.engines = Gauge(
            f"{PREFIX}_engines", "Engines behind the proxy. If high: nothing to do.", ["kind"], registry=registry
        )
        self.requests = Counter(
            f"{PREFIX}_engine_requests",
            "Requests that engines were asked. If high: nothing to do.",
            ["engine"],
            registry=registry,
        )
        self.outstanding = Gauge(
            f"{PREFIX}_engine_outstanding_tokens",
            "Tokens of the requests that engines have, as the proxy guesses them from bytes and limits. If high: on "
            "one engine only, look whether it is slower than the others; on all, add engines.",
            ["engine"],
            registry=registry,
        )
        self.under_way = Gauge(
            f"{PREFIX}_requests_under_way",
            "Requests that are being answered. If high: near --max-requests, further ones get 429.",
            registry=registry,
        )
        self.connections = Gauge(
            f"{PREFIX}_connections",
            "Open connections of clients. If high: near --max-connections, silent ones are closed.",
            registry=registry,
        )
        self.refused = Counter(
            f"{PREFIX}_refused",
            "Requests and connections that a limit ended, by limit. If high: raise the limit, or look who sends them.",
            ["reason"],
            registry=registry,
        )
        self.without_prefill = Counter(
            f"{PREFIX}_without_prefill",
            "Requests whose prompts no prefill engine could compute. If high: look whether prefill engines run.",
            registry=registry,
        )
        self.whole = Counter(
            f"{PREFIX}_not_disaggregated",
            "Requests for which one prompt's KV cache is not enough; a decode engine did all of them. If high: clients "
            "ask for several answers or prompts at once, or for prompt_logprobs.",
            registry=registry,
        )
        self.failures = Counter(
            f"{PREFIX}_engine_failures",
            "Requests to engines that were not answered as they should be. If high: the proxy's log says which engine.",
            ["kind", "what"],
            registry=registry,
        )

    def totals(self) -> dict[str, float]:
        """Return each of them, without the prefix, added up over its labels."""
        families = self._registry.collect()
        return {
            family.name.removeprefix(f"{PREFIX}_"): sum(
                each.value for each in family.samples if not each.name.endswith("_created")
            )
            for family in families
        }

    def text(self) -> bytes:
        """Return all of them in the text format of Prometheus."""
        return generate_latest(self._registry)
