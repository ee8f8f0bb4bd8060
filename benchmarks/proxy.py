"""What a router adds to a request: this package's proxy, and vllm-router where it is installed, before one fast engine.

    python benchmarks/proxy.py [--rate 20] [--quick] [--json FILE]

The engine is a process of its own that answers at once, as a prefill and as a decode engine. Requests come at a fixed
rate that saturates nothing, over connections that stay open. All systems take turns in one run. direct: the client
asks the engine twice itself, as a router does, the second time with what it was told the first time. added: a router's
median less that of direct. whole: the answer comes at once. first: the first of EVENTS events of a stream, which the
engine sends EVERY_S apart. CPU: of the router's process alone, for each request.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import uvloop

sys.path.insert(0, str(Path(__file__).parent))
import report

from vllm_adrenaline.proxy import bodies
from vllm_adrenaline.proxy.apis import APIS
from vllm_adrenaline.system.ports import reserve_ports

PATH = "/v1/completions"
EVENTS, EVERY_S = 32, 0.005
WARM_UP = 20
TOKENS = list(range(500))
PROMPT = "The quick brown fox jumps over the lazy dog. " * 50
BODY: dict[str, Any] = {"model": "m", "prompt": PROMPT, "max_tokens": 32, "temperature": 0}
PARAMS = {"do_remote_prefill": True, "do_remote_decode": False, "remote_block_ids": [list(range(20))]}
PARAMS |= {"remote_engine_id": "e" * 36, "remote_request_id": "r" * 40, "remote_host": "127.0.0.1", "remote_port": 1}
CHOICE = {"index": 0, "text": " jumps" * 32, "finish_reason": "length"}
ANSWER = {"id": "cmpl-1", "object": "text_completion", "model": "m", "choices": [CHOICE]}
EVENT = b'data: {"id":"cmpl-1","object":"text_completion","model":"m","choices":[{"index":0,"text":" jumps"}]}\n\n'


# The engine


class FakeEngine(asyncio.Protocol):
    """One connection of an engine that answers at once. It reads no more of HTTP than it needs."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport: Any = transport
        self.received = b""

    def data_received(self, data: bytes) -> None:
        self.received += data
        while (end := self.received.find(b"\r\n\r\n")) >= 0:
            head = self.received[:end].lower()
            _, _, length = head.partition(b"content-length: ")
            size = int(length.split(b"\r\n")[0] or 0)
            if len(self.received) < end + 4 + size:
                return
            body, self.received = self.received[end + 4 : end + 4 + size], self.received[end + 4 + size :]
            if not head.startswith(b"post /v1/completions "):
                self.whole({"tokens": TOKENS, "count": len(TOKENS)})  # vllm-router asks for /tokenize
            elif b'"stream":true' in body.replace(b" ", b""):
                self.streams = asyncio.ensure_future(self.stream())
            else:
                self.whole(ANSWER | ({"kv_transfer_params": PARAMS} if b"do_remote_decode" in body else {}))

    def whole(self, answer: Any) -> None:
        text = json.dumps(answer).encode()
        head = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(text)
        self.transport.write(head + text)

    async def stream(self) -> None:
        head = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
        chunk = b"%x\r\n%s\r\n" % (len(EVENT), EVENT)
        self.transport.write(head + chunk)
        for _ in range(EVENTS - 1):
            await asyncio.sleep(EVERY_S)
            self.transport.write(chunk)
        self.transport.write(b"0\r\n\r\n")


async def be_engine(ports: list[int]) -> None:
    """Serve at two ports: vllm-router wants a prefill and a decode engine that are not the same."""
    for port in ports:
        await asyncio.get_running_loop().create_server(FakeEngine, "127.0.0.1", port)
    await asyncio.Event().wait()


# The client


async def ask(client: aiohttp.ClientSession, url: str, body: dict[str, Any]) -> tuple[bytes, float]:
    """Post a body; return the answer, and when its first byte was there."""
    async with client.post(url + PATH, json=body) as answer:
        assert answer.status == 200, await answer.text()
        first = await answer.content.readany()
        at = time.perf_counter()
        return first + await answer.content.read(), at


async def direct(client: aiohttp.ClientSession, url: str, body: dict[str, Any]) -> float:
    """Do a router's work without one."""
    prefill = dict(body, max_tokens=1, stream=False, kv_transfer_params=bodies.KEEP_KV_FOR_DECODE)
    prefill = {name: value for name, value in prefill.items() if name not in APIS[PATH].unwanted}
    answer, _ = await ask(client, url, prefill)
    return (await ask(client, url, dict(body, kv_transfer_params=bodies.params_of(answer))))[1]


