"""`adrenaline status` says what engines do, from their metrics."""

from __future__ import annotations

import http.server
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from vllm_adrenaline import cli
from vllm_adrenaline.launch.status import of_engine
from vllm_adrenaline.proxy.snapshot import Snapshot

TEXT = """\
# HELP vllm:num_requests_running Running.
vllm:num_requests_running{engine="0",model_name="m"} 12.0
vllm:kv_cache_usage_perc{engine="0",model_name="m"} 0.75
vllm:adrenaline_local_rows{engine="0",model_name="m"} 7.0
vllm:adrenaline_offloaded_rows{engine="0",model_name="m"} 5.0
vllm:adrenaline_executor_failures_total{engine="0",model_name="m"} 3.0
vllm:adrenaline_unavailable_executors{engine="0",model_name="m"} 1.0
vllm:adrenaline_offload_bound_ratio{engine="0",model_name="m"} 1.25
vllm:adrenaline_local_attention_seconds_per_token{engine="0",model_name="m"} 2.5e-06
vllm:adrenaline_placements_total{engine="0",model_name="m",placement="local",reason="fits"} 30.0
vllm:adrenaline_placements_total{engine="0",model_name="m",placement="offloaded",reason="local_full"} 70.0
"""


@contextmanager
def serving(pages: dict[str, str]) -> Iterator[str]:
    """Serve these pages, and status 404 for all others; give the address."""

    class Pages(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200 if self.path in pages else 404)
            self.end_headers()
            self.wfile.write(pages.get(self.path, "").encode())

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Pages)
    threading.Thread(target=server.serve_forever, args=[0.01], daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.fixture
def engine() -> Iterator[str]:
    with serving({"/metrics": TEXT}) as url:
        yield url


def test_every_decision_is_shown_by_kind_and_reason(engine: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["status", engine]) == 0
    shown = capsys.readouterr().out
    assert "12 running" in shown
    assert "7 local, 5 offloaded (bound 1.25)" in shown
    assert "3 failures so far, 1 not used at present" in shown
    assert [line.split() for line in shown.splitlines() if "local_full" in line] == [["offloaded", "local_full", "70"]]


def test_json_is_the_same_for_programs(engine: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["status", "--json", engine, engine]) == 0
    first, second = json.loads(capsys.readouterr().out)
    assert first == second
    assert first["local_us_per_token"] == 2.5
    assert {p["reason"]: p["count"] for p in first["placements"]} == {"fits": 30, "local_full": 70}


def test_an_engine_without_the_plugin_has_no_placements() -> None:
    status = of_engine("x", Snapshot("vllm:num_requests_running 3.0\n"))
    assert status["running"] == 3
    assert status["placements"] == []
    assert "local_rows" not in status


def test_no_engine_there_is_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["status", "http://127.0.0.1:1"]) == 1
    assert capsys.readouterr().err.startswith("adrenaline: no engine answers at http://127.0.0.1:1/metrics")


def test_labels_are_read_as_prometheus_writes_them() -> None:
    text = 'vllm:a_total{model="with \\"quotes\\", a comma and a }",rank="0"} 2.0\n'
    text += 'vllm:a_total{model="b",rank="1"} 3e2\n'
    assert Snapshot(text).labelled("vllm:a_total") == [
        ({"model": 'with "quotes", a comma and a }', "rank": "0"}, 2.0),
        ({"model": "b", "rank": "1"}, 300.0),
    ]
    assert Snapshot(text).value("vllm:a_total") == 302


def test_a_server_that_is_no_engine_is_one_sentence(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with serving({"/metrics": "<html>\n<body>hello</body>\n</html>\n"}) as engine:
        assert cli.main(["status", engine]) == 1
    assert capsys.readouterr().err.startswith(f"adrenaline: no engine answers at {engine}/metrics")
