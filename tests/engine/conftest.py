"""Real engines, and what tests ask of them over HTTP.

An engine takes half a minute of processor time to start, nearly all of it imports, so tests share engines:

* `plain`, vLLM without the plugin: what every float32 request is answered with by rights, asked for once a run;
* `standard`: a prefill engine and two decode engines, one of them small. Their offload ratio is changed between
  requests (benchmarks/knob), and their data plane misbehaves when a test wants it to (faults);
* what other engines a file needs, for that file.

Counters of a shared engine have a past: `Engine.counting` says what they grew by.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from dataclasses import replace as replace_fields
from pathlib import Path
from typing import Any, Literal, TypeVar

import aiohttp
import pytest

from tests.unit.test_process_spaces import APART
from vllm_adrenaline.compat.worker_cores import CORES_ENV
from vllm_adrenaline.engine.setup import PEERS_START_TOO
from vllm_adrenaline.launch import engine_command
from vllm_adrenaline.launch.engine_metrics import EngineMetrics
from vllm_adrenaline.launch.process import group_members
from vllm_adrenaline.launch.recovery import Recovery
from vllm_adrenaline.launch.supervisor import Supervisor, is_ready
from vllm_adrenaline.proxy.server import ServerThread, bind, url_of
from vllm_adrenaline.proxy.snapshot import Snapshot
from vllm_adrenaline.system.folders import runtime_folder
from vllm_adrenaline.system.ports import reserve_ports
from vllm_adrenaline.workload.tiny_model import make_model

T = TypeVar("T")
BLOCK = 128
VOCABULARY = 512
BLOCK_BYTES = 2 * 2 * 2 * BLOCK * 32 * 4
"""KV of one block: 2 layers, K and V, 2 KV heads, 128 tokens, head size 32, float32."""
SMALL_BLOCKS = 17  # 16 and vLLM's null block
PLUGINS = [Path(__file__).parents[2] / "benchmarks" / "knob", Path(__file__).parent / "faults"]
Ratio = float | Literal["auto"]
"""What --adrenaline-offload-ratio may be."""


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
    """Talks to one engine or proxy."""

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


class Counting:
    """What an engine's counters grew by since this was made: the plugin's by their short names, others in full."""

    def __init__(self, engine: Engine) -> None:
        self.engine, self.before = engine, engine.snapshot()

    def __getitem__(self, name: str) -> float:
        metric = name if ":" in name else f"vllm:adrenaline_{name}_total"
        now = self.engine.snapshot()
        assert metric in now.values, metric
        return now.value(metric) - self.before.value(metric)

    def placements(self) -> dict[tuple[str, str], float]:
        """Return what was decided, by placement and reason."""
        before, now = self.before.placements(), self.engine.snapshot().placements()
        return {each: count - before.get(each, 0) for each, count in now.items() if count > before.get(each, 0)}


class Engine(Client):
    """An engine whose metrics can be read."""

    def __init__(self, url: str, pid: int) -> None:
        super().__init__(url)
        self.pid = pid

    def metrics(self) -> dict[str, float]:
        """Return every metric without labels; equal names are added up."""
        return self.snapshot().values

    async def read_metrics(self) -> dict[str, float]:
        """Return every metric without labels; equal names are added up."""
        async with aiohttp.ClientSession() as session, session.get(f"{self.url}/metrics") as response:
            return Snapshot(await response.text()).values

    def snapshot(self) -> Snapshot:
        """Return all metrics with their labels."""
        return EngineMetrics(self.url).read()

    def counting(self) -> Counting:
        """Return what the counters will have grown by from now on."""
        return Counting(self)

    def settle(self) -> float:
        """Run one request of this engine's own, so that its gauges are fresh; return its KV usage after it."""
        self.complete([Work([7, 8, 9], 2)])
        return self.metrics()["vllm:kv_cache_usage_perc"]


