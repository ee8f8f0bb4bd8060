"""`adrenaline up` starts again what ends: when, how often, and what the proxy serves meanwhile. Fake engines."""

from __future__ import annotations

import errno
import http.client
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.test_launch import wait_until
from vllm_adrenaline.errors import AdrenalineError
from vllm_adrenaline.launch import engine_command, restarts
from vllm_adrenaline.launch.cluster import Cluster
from vllm_adrenaline.launch.engine_command import EngineCommand
from vllm_adrenaline.launch.process import group_members
from vllm_adrenaline.launch.recovery import Recovery
from vllm_adrenaline.launch.restarts import Restarts
from vllm_adrenaline.launch.supervisor import Supervisor
from vllm_adrenaline.proxy.limits import Limits
from vllm_adrenaline.system import http_get

# Serves at a Unix socket, as an engine does: a prefill engine that keeps nothing, or a decode engine.
ENGINE = """
import http.server, json, socketserver, sys
class Handler(http.server.BaseHTTPRequestHandler):
    def answer(self, content):
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)
    def do_GET(self):
        self.answer(b"")
    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        self.answer(json.dumps({"kv_transfer_params": None, "by": sys.argv[2]}).encode())
    def address_string(self):
        return "client"
class Server(socketserver.ThreadingUnixStreamServer):
    request_queue_size = 100
Server(sys.argv[1], Handler).serve_forever()
"""


def fake_engine(name: str, model: str, path: Path, args: object, env: dict[str, str]) -> EngineCommand:
    return EngineCommand(name, f"unix:{path}", [sys.executable, "-c", ENGINE, str(path), name], env)


def complete(url: str) -> tuple[int, str]:
    """Return the status of a request, and who answered it or what is wrong."""
    body = json.dumps({"model": "m", "prompt": "x", "max_tokens": 1}).encode()
    try:
        with urllib.request.urlopen(f"{url}/v1/completions", body, timeout=10) as answer:
            return answer.status, json.loads(answer.read())["by"]
    except urllib.error.HTTPError as error:
        with error:
            retry = f", retry after {error.headers['Retry-After']}"
            return error.code, json.loads(error.read())["error"]["message"] + retry


# The policy


def test_the_pause_doubles_and_begins_anew_after_a_time_that_went_well() -> None:
    policy = Restarts()
    assert [policy.pause(now, ready) for now, ready in ((0, 0), (10, 5), (20, 5))] == [1, 2, 4]
    assert policy.pause(400, restarts.WELL_S) == 1
    assert policy.pause(410, 0) == 2


def test_so_many_ends_in_so_long_a_time_are_too_many() -> None:
    policy = Restarts()
    assert [policy.pause(float(now), 0) is None for now in range(restarts.LIMIT + 1)] == [False] * restarts.LIMIT + [
        True
    ]
    policy = Restarts()
    apart = restarts.WITHIN_S / restarts.LIMIT
    assert all(policy.pause(number * apart, 0) is not None for number in range(50))


@given(st.lists(st.tuples(st.floats(0, 1000), st.floats(0, 1000)), max_size=30))
def test_pauses_are_bounded_and_what_ends_too_often_is_given_up(ends: list[tuple[float, float]]) -> None:
    policy, now, times = Restarts(), 0.0, []
    for apart, ready in ends:
        now += apart
        times.append(now)
        recent = sum(now - each < restarts.WITHIN_S for each in times)
        pause = policy.pause(now, ready)
        assert (pause is None) == (recent > restarts.LIMIT)
        assert pause is None or restarts.FIRST_PAUSE_S <= pause <= restarts.LONGEST_PAUSE_S


# Processes


def until_ready_again(recovery: Recovery, capsys: pytest.CaptureFixture[str]) -> str:
    """Watch over a process until it is back; return what was said meanwhile."""
    said, began = "", time.monotonic()
    while "ready again" not in said:
        recovery.step()
        said += capsys.readouterr().out
        assert time.monotonic() - began < 20
        time.sleep(0.02)
    return said


