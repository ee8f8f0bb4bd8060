"""Real engines, started once per test file, and what tests ask of them over HTTP."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import aiohttp
import pytest

from vllm_adrenaline.compat.worker_cores import CORES_ENV
from vllm_adrenaline.launch import engine_command
from vllm_adrenaline.launch.engine_metrics import EngineMetrics, Snapshot
from vllm_adrenaline.launch.process import group_members
from vllm_adrenaline.launch.supervisor import Supervisor
from vllm_adrenaline.proxy.server import ServerThread, bind, url_of
from vllm_adrenaline.system.ports import reserve_ports
from vllm_adrenaline.workload.tiny_model import make_model

T = TypeVar("T")
BLOCK = 128
VOCABULARY = 512
BLOCK_BYTES = 2 * 2 * 2 * BLOCK * 32 * 4
"""KV of one block: 2 layers, K and V, 2 KV heads, 128 tokens, head size 32, float32."""


def run(coroutine: Coroutine[Any, Any, T]) -> T:
    """Run one coroutine with a deadline: a hang is a failure, not a stuck suite."""
    return asyncio.run(asyncio.wait_for(coroutine, timeout=240))


@dataclass(frozen=True)
class Work:
    """One request: a prompt of token ids and how many tokens to generate."""

    prompt: list[int]
    tokens: int


def workload(count: int, seed: int, prompts: Sequence[int], outputs: Sequence[int]) -> list[Work]:
    """Return `count` random requests; every length of `prompts` and `outputs` occurs."""
    rng = random.Random(seed)
    return [
        Work([rng.randrange(5, VOCABULARY) for _ in range(prompts[i % len(prompts)])], outputs[(i * 7) % len(outputs)])
        for i in range(count)
    ]


@dataclass
class Answer:
    """What came back: the token ids, and their log probabilities when asked for."""

    tokens: list[int]
    logprobs: list[float] | None


class Client:
    """Talks to one engine or front door."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.model = "m"

    def complete(self, work: Sequence[Work], **extra: Any) -> list[Answer]:
        """Send all requests at once and return their answers."""
        return run(self._all(work, extra))

    async def _all(self, work: Sequence[Work], extra: dict[str, Any]) -> list[Answer]:
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
            return await asyncio.gather(*(self.one(session, item, **extra) for item in work))

    def body(self, work: Work, **extra: Any) -> dict[str, Any]:
        """Return the JSON body of a request."""
        return {
            "model": self.model,
            "prompt": work.prompt,
            "max_tokens": work.tokens,
            "temperature": 0,
            "ignore_eos": True,
            "return_token_ids": True,
            **extra,
        }

    async def one(self, session: aiohttp.ClientSession, work: Work, **extra: Any) -> Answer:
        """Send one request."""
        async with session.post(f"{self.url}/v1/completions", json=self.body(work, **extra)) as response:
            answer = await response.json()
            assert response.status == 200, answer
        choice = answer["choices"][0]
        logprobs = choice.get("logprobs")
        return Answer(choice["token_ids"], logprobs and logprobs["token_logprobs"])


class Engine(Client):
    """An engine whose metrics can be read."""

    def __init__(self, url: str, pid: int) -> None:
        super().__init__(url)
        self.pid = pid

    def metrics(self) -> dict[str, float]:
        """Return every metric without labels; equal names are added up."""
        return run(self.read_metrics())

    async def read_metrics(self) -> dict[str, float]:
        """Return every metric without labels; equal names are added up."""
        async with aiohttp.ClientSession() as session, session.get(f"{self.url}/metrics") as response:
            return Snapshot(await response.text()).values

    def snapshot(self) -> Snapshot:
        """Return all metrics with their labels."""
        return EngineMetrics(self.url).read()

    def counter(self, name: str) -> float:
        """Return one of the plugin's counters."""
        return self.metrics()[f"vllm:adrenaline_{name}_total"]

    def settle(self) -> float:
        """Run one request of this engine's own, so that its gauges are fresh; return its KV usage after it."""
        self.complete([Work([7, 8, 9], 2)])
        return self.metrics()["vllm:kv_cache_usage_perc"]


class Fleet:
    """Engines by name, and a front door for each decode engine."""

    def __init__(self, supervisor: Supervisor, engines: dict[str, Engine], doors: dict[str, Client]) -> None:
        self.supervisor, self.engines, self.doors = supervisor, engines, doors

    def __getitem__(self, name: str) -> Engine:
        return self.engines[name]

    def door(self, decode: str) -> Client:
        """Return the front door: first the prefill engine, then this decode engine."""
        return self.doors[decode]

    def processes(self) -> list[int]:
        """Return all processes of all engines."""
        return sorted(pid for engine in self.engines.values() for pid in group_members(engine.pid))

    def open_files(self) -> dict[int, int]:
        """Return how many files and sockets each process has open."""
        return {pid: len(os.listdir(f"/proc/{pid}/fd")) for pid in self.processes()}