@dataclass
class Faults:
    """The faulty data plane of one decode engine (faults/adrenaline_faults.py)."""

    file: Path

    @contextmanager
    def losing(self, messages: int) -> Iterator[None]:
        """Be faulty, and lose so many messages in all."""
        replace(self.file.with_suffix(".wanted"), str(messages))
        yield
        self.file.with_suffix(".wanted").unlink()

    def done(self) -> dict[str, int]:
        """Return how often each fault has happened."""
        return json.loads(self.file.read_text()) if self.file.exists() else {}


class Fleet:
    """Engines by name, and a proxy for each decode engine."""

    def __init__(
        self, folder: Path, engines: dict[str, Engine], doors: dict[str, Client], supervisor: Supervisor
    ) -> None:
        self.folder, self.engines, self.doors, self._supervisor = folder, engines, doors, supervisor
        self.address = prefill_address(folder)
        """Where the prefill engine listens for decode engines."""

    def __getitem__(self, name: str) -> Engine:
        engine = self.engines[name]
        engine.pid = self._supervisor.processes[name].pid
        assert group_members(engine.pid), f"a test has ended the {name} engine: run files in their order"
        return engine

    def has_begun_anew(self, name: str, after: int) -> bool:
        """Say whether an engine serves that is not the process `after` any more."""
        return self._supervisor.processes[name].pid != after and is_ready(self.engines[name].url)

    def revive(self, name: str) -> None:
        """Start an engine again if an earlier test has ended it."""
        recovery = Recovery(self._supervisor)

        def serves() -> bool:
            recovery.step()  # on this thread: who is started by a thread ends with it (system/child.py)
            return is_ready(self.engines[name].url)

        assert eventually(serves, seconds=120)

    @contextmanager
    def recovering(self) -> Iterator[None]:
        """Start again what ends, as `adrenaline up` does. What was started again ends with the context."""
        recovery, done = Recovery(self._supervisor), threading.Event()

        def watch() -> None:
            while not done.wait(0.2):
                recovery.step()

        with ThreadPoolExecutor(1) as pool:
            watcher = pool.submit(watch)
            try:
                yield
            finally:
                done.set()
                watcher.result()

    def door(self, decode: str, ratio: Ratio) -> Client:
        """Return the proxy: first the prefill engine, then this decode engine, which from now on offloads the
        share `ratio` of the requests it gets."""
        replace(knob(self.folder, decode), str(ratio))
        return self.doors[decode]

    def faults(self, decode: str) -> Faults:
        """Return the faulty data plane of a decode engine."""
        return Faults(faults(self.folder, decode))

    def processes(self) -> list[int]:
        """Return all processes of all engines."""
        return sorted(pid for engine in self.engines.values() for pid in group_members(engine.pid))

    def open_files(self) -> dict[int, int]:
        """Return how many files and sockets each process has open."""
        return {pid: len(os.listdir(f"/proc/{pid}/fd")) for pid in self.processes()}


def prefill_address(folder: Path) -> str:
    """Return where the prefill engine of a fleet listens."""
    return f"ipc://{folder}/p"


def knob(folder: Path, decode: str) -> Path:
    """Return the file with the offload ratio of a decode engine."""
    return folder / f"{decode}.ratio"


def faults(folder: Path, decode: str) -> Path:
    """Return the file that says which faults the data plane of a decode engine had."""
    return folder / f"{decode}.faults"


def replace(file: Path, text: str) -> None:
    """Write a file that others read at any time."""
    new = file.with_name(f"{file.name}.new")
    new.write_text(text)
    new.rename(file)