def test_an_engine_that_ends_is_started_again_and_its_last_log_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(restarts, "FIRST_PAUSE_S", 0.1)
    spec = fake_engine("decode", "", tmp_path / "d.http", None, {})
    with Supervisor([spec], logs=tmp_path) as supervisor:
        recovery = Recovery(supervisor)
        first = supervisor.processes["decode"]
        (tmp_path / "decode.log").write_text("the first life\n")
        os.kill(first.pid, signal.SIGKILL)  # its socket stays behind
        until_ready_again(recovery, capsys)
        assert supervisor.processes["decode"].pid != first.pid
        assert (tmp_path / "decode.log.1").read_text() == "the first life\n"
        supervisor.check()


def test_a_start_that_the_system_refuses_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(restarts, "FIRST_PAUSE_S", 0.05)
    spec = fake_engine("decode", "", tmp_path / "d.http", None, {})
    with Supervisor([spec], logs=tmp_path) as supervisor:
        recovery, launch = Recovery(supervisor), supervisor.launch
        refusals = [OSError(errno.EAGAIN, "Resource temporarily unavailable"), OSError(errno.ENOSPC, "No space left")]

        def start(spec: EngineCommand) -> None:
            if refusals:
                raise refusals.pop(0)
            launch(spec)

        monkeypatch.setattr(supervisor, "launch", start)
        os.kill(supervisor.processes["decode"].pid, signal.SIGKILL)
        said = until_ready_again(recovery, capsys)
    assert "the decode engine cannot be started: [Errno 11] Resource temporarily unavailable" in said


def test_what_ends_too_often_is_given_up_with_the_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(restarts, "FIRST_PAUSE_S", 0.01)
    monkeypatch.setattr("vllm_adrenaline.launch.recovery.GROUP_S", 0.0)
    spec = EngineCommand("decode", "unix:/nowhere", [sys.executable, "-c", "raise ValueError('no memory')"])
    supervisor = Supervisor([spec], logs=tmp_path)
    supervisor.launch(spec)
    recovery = Recovery(supervisor)

    def watch() -> None:
        while True:
            recovery.step()
            time.sleep(0.01)

    with pytest.raises(AdrenalineError) as error:
        watch()
    supervisor.stop()
    assert str(error.value).splitlines() == [
        "the decode engine ended more than 5 times in 10 minutes; the last time the decode engine ended with status 1; "
        f"its log: {tmp_path}/decode.log",
        "  | ValueError: no memory",
    ]


def test_a_start_that_stands_still_counts_as_an_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spec = EngineCommand("decode", "unix:/nowhere", [sys.executable, "-c", "import time; time.sleep(60)"])
    supervisor = Supervisor([spec], logs=tmp_path, silence_limit=0.2)
    supervisor.launch(spec)
    recovery = Recovery(supervisor)
    recovery._states["decode"].ready = None
    first = supervisor.processes["decode"]
    while first.exit_status is None:
        recovery.step()
        time.sleep(0.05)
    assert "the decode engine said nothing for 0 s, and is given up" in capsys.readouterr().out
    supervisor.stop()


# A cluster


@contextmanager
def cluster_of_fakes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, **options: object) -> Iterator[Cluster]:
    monkeypatch.setattr(engine_command, "vllm_server", fake_engine)
    (tmp_path / "logs").mkdir(exist_ok=True)
    with Cluster(tmp_path, offload_ratio=0.5, logs=tmp_path / "logs", **options) as cluster:  # type: ignore[arg-type]
        yield cluster


