"""The launcher without vLLM: its checks, its processes (dummy commands), and that nothing is left of them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import pytest

from vllm_adrenaline import cli
from vllm_adrenaline.errors import AdrenalineError
from vllm_adrenaline.launch import engine_command
from vllm_adrenaline.launch.cluster import Cluster
from vllm_adrenaline.launch.engine_command import EngineCommand
from vllm_adrenaline.launch.process import EngineProcess, group_members, meaningful_lines
from vllm_adrenaline.launch.supervisor import Supervisor
from vllm_adrenaline.proxy.server import bind
from vllm_adrenaline.system import http_get
from vllm_adrenaline.system.ports import reserve_ports

# Has a child that ignores SIGTERM, as a hanging worker would.
STUBBORN_FAMILY = """
import signal, subprocess, sys, time
code = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('child', flush=True); time.sleep(60)"
child = subprocess.Popen([sys.executable, "-c", code])
time.sleep(60)
"""
SERVER = """
import http.server, os, socketserver, sys
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
    def address_string(self):
        return "client"
if sys.argv[1].isdigit():
    http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
socketserver.ThreadingUnixStreamServer(sys.argv[1], Handler).serve_forever()
"""


def at(port: int) -> str:
    return f"http://127.0.0.1:{port}"


def fake_engine(name: str, model: str, path: Path, args: object, env: dict[str, str]) -> EngineCommand:
    return EngineCommand(name, f"unix:{path}", [sys.executable, "-c", SERVER, str(path)], env)


def wait_until(condition: Callable[[], object], seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.02)


def run_cli(capsys: pytest.CaptureFixture[str], *args: str) -> tuple[int, str]:
    status = cli.main(args)
    return status, capsys.readouterr().err


def test_port_in_use(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with bind("127.0.0.1", 0) as listener:
        listener.listen()
        port = str(listener.getsockname()[1])
        status, error = run_cli(capsys, "up", str(tmp_path), "--port", port)
    assert (status, error) == (1, f"adrenaline: port {port} on 127.0.0.1 is in use; choose another with --port\n")


def test_missing_model(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    status, error = run_cli(capsys, "up", f"{tmp_path}/nothing")
    assert (status, error) == (1, f"adrenaline: there is no model at {tmp_path}/nothing\n")


@pytest.mark.parametrize("ratio", ["-0.1", "1.5", "nan"])
def test_ratio_out_of_range(capsys: pytest.CaptureFixture[str], tmp_path: Path, ratio: str) -> None:
    status, error = run_cli(capsys, "up", str(tmp_path), f"--offload-ratio={ratio}")
    assert status == 1
    assert error == f"adrenaline: --offload-ratio is {ratio}; it is auto, or a share of the requests, from 0 to 1\n"


def test_help_is_fast_and_imports_nothing_heavy() -> None:
    code = "import sys; from vllm_adrenaline import cli; cli.make_parser().format_help(); print(*sys.modules)"
    modules = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split()
    assert not {"torch", "vllm", "aiohttp", "starlette", "uvicorn"} & set(modules)


def test_unknown_flags_go_to_engines_and_role_flags_stay_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[Namespace, list[str]]] = []

    def run(options: Namespace, rest: list[str]) -> int:
        seen.append((options, rest))
        return 0

    monkeypatch.setattr("vllm_adrenaline.launch.up.run", run)
    assert cli.main(["up", "m", "--dtype", "float32", "--decode-args", "--enforce-eager", "--port", "1"]) == 0
    options, rest = seen[0]
    assert rest == ["--dtype", "float32"]
    assert (options.decode_args, options.port) == ("--enforce-eager", 1)


STUBBORN_WITH_SEMAPHORES = """
import multiprocessing, signal, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
held = [multiprocessing.get_context("spawn").Semaphore() for _ in range(5)]
print(*(each._semlock.name for each in held), flush=True)
time.sleep(100)
"""


def test_a_killed_process_leaves_no_semaphore_behind(tmp_path: Path) -> None:
    process = EngineProcess("s", [sys.executable, "-c", STUBBORN_WITH_SEMAPHORES], dict(os.environ), tmp_path / "log")
    wait_until(lambda: (tmp_path / "log").read_text().endswith("\n"))
    made = [Path(f"/dev/shm/sem.{name.removeprefix('/')}") for name in (tmp_path / "log").read_text().split()]
    assert [path.exists() for path in made] == [True] * 5
    process.terminate()
    process._shm.clear()  # as if they had been made after it was told to stop
    process.finish(time.monotonic())
    assert [path.exists() for path in made] == [False] * 5


def test_stop_kills_the_whole_group(tmp_path: Path) -> None:
    process = EngineProcess("dummy", [sys.executable, "-c", STUBBORN_FAMILY], dict(os.environ), tmp_path / "log")
    wait_until(lambda: "child" in process.log.read_text())
    assert len(group_members(process.pid)) == 2
    process.terminate()
    process.finish(time.monotonic() + 0.3)
    assert group_members(process.pid) == []
    assert process.exit_status is not None


def test_shared_memory_of_killed_processes_is_removed(tmp_path: Path) -> None:
    name = f"/dev/shm/psm_adrenaline{os.getpid()}"
    code = f"""