@dataclass
class Wanted:
    """An engine to start. `ratio`: what it is started with; auto makes a decode engine measure what steps cost.
    `ends_early`: see faults/adrenaline_faults.py, for a prefill engine. `apart`: in a PID namespace of its own."""

    role: Literal["plain", "prefill", "decode"]
    blocks: int
    more: list[str] = field(default_factory=list)
    ratio: Ratio = "auto"
    ends_early: bool = False
    apart: bool = False

    def arguments(self, address: str) -> list[str]:
        """Return the engine's own flags."""
        flags = ["--kv-cache-memory-bytes", kv_bytes(self.blocks), *self.more]
        if self.role != "plain":
            flags += ["--plugin", "adrenaline", "--adrenaline-role", self.role]
        if self.role == "prefill":
            flags += ["--adrenaline-listen", address]
        if self.role == "decode":
            flags += ["--adrenaline-peers", address, "--adrenaline-offload-ratio", str(self.ratio)]
        return flags

    def environment(self, folder: Path, name: str) -> dict[str, str]:
        """Return what lets a decode engine start beside its peer, and tests turn its knob or break its data plane."""
        path = [*map(str, PLUGINS), *filter(None, [os.environ.get("PYTHONPATH")])]
        if self.ends_early:
            return {"PYTHONPATH": os.pathsep.join(path), "ADRENALINE_EARLY": "1"}
        if self.role != "decode":
            return {}
        replace(knob(folder, name), str(self.ratio))
        return {
            PEERS_START_TOO: "1",
            "PYTHONPATH": os.pathsep.join(path),
            "ADRENALINE_KNOB": str(knob(folder, name)),
            "ADRENALINE_FAULTS": str(faults(folder, name)),
        }


@contextmanager
def fleet(
    logs: Path, model: Path, common: list[str], engines: Mapping[str, Wanted], cores: str | None = None
) -> Iterator[Fleet]:
    """Start engines by name. There is at most one prefill engine. Decode engines have the first core, others the
    second, unless `cores` says something else for all of them."""
    with ExitStack() as stack:
        folder = runtime_folder()  # a name short enough for Unix sockets
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        specs = []
        for port, (name, wanted) in zip(reserve_ports(len(engines)), engines.items(), strict=True):
            args = ["--served-model-name", "m", "--enforce-eager", "--max-model-len", "1024", *common]
            args += wanted.arguments(prefill_address(folder))
            env = {CORES_ENV: cores or ("0" if wanted.role == "decode" else "1"), "HF_HUB_OFFLINE": "1"}
            env |= wanted.environment(folder, name)
            spec = engine_command.vllm_server(name, str(model), port, args, env)
            specs.append(replace_fields(spec, argv=[*APART, *spec.argv]) if wanted.apart else spec)
        supervisor = stack.enter_context(Supervisor(specs, logs=logs))
        members = {spec.name: Engine(spec.url, supervisor.processes[spec.name].pid) for spec in specs}
        doors: dict[str, Client] = {}
        for name, wanted in engines.items():
            if wanted.role == "decode":
                prefill = next(n for n, each in engines.items() if each.role == "prefill")
                listener = stack.enter_context(bind("127.0.0.1", 0))
                door = ServerThread(listener, [members[prefill].url], [members[name].url])
                door.start()
                stack.callback(door.stop)
                doors[name] = Client(url_of(listener))
        yield Fleet(folder, members, doors, supervisor)


class Plain:
    """vLLM without the plugin. It starts beside other engines: who asks it first waits."""

    def __init__(self, starting: Future[Fleet]) -> None:
        self._starting = starting
        self._known: dict[str, list[Answer]] = {}

    @property
    def engine(self) -> Engine:
        """The engine itself."""
        return self._starting.result()["plain"]

    def complete(self, work: Sequence[Work], **extra: Any) -> list[Answer]:
        """Return the answers to all requests, sent at once when they were not sent before."""
        asked = repr((work, sorted(extra.items())))
        if asked not in self._known:
            self._known[asked] = self.engine.complete(work, **extra)
        return self._known[asked]

    def tokens(self, work: Sequence[Work], **extra: Any) -> list[list[int]]:
        """Return the tokens of the answers to all requests."""
        return tokens(self.complete(work, **extra))


def tokens(answers: Sequence[Answer]) -> list[list[int]]:
    """Return the tokens of each answer."""
    return [answer.tokens for answer in answers]