def test_what_is_left_serves_while_the_rest_is_started_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(restarts, "FIRST_PAUSE_S", 0.1)

    def again(name: str) -> None:
        def ready() -> bool:
            cluster.recover()
            state = cluster._recovery and cluster._recovery._states[name]
            return bool(state and state.ready is not None)

        wait_until(ready, 30)

    with cluster_of_fakes(tmp_path, monkeypatch) as cluster:
        assert complete(cluster.url) == (200, "decode")
        for name in ("prefill", "decode", "proxy"):
            process = cluster.processes[name]
            os.kill(process.pid, signal.SIGKILL)
            wait_until(lambda process=process: process.exit_status is not None)  # type: ignore[misc]
            if name == "prefill":
                assert complete(cluster.url) == (200, "decode")
                counts = http_get.get(cluster.url, "/metrics", 5)[1].decode()
                assert "adrenaline_proxy_without_prefill_total 1.0" in counts
            if name == "decode":
                status, message = complete(cluster.url)
                assert (status, re.sub("[0-9a-f]{32}", "ID", message)) == (
                    503,
                    "the decode engine does not answer (request ID), retry after 5",
                )
            cluster.recover()
            again(name)
            assert complete(cluster.url) == (200, "decode")
            assert cluster.processes[name].pid != process.pid


def test_two_clusters_beside_each_other_serve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with cluster_of_fakes(tmp_path, monkeypatch) as first, cluster_of_fakes(tmp_path, monkeypatch) as second:
        assert first.url != second.url
        assert complete(first.url) == complete(second.url) == (200, "decode")


def test_the_proxy_ends_when_its_starter_is_killed(tmp_path: Path) -> None:
    code = f"""
import time
from pathlib import Path
from vllm_adrenaline.launch import engine_command
from vllm_adrenaline.launch.supervisor import Supervisor
from vllm_adrenaline.proxy.limits import Limits
from vllm_adrenaline.proxy.server import bind
listener = bind("127.0.0.1", 0)
nobody = engine_command.EngineCommand("decode", "unix:/nowhere", [])
supervisor = Supervisor([engine_command.proxy(listener, {{"decode": [nobody], "prefill": [nobody]}}, Limits(), None)],
                        logs=Path({str(tmp_path)!r}))
supervisor.launch(supervisor.specs[0])
print(supervisor.processes["proxy"].pid, supervisor.specs[0].url, flush=True)
time.sleep(60)
"""
    starter = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert starter.stdout is not None
    pid, url = next(line for line in starter.stdout if line[0].isdigit()).split()

    def lives() -> bool:
        try:
            return http_get.get(url, "/live", 2)[0] == 200
        except OSError:
            return False

    wait_until(lives, 30)
    starter.kill()
    starter.communicate()
    wait_until(lambda: not group_members(int(pid)), 20)
    assert not lives()


# Memory


NESTED = b'{"model": "m", "x": [' + b"[]," * ((8 << 20) // 3 - 100) + b'[]], "prompt": "x"}'
MANY_FIELDS = b"{" + b",".join(b'"%07d":1' % number for number in range((8 << 20) // 13)) + b"}"


def peak_mib(pid: int) -> float:
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) / 1024


def test_a_flood_of_large_bodies_keeps_the_proxy_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    statuses: list[int] = []

    def flood(url: str, body: bytes) -> None:
        host, port = url.removeprefix("http://").split(":")
        connection = http.client.HTTPConnection(host, int(port), timeout=60)
        try:
            connection.request("POST", "/v1/completions", body)
            statuses.append(connection.getresponse().status)
        except OSError:  # told 429 while it was sending
            statuses.append(429)
        finally:
            connection.close()

    with cluster_of_fakes(tmp_path, monkeypatch, limits=Limits()) as cluster:
        pid = cluster.processes["proxy"].pid
        before = peak_mib(pid)
        for body in (NESTED, MANY_FIELDS):
            threads = [threading.Thread(target=flood, args=[cluster.url, body]) for _ in range(16)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        print(f"{before:.0f} MiB before, {peak_mib(pid):.0f} MiB at most; answers {statuses}")
        assert {200, 400} <= set(statuses) <= {200, 400, 429}
        assert peak_mib(pid) < 512
        assert complete(cluster.url) == (200, "decode")
