"""What watches over a cluster, on real engines: dashboard, page, top, doctor, collect-env and traces."""

from __future__ import annotations

import gzip
import http.server
import json
import threading
import time
import urllib.request
from pathlib import Path

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from prometheus_client.parser import text_string_to_metric_families

from tests.engine.conftest import Client, Work, kv_bytes
from tests.unit.test_monitoring import asked
from vllm_adrenaline import cli
from vllm_adrenaline.engine.metrics import GPU_GAUGES
from vllm_adrenaline.launch.cluster import Cluster
from vllm_adrenaline.launch.engine_metrics import get_page

BLOCKS = 64
ARGS = ["--dtype", "float32", "--enforce-eager", "--max-model-len", "1024", "--kv-cache-memory-bytes", kv_bytes(BLOCKS)]


def scraped(url: str) -> set[str]:
    """Return the names of all metrics at an address."""
    families = text_string_to_metric_families(get_page(url, "/metrics").decode())
    return {sample.name for family in families for sample in family.samples}


@pytest.mark.extended
def test_what_watches_over_a_cluster_finds_what_it_looks_for(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with Cluster(model, offload_ratio=1, args=ARGS, logs=tmp_path) as cluster:
        client = Client(cluster.url)
        client.model = str(model)
        assert len(client.complete([Work(list(range(5, 105)), 20)])[0].tokens) == 20

        there = scraped(cluster.url) | scraped(cluster.prefill_url) | scraped(cluster.decode_url)
        labelled = {"adrenaline_proxy_refused_total", "adrenaline_proxy_engine_failures_total"}  # there when they count
        on_gpus = {f"vllm:adrenaline_{name}" for name in GPU_GAUGES}  # not one of them on CPU, not even with a 0
        assert asked() - there - labelled == on_gpus

        told = json.loads(get_page(cluster.url, "/adrenaline/state"))
        engines = {each["name"]: each for each in told["engines"]}
        assert engines["decode-0"]["state"]["kv_blocks"] == engines["prefill-0"]["state"]["kv_blocks"] == BLOCKS
        assert engines["prefill-0"]["state"]["executor_share"] > 0
        placements = engines["decode-0"]["state"]["placements"]
        assert sum(each["count"] for each in placements if each["placement"] == "offloaded") == 1

        assert cli.main(["doctor", cluster.url]) == 0, capsys.readouterr().out
        assert cli.main(["top", cluster.url]) == 0
        assert cli.main(["collect-env", cluster.url]) == 0
        shown = capsys.readouterr().out
    assert "decode-0" in shown
    assert "prefill-0: running 0" in shown
    assert cluster.url.removeprefix("http://") not in shown


class Collector(http.server.ThreadingHTTPServer):
    """A collector of OpenTelemetry. `spans` has the trace and the name of each span that it was sent."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Posted)
        self.spans: set[tuple[str, str]] = set()
        threading.Thread(target=self.serve_forever, daemon=True).start()


class Posted(http.server.BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.headers.get("Content-Encoding") == "gzip":
            body = gzip.decompress(body)
        for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
            for scope in resource.scope_spans:
                self.server.spans |= {(span.trace_id.hex(), span.name) for span in scope.spans}  # type: ignore[attr-defined]
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@pytest.mark.extended
def test_the_trace_of_a_client_has_what_became_of_its_request(model: Path, tmp_path: Path) -> None:
    trace, collector = "0af7651916cd43dd8448eb211c80319c", Collector()
    endpoint = f"http://127.0.0.1:{collector.server_port}/v1/traces"
    args = [*ARGS, "--otlp-traces-endpoint", endpoint]
    env = {"OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "http/protobuf"}
    with Cluster(model, offload_ratio=1, args=args, env=env, logs=tmp_path) as cluster:
        body = {"model": str(model), "prompt": list(range(5, 105)), "max_tokens": 20, "ignore_eos": True}
        headers = {"Content-Type": "application/json", "traceparent": f"00-{trace}-b7ad6b7169203331-01"}
        request = urllib.request.Request(f"{cluster.url}/v1/completions", json.dumps(body).encode(), headers)
        with urllib.request.urlopen(request, timeout=120) as answer:
            assert answer.status == 200
        wanted = {(trace, f"adrenaline.{name}") for name in ("claim", "placement", "remote_attention", "lease")}
        wanted.add((trace, "llm_request"))  # vLLM's own
        deadline = time.monotonic() + 30  # engines send spans every five seconds
        while not wanted <= collector.spans and time.monotonic() < deadline:
            time.sleep(0.2)
    assert wanted - collector.spans == set(), sorted(collector.spans)
    collector.shutdown()
    collector.server_close()