async def peak(engine: Engine, done: asyncio.Event) -> tuple[float, float]:
    """Return the largest KV usage and the most running requests seen until `done`."""
    usage = running = 0.0
    while not done.is_set():
        metrics = await engine.read_metrics()
        usage = max(usage, metrics["vllm:kv_cache_usage_perc"])
        running = max(running, metrics["vllm:num_requests_running"])
        await asyncio.sleep(0.05)
    return usage, running


async def watched(engine: Engine, client: Client, work: list[Work]) -> tuple[list[Answer], float, float]:
    done = asyncio.Event()
    watcher = asyncio.create_task(peak(engine, done))
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        answers = await asyncio.gather(*(client.one(session, item) for item in work))
    done.set()
    return answers, *await watcher


def eventually(check: Callable[[], bool], seconds: float = 60, poll_s: float = 0.1) -> bool:
    """Say whether the condition holds within so many seconds."""
    deadline = time.monotonic() + seconds
    while not (holds := check()) and time.monotonic() < deadline:
        time.sleep(poll_s)
    return holds


def offloads_again(engines: Fleet, decode: str, seconds: float = 90) -> bool:
    """Say whether a decode engine that lost an executor finds it again and offloads to it, within so many seconds."""
    count = engines[decode].counting()

    def offloaded() -> bool:
        engines.door(decode, 1).complete(workload(1, seed=43, prompts=[40], outputs=[5]))
        return count["remote_attention_rows"] > 0

    return eventually(offloaded, seconds)


def command_of(pid: int) -> bytes:
    """Return a process's command line; nothing if it has ended by now."""
    with suppress(FileNotFoundError, ProcessLookupError):
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    return b""


def engine_core_of(engine: int) -> int:
    """Return the engine core in an engine's process group."""
    return next(p for p in group_members(engine) if b"EngineCore" in command_of(p))


def executors_of(prefill: int) -> list[int]:
    """Return the attention executors in the prefill engine's process group, by rank."""
    return sorted(pid for pid in group_members(prefill) if b"vllm_adrenaline.attention" in command_of(pid))


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
def plain(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Plain]:
    """Plain vLLM in float32."""
    wanted = {"plain": Wanted("plain", 400)}
    common = ["--dtype", "float32", "--max-num-seqs", "64"]
    starts = fleet(tmp_path_factory.mktemp("plain"), model, common, wanted)
    # Its thread lives as long as the engine, which ends with it.
    with ThreadPoolExecutor(1) as starter, ExitStack() as stack:
        yield Plain(starter.submit(stack.enter_context, starts))


@pytest.fixture(scope="session")
def standard(plain: Plain, model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """A prefill engine `prefill`, and two decode engines in float32: `decode` with as much memory, `small` with little.

    The last test of test_bystanders.py ends `small`.
    """
    wanted = {
        "prefill": Wanted("prefill", 400, ["--adrenaline-lease-seconds", "30"]),
        "decode": Wanted("decode", 400, ratio=1),
        "small": Wanted("decode", SMALL_BLOCKS, ratio="auto"),
    }
    common = ["--dtype", "float32", "--max-num-seqs", "64"]
    with fleet(tmp_path_factory.mktemp("standard"), model, common, wanted) as started:
        yield started


def kv_bytes(blocks: int) -> str:
    """Return --kv-cache-memory-bytes for so many blocks."""
    return str(blocks * BLOCK_BYTES)


@dataclass
class Ended:
    """How a server ended that was not to start: its exit code and all it printed."""

    code: int
    output: str


class Server:
    """Starts vLLM's API server for command lines that are refused (serve.py); vLLM is imported once for all."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def run(self, *args: str) -> Ended:
        """Run the API server with `args` until it ends by itself."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{json.dumps(args)}\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        assert answer, "serve.py has ended"
        return Ended(**json.loads(answer))


@pytest.fixture(scope="session")
def server() -> Iterator[Server]:
    """The API server, to be started with command lines that it refuses."""
    command = [sys.executable, str(Path(__file__).with_name("serve.py"))]
    env = {**os.environ, "HF_HUB_OFFLINE": "1"}
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env) as process:
        yield Server(process)
        assert process.stdin is not None
        process.stdin.close()
