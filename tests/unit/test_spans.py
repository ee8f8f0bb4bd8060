"""What becomes of a traced request is spans in the trace that its client began; others cost nothing."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from vllm_adrenaline.decode.blocks import RemotePool
from vllm_adrenaline.decode.request import RemoteRequest, State

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
HEADERS = {"traceparent": f"00-{TRACE}-{PARENT}-01"}


@dataclass
class Request:
    request_id: str = "r"
    num_prompt_tokens: int = 10
    num_output_tokens: int = 3
    max_tokens: int = 20
    trace_headers: dict[str, str] | None = field(default_factory=lambda: dict(HEADERS))


@pytest.fixture
def exported(monkeypatch: pytest.MonkeyPatch) -> Iterator[InMemorySpanExporter]:
    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(trace, "get_tracer", provider.get_tracer)
    yield exporter
    provider.shutdown()


def through(request: Request, *states: State, is_mapped: bool = False) -> None:
    client: Any = object()
    made = RemoteRequest(request, RemotePool(2, client), "claim", is_mapped=is_mapped)  # type: ignore[arg-type]
    for state in states:
        made.become(state)


def test_each_state_is_a_span_and_the_lease_is_one_of_all_in_which_blocks_are_kept(
    exported: InMemorySpanExporter,
) -> None:
    through(Request(), State.WAITING, State.OFFLOADED, State.MIGRATING, State.PULLING, State.RECEIVED, State.LEFT)
    spans = {span.name.removeprefix("adrenaline."): span for span in exported.get_finished_spans()}
    assert list(spans) == ["claim", "placement", "remote_attention", "migration", "pull", "lease"]
    for span in spans.values():
        assert f"{span.context.trace_id:032x}" == TRACE
        assert span.parent is not None
        assert f"{span.parent.span_id:016x}" == PARENT
        assert span.attributes is not None
        assert (span.attributes["gen_ai.request.id"], span.attributes["adrenaline.executor"]) == ("r", 2)
        assert span.attributes["adrenaline.tokens"] == 13
    order = [spans[name] for name in ("claim", "placement", "remote_attention", "migration", "pull")]
    assert [span.end_time for span in order[:-1]] == [span.start_time for span in order[1:]], "without gaps"
    assert spans["lease"].start_time == spans["claim"].end_time
    assert spans["lease"].end_time == spans["pull"].end_time
    assert spans["remote_attention"].attributes["adrenaline.then"] == "migrating"


def test_mapped_attention_has_a_name_of_its_own(exported: InMemorySpanExporter) -> None:
    through(Request(), State.WAITING, State.OFFLOADED, State.LEFT, is_mapped=True)
    names = [span.name for span in exported.get_finished_spans()]
    assert names == ["adrenaline.claim", "adrenaline.placement", "adrenaline.mapped_attention", "adrenaline.lease"]


def test_a_claim_that_is_not_granted_has_no_lease(exported: InMemorySpanExporter) -> None:
    through(Request(), State.LEFT)
    assert [span.name for span in exported.get_finished_spans()] == ["adrenaline.claim"]


@pytest.mark.parametrize("headers", [None, {}])
def test_a_request_that_nobody_traces_has_no_spans(
    exported: InMemorySpanExporter, headers: dict[str, str] | None
) -> None:
    through(Request(trace_headers=headers), State.WAITING, State.OFFLOADED, State.LEFT)
    assert exported.get_finished_spans() == ()