import mmap, signal, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
file = open({name!r}, "w+b"); file.truncate(4096); memory = mmap.mmap(file.fileno(), 4096)
print("mapped", flush=True); time.sleep(60)
"""
    process = EngineProcess("dummy", [sys.executable, "-c", code], dict(os.environ), tmp_path / "log")
    wait_until(lambda: "mapped" in process.log.read_text())
    process.terminate()
    process.finish(time.monotonic())
    assert not Path(name).exists()


def test_engine_ends_when_its_parent_is_killed(tmp_path: Path) -> None:
    code = f"""
import os, sys, time
from pathlib import Path
from vllm_adrenaline.launch.engine_command import EngineCommand
from vllm_adrenaline.launch.process import EngineProcess
command = [sys.executable, "-c", "import time; time.sleep(60)"]
process = EngineProcess("d", command, dict(os.environ), Path({str(tmp_path / "log")!r}))
print(process.pid, flush=True)
time.sleep(60)
"""
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    engine = int(parent.stdout.readline())
    time.sleep(0.5)
    assert group_members(engine)
    parent.send_signal(signal.SIGKILL)
    parent.communicate()
    wait_until(lambda: not group_members(engine))


def test_engine_that_ends_stops_the_others_and_says_why(tmp_path: Path) -> None:
    lasting = [sys.executable, "-c", "import time; time.sleep(60)"]
    failing = [sys.executable, "-c", "import time; time.sleep(1); raise ValueError('no such model')"]
    specs = [EngineCommand("decode", at(1), lasting), EngineCommand("prefill", at(1), failing)]
    supervisor = Supervisor(specs, logs=tmp_path)
    pids: list[int] = []
    original = supervisor.check

    def check() -> None:
        pids[:] = [process.pid for process in supervisor.processes.values()]
        original()

    supervisor.check = check  # type: ignore[method-assign]
    with pytest.raises(AdrenalineError) as error, supervisor:
        pass
    assert str(error.value).splitlines() == [
        f"the prefill engine ended with status 1; its log: {tmp_path}/prefill.log",
        "  | ValueError: no such model",
    ]
    assert len(pids) == 2
    assert [group_members(pid) for pid in pids] == [[], []]


def test_ready_when_healthy(tmp_path: Path) -> None:
    (port,) = reserve_ports(1)
    spec = EngineCommand("decode", at(port), [sys.executable, "-c", SERVER, str(port)])
    with Supervisor([spec], logs=tmp_path) as supervisor:
        supervisor.check()
        os.kill(supervisor.processes["decode"].pid, signal.SIGKILL)
        wait_until(lambda: supervisor.processes["decode"].exit_status is not None)
        with pytest.raises(AdrenalineError, match="was killed by SIGKILL"):
            supervisor.check()


@pytest.mark.parametrize("umask", [0o000, 0o077])
def test_cluster_leaves_no_folder_and_no_port_under_any_umask(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, umask: int
) -> None:
    monkeypatch.setattr(engine_command, "vllm_server", fake_engine)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    before = os.umask(umask)
    try:
        with Cluster(tmp_path, offload_ratio=0.5) as cluster:
            pids = [process.pid for process in cluster.processes.values()]
            (runtime,) = tmp_path.glob("adrenaline-*")
            assert runtime.stat().st_mode & 0o777 == 0o700
            assert {path.name for path in runtime.glob("*.http")} == {"prefill.http", "decode.http"}
            port = int(cluster.url.rpartition(":")[2])
            cluster.check()
            assert http_get.get(cluster.url, "/health", 5)[0] == 200
            assert http_get.get(cluster.decode_url, "/metrics", 5)[0] == 200
    finally:
        os.umask(before)
    made = [path for path in (tmp_path / "cache").rglob("*") if path.is_dir()]
    assert {path.stat().st_mode & 0o777 for path in made} == {0o700}
    assert not list(tmp_path.glob("adrenaline-*"))
    assert [group_members(pid) for pid in pids] == [[], [], []]
    bind("127.0.0.1", port).close()


def test_meaningful_lines_of_a_vllm_log() -> None:
    log = """\
(APIServer pid=7) INFO 11-20 22:13:22 [api_server.py:12] starting
(EngineCore pid=9) ERROR 11-20 22:13:23 [core.py:99] Traceback (most recent call last):
(EngineCore pid=9) ERROR 11-20 22:13:23 [core.py:99]   File "x.py", line 3, in f
(EngineCore pid=9) ERROR 11-20 22:13:23 [core.py:99] ValueError: the KV cache is too small
(EngineCore pid=9) ValueError: the KV cache is too small
(APIServer pid=7) RuntimeError: Engine core initialization failed. See root cause above.
"""
    assert meaningful_lines(log) == ["ValueError: the KV cache is too small"]
    assert meaningful_lines("one\n\ntwo\n") == ["one", "two"]
    assert meaningful_lines("usage: x\napi_server.py: error: unrecognized arguments: --y") == [
        "api_server.py: error: unrecognized arguments: --y"
    ]


def test_later_signals_do_not_interrupt_the_cleaning_up() -> None:
    code = """