@contextmanager
def fleet(
    folder: Path, logs: Path, model: Path, common: list[str], engines: dict[str, tuple[str, list[str]]]
) -> Iterator[Fleet]:
    """Start engines: name -> (role: plain, prefill or decode; further arguments). There is one prefill engine."""
    address = f"ipc://{folder}/p"
    flags = {
        "plain": [],
        "prefill": ["--plugin", "adrenaline", "--adrenaline-role", "prefill", "--adrenaline-listen", address],
        "decode": ["--plugin", "adrenaline", "--adrenaline-role", "decode", "--adrenaline-peers", address],
    }
    specs = []
    for port, (name, (role, more)) in zip(reserve_ports(len(engines)), engines.items(), strict=True):
        args = ["--served-model-name", "m", "--enforce-eager", *common, *flags[role], *more]
        threads = os.environ.get("ADRENALINE_TEST_CORES", "0" if role == "decode" else "1")
        specs.append(
            engine_command.vllm_server(name, str(model), port, args, {CORES_ENV: threads, "HF_HUB_OFFLINE": "1"})
        )
    with ExitStack() as stack:
        supervisor = stack.enter_context(Supervisor(specs, logs=logs))
        members = {spec.name: Engine(spec.url, supervisor.processes[spec.name].pid) for spec in specs}
        doors: dict[str, Client] = {}
        for name, (role, _) in engines.items():
            if role == "decode":
                prefill = next(n for n, (r, _) in engines.items() if r == "prefill")
                listener = stack.enter_context(bind("127.0.0.1", 0))
                door = ServerThread(listener, [members[prefill].url], [members[name].url])
                door.start()
                stack.callback(door.stop)
                doors[name] = Client(url_of(listener))
        yield Fleet(supervisor, members, doors)


def executors_of(prefill: int) -> list[int]:
    """Return the attention executors in the prefill engine's process group, by rank."""
    pids = [
        pid
        for pid in group_members(prefill)
        if b"vllm_adrenaline.attention" in Path(f"/proc/{pid}/cmdline").read_bytes()
    ]
    return sorted(pids)


def listening_beyond_loopback(processes: Sequence[int]) -> list[tuple[int, str]]:
    """Return (process, address in /proc/net's form) of every TCP socket that other machines could reach."""
    listening = {}
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            _, address, _, state, *rest = line.split()
            if state == "0A":
                listening[rest[5]] = address
    loopback = ("0100007F", "00000000000000000000000001000000", "0000000000000000FFFF00000100007F")
    found = []
    for pid in processes:
        for fd in Path(f"/proc/{pid}/fd").iterdir():
            with suppress(OSError):
                inode = os.readlink(fd).removeprefix("socket:[").removesuffix("]")
                if inode in listening and not listening[inode].startswith(loopback):
                    found.append((pid, listening[inode]))
    return found


@contextmanager
def kill_when(pid: int, condition: Callable[[], bool], seconds: float = 120) -> Iterator[list[int]]:
    """Kill a process as soon as the condition holds; it is in the list then."""
    killed: list[int] = []
    done = threading.Event()

    def watch() -> None:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and not done.is_set():
            if condition():
                os.kill(pid, signal.SIGKILL)
                killed.append(pid)
                return

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield killed
    finally:
        done.set()
        watcher.join()


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of two layers with random weights."""
    folder = tmp_path_factory.mktemp("model")
    return make_model(folder, layers=2, hidden=128, heads=4, kv_heads=2, vocab=VOCABULARY, max_position=2048)


@pytest.fixture(scope="session")
def short_tmp() -> Iterator[Path]:
    """A folder with a name short enough for Unix sockets."""
    from vllm_adrenaline.system.folders import runtime_folder

    folder = runtime_folder()
    yield folder
    import shutil

    shutil.rmtree(folder, ignore_errors=True)


def kv_bytes(blocks: int) -> str:
    """Return --kv-cache-memory-bytes for so many blocks."""
    return str(blocks * BLOCK_BYTES)


def serve(*args: str, timeout: float = 120) -> tuple[int, str]:
    """Run the API server with `args` until it ends by itself; return its exit code and all it printed."""
    import subprocess

    done = subprocess.run(
        [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *args],
        capture_output=True,
        text=True,
        timeout=timeout,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    return done.returncode, done.stdout + done.stderr


@pytest.fixture(scope="module")
def monkeypatch_module() -> Iterator[pytest.MonkeyPatch]:
    """Like monkeypatch, for module fixtures."""
    with pytest.MonkeyPatch.context() as patch:
        yield patch
