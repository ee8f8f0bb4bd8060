"""Spans of OpenTelemetry for what becomes of a request, in the trace that its client began.

With `--otlp-traces-endpoint` the engine core has vLLM's tracer, and a request has the trace headers of its client. Then
each state of a request (request.py) is a span, written when the next one begins; nothing is done for a step or a layer.
Without the flag vLLM drops the headers. Checked against vllm/tracing of 0.32 (run).
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any, Protocol

from vllm_adrenaline.placement.batch import Progress

PREFIX = "adrenaline"
NAMES = {
    "claiming": "claim",
    "waiting": "placement",
    "offloaded": "remote_attention",
    "migrating": "migration",
    "pulling": "pull",
}
"""The spans of states. A request that is attended in mapped memory is in `mapped_attention`."""
HOLDS_LEASE = ("waiting", "offloaded", "migrating", "pulling")
"""States in which the prefill engine keeps blocks for a request. All of them together are the span `lease`."""


class Traced(Protocol):
    """What spans say of a request (request.py, RemoteRequest)."""

    is_mapped: bool

    @property
    def name(self) -> str: ...
    @property
    def executor(self) -> int: ...
    @property
    def progress(self) -> Progress: ...


class Spans:
    """The spans of one request. A moment is in nanoseconds since the epoch."""

    def __init__(self, headers: Mapping[str, str]) -> None:
        from vllm import tracing

        self._write, self._context = tracing.instrument_manual, tracing.extract_trace_context(headers)
        self._began, self._leased = time.time_ns(), 0

    @classmethod
    def of(cls, request: Any) -> Spans | None:
        """Return those of a request of vLLM's; None if nobody traces it."""
        headers = getattr(request, "trace_headers", None)
        return cls(headers) if headers else None

    def change(self, request: Traced, before: str, state: str) -> None:
        """Write what ends when a request goes on from the state `before` to the next one."""
        now = time.time_ns()
        if (name := NAMES.get(before)) is not None:
            name = "mapped_attention" if before == "offloaded" and request.is_mapped else name
            self._span(name, self._began, now, request, {f"{PREFIX}.then": state})
        if state in HOLDS_LEASE and not self._leased:
            self._leased = now
        elif state not in HOLDS_LEASE and self._leased:
            self._span("lease", self._leased, now, request, {})
            self._leased = 0
        self._began = now

    def _span(self, name: str, began: int, ended: int, request: Traced, attributes: Mapping[str, Any]) -> None:
        common = {
            "gen_ai.request.id": request.name,
            f"{PREFIX}.executor": request.executor,
            f"{PREFIX}.tokens": request.progress.tokens,
        }
        self._write(f"{PREFIX}.{name}", began, ended, {**common, **attributes}, self._context)