import time
from vllm_adrenaline.launch.signals import Stopped, ending_signals_raise
with ending_signals_raise():
    try:
        print("ready", flush=True)
        time.sleep(60)
    except Stopped as stopped:
        print("stopping", flush=True)
        time.sleep(0.5)
        print("clean", stopped.exit_status, flush=True)
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGTERM)
    assert process.stdout.readline() == "stopping\n"
    process.send_signal(signal.SIGTERM)
    assert process.communicate()[0] in {"clean 130\n", "clean 143\n"}
    assert process.returncode == 0


MAPS = """
import mmap, signal, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
maps = []
for name in sys.argv[1:]:
    file = open(name, "r+b")
    maps.append(mmap.mmap(file.fileno(), 4096))
print("mapped", flush=True)
time.sleep(60)
"""


def test_shared_memory_that_was_there_before_or_is_anothers_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights, before, others = (Path(f"/dev/shm/{n}{os.getpid()}") for n in ("weights-", "psm_before", "psm_others"))
    before.write_bytes(bytes(4096))
    env = dict(os.environ)
    wait = f"import os, time\nwhile not os.path.exists({str(tmp_path / 'go')!r}): time.sleep(0.01)\n"
    command = [sys.executable, "-c", wait + MAPS, *map(str, (weights, before, others))]
    process = EngineProcess("d", command, env, tmp_path / "log")
    for path in (others, weights):  # made while the engine runs
        path.write_bytes(bytes(4096))
    (tmp_path / "go").touch()
    wait_until(lambda: process.log.read_text() == "mapped\n")
    process.remember_shared_memory()
    os.chown(others, 1, 1) if os.getuid() == 0 else monkeypatch.setattr(os, "getuid", lambda: -1)
    process.terminate()
    process.finish(time.monotonic())
    left = [path.exists() for path in (weights, before, others)]
    for path in (weights, before, others):
        path.unlink(missing_ok=True)
    assert left == [True, True, True]


def test_every_part_of_a_cluster_is_stopped_whatever_another_one_does(tmp_path: Path) -> None:
    cluster, stopped = Cluster(tmp_path), []

    class Part:
        def stop(self) -> None:
            stopped.append(self)
            raise PermissionError("not yours")

        close = stop

        def end(self, name: str, more_s: float) -> None:
            self.stop()

    cluster._supervisor, cluster._listener = parts = (Part(), Part())  # type: ignore[assignment]
    cluster._runtime = tmp_path / "runtime"
    cluster._runtime.mkdir()
    with pytest.raises(PermissionError):
        cluster.stop()
    assert stopped == [parts[0], *parts]  # the proxy, the engines, the port
    assert not (tmp_path / "runtime").exists()
    cluster.stop()


def test_an_engine_whose_log_is_gone_can_still_be_explained(tmp_path: Path) -> None:
    process = EngineProcess("d", [sys.executable, "-c", "raise SystemExit(3)"], dict(os.environ), tmp_path / "log")
    wait_until(lambda: process.exit_status is not None)
    process.log.unlink()
    assert process.failure() == f"the d engine ended with status 3; its log: {tmp_path}/log"
    process.finish(time.monotonic())


STUCK = """
import sys, threading, time
threading.Thread(target=lambda: 1 / 0, name="listener").start()
time.sleep(60)
"""


@pytest.mark.parametrize(
    ("code", "reason", "said"),
    [
        (STUCK, "the decode engine does not start: one of its threads ended", "ZeroDivisionError: division by zero"),
        ("import time; print('loading', flush=True); time.sleep(60)", "the decode engine said nothing for ", "loading"),
    ],
)
def test_a_start_that_stands_still_is_given_up_with_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str, reason: str, said: str
) -> None:
    monkeypatch.setattr("vllm_adrenaline.launch.supervisor.STUCK_S", 1.0)
    spec = EngineCommand("decode", at(1), [sys.executable, "-c", code])
    started = time.monotonic()
    with pytest.raises(AdrenalineError) as error, Supervisor([spec], logs=tmp_path, silence_limit=2):
        pass
    assert time.monotonic() - started < 30
    assert str(error.value).startswith(reason)
    assert str(error.value).splitlines()[-1] == f"  | {said}"


def test_what_engines_are_at_is_shown_while_they_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("vllm_adrenaline.launch.supervisor.PROGRESS_S", 0.1)
    (port,) = reserve_ports(1)
    line = "(Worker pid=7) INFO 11-20 22:13:22 [x.py:9] Loading weights"
    code = f"print({line!r}, flush=True); import time; time.sleep(1)\n{SERVER}"
    spec = EngineCommand("decode", at(port), [sys.executable, "-c", code, str(port)])
    with Supervisor([spec], logs=tmp_path):
        pass
    assert "s, decode: Loading weights\n" in capsys.readouterr().out