async def routed(client: aiohttp.ClientSession, url: str, body: dict[str, Any]) -> float:
    return (await ask(client, url, body))[1]


One = Callable[[aiohttp.ClientSession, str, dict[str, Any]], Awaitable[float]]


async def load(
    one: One, client: aiohttp.ClientSession, url: str, body: dict[str, Any], rate: float, count: int
) -> list[float]:
    """Send requests at a fixed rate, whatever becomes of the others; return their latencies in seconds."""
    loop = asyncio.get_running_loop()
    began = loop.time()

    async def timed() -> float:
        start = time.perf_counter()
        return await one(client, url, body) - start

    tasks = []
    for number in range(count):
        await asyncio.sleep(max(0.0, began + number / rate - loop.time()))
        tasks.append(asyncio.create_task(timed()))
    return await asyncio.gather(*tasks)


# The systems


@asynccontextmanager
async def process(argv: list[str], url: str) -> AsyncIterator[int]:
    """Run a server until the context ends; give its process id."""
    running = subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        async with aiohttp.ClientSession() as client:
            deadline = time.monotonic() + 30
            while True:
                try:
                    await ask(client, url, BODY | {"max_tokens": 1})
                    break
                except (aiohttp.ClientError, AssertionError):
                    assert time.monotonic() < deadline, argv
                    await asyncio.sleep(0.1)
        yield running.pid
    finally:
        running.kill()
        running.wait()


def cpu_seconds(pid: int) -> float:
    """Return the CPU time of a process so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


async def measure(rate: float, seconds: float, rounds: int) -> dict[str, float]:
    python = [sys.executable, str(Path(__file__)), "--engine"]
    prefill, decode, ours, theirs, metrics = (str(port) for port in reserve_ports(5))
    at = {"direct": f"http://127.0.0.1:{decode}", "adrenaline": f"http://127.0.0.1:{ours}"}
    upstream = ["--prefill", f"http://127.0.0.1:{prefill}", "--decode", at["direct"]]
    commands = {"adrenaline": [sys.executable, "-m", "vllm_adrenaline.cli", "proxy", "--port", ours, *upstream]}
    router = shutil.which("vllm-router", path=str(Path(sys.executable).parent)) or shutil.which("vllm-router")
    if router is not None:
        at["vllm_router"] = f"http://127.0.0.1:{theirs}"
        listen = ["--host", "127.0.0.1", "--port", theirs, "--prometheus-port", metrics]
        commands["vllm_router"] = [router, "--vllm-pd-disaggregation", *upstream, *listen]
    latencies: dict[str, list[float]] = {}
    cpu: dict[str, float] = {}
    asked = 0
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(process([*python, prefill, decode], at["direct"]))
        pids = {name: await stack.enter_async_context(process(argv, at[name])) for name, argv in commands.items()}
        connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=60)
        client = await stack.enter_async_context(aiohttp.ClientSession(connector=connector))
        for number in range(-1, rounds):
            for kind, body in {"whole": BODY, "first": BODY | {"stream": True}}.items():
                for name, url in at.items():
                    before = cpu_seconds(pids[name]) if name in pids else 0.0
                    count = WARM_UP if number < 0 else round(rate * seconds)
                    one = direct if name == "direct" else routed
                    found = await load(one, client, url, body, rate, count)
                    if number < 0:
                        continue
                    latencies.setdefault(f"{name}, {kind}", []).extend(found)
                    if name in pids:
                        key = f"{name}, {kind}, CPU ms a request"
                        cpu[key] = cpu.get(key, 0.0) + 1e3 * (cpu_seconds(pids[name]) - before) / (count * rounds)
        asked = round(rate * seconds) * rounds
    result = {"requests each": float(asked)}
    for name, values in latencies.items():
        result[f"{name}, ms"] = 1e3 * report.median(values)
    for name in pids:
        for kind in ("whole", "first"):
            added = result[f"{name}, {kind}, ms"] - result[f"direct, {kind}, ms"]
            result[f"{name}, {kind}, added ms"] = added
    return result | cpu


def main() -> None:
    parser = report.parser(__doc__ or "", "half a minute")
    parser.add_argument("--rate", type=float, default=20, help="requests a second")
    parser.add_argument("--engine", type=int, nargs=2, metavar="PORT", help="be the engine")
    options = parser.parse_args()
    if options.engine:
        return uvloop.run(be_engine(options.engine))
    seconds, rounds = (1.0, 3) if options.quick else (5.0, 5)
    report.finish(report.table(uvloop.run(measure(options.rate, seconds, rounds))), options.json)


if __name__ == "__main__":
    main()
