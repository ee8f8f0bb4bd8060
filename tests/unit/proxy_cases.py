"""Fake engines, and a proxy in front of them."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import aiohttp
from aiohttp import web

from vllm_adrenaline.proxy.limits import Limits
from vllm_adrenaline.proxy.server import ServerThread, bind, url_of

PARAMS = {"do_remote_prefill": True, "remote_engine_id": "p", "remote_block_ids": [[1, 2]]}
BODY = {"model": "m", "prompt": "hello", "max_tokens": 7}


class FakeEngine:
    """An engine that records what it is asked and answers as it is told; `wait` blocks it until its client leaves."""

    def __init__(self, answer: Any = None, status: int = 200, wait: bool = False, cut: bool = False) -> None:
        self.answer, self.status, self.wait, self.cut = answer, status, wait, cut
        self.seen: list[tuple[str, dict[str, Any], dict[str, str]]] = []
        self.started, self.cancelled = asyncio.Event(), asyncio.Event()
        self.url = ""

    async def handle(self, request: web.Request) -> web.StreamResponse:
        if request.path == "/health":
            return web.Response(status=self.status)
        if request.path == "/v1/models":
            return web.json_response({"data": [{"id": "m"}]})
        if request.path == "/version":
            return web.json_response({"version": "0.32.0"})
        if request.path == "/metrics":
            return web.Response(text="vllm:num_requests_running 1.0\n")
        body = await request.json()
        self.seen.append((request.path, body, {name.lower(): value for name, value in request.headers.items()}))
        self.started.set()
        try:
            if body.get("stream"):
                return await self.stream(request)
            if self.wait:
                await asyncio.sleep(60)
        except (asyncio.CancelledError, ConnectionError):
            self.cancelled.set()
            raise
        return web.json_response(self.answer, status=self.status)

    async def stream(self, request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream; charset=utf-8", "X-Engine": "d"})
        await response.prepare(request)
        await response.write(b'data: {"a":  1}\n\n')
        if self.cut:
            assert request.transport is not None
            request.transport.abort()
        if self.wait:
            await asyncio.sleep(60)
        await response.write(b"data: [DONE]\n\n")
        return response

    @asynccontextmanager
    async def serve(self, port: int = 0) -> AsyncIterator[None]:
        app = web.Application()
        app.router.add_route("*", "/{path:.*}", self.handle)
        runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=1)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", port)
        await site.start()
        self.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        try:
            yield
        finally:
            await runner.cleanup()


class Slow(FakeEngine):
    """An engine whose streams end when they are let go."""

    def __init__(self, answer: Any = None) -> None:
        super().__init__(answer)
        self.go = asyncio.Event()

    async def stream(self, request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        await response.write(b"data: 1\n\n")
        await self.go.wait()
        await response.write(b"data: 2\n\n")
        return response


Test = Callable[[aiohttp.ClientSession, FakeEngine, FakeEngine], Awaitable[None]]
TestOfMany = Callable[[aiohttp.ClientSession, list[FakeEngine], list[FakeEngine]], Awaitable[None]]


def with_proxy(
    prefill: Callable[[], FakeEngine],
    decode: Callable[[], FakeEngine],
    test: Test,
    limits: Limits | None = None,
    api_key: str | None = None,
    seconds: float = 20,
) -> None:
    """Run the test with a client of a proxy before the two engines."""

    async def one_each(client: aiohttp.ClientSession, ps: list[FakeEngine], ds: list[FakeEngine]) -> None:
        await test(client, ps[0], ds[0])

    with_many([prefill], [decode], one_each, limits, api_key, seconds)


def with_many(
    prefill: Sequence[Callable[[], FakeEngine]],
    decode: Sequence[Callable[[], FakeEngine]],
    test: TestOfMany,
    limits: Limits | None = None,
    api_key: str | None = None,
    seconds: float = 20,
) -> None:
    """Run the test with a client of a proxy before these engines. It has so many seconds."""

    async def run() -> None:
        ps, ds = [make() for make in prefill], [make() for make in decode]
        async with AsyncExitStack() as stack:
            for engine in (*ps, *ds):
                await stack.enter_async_context(engine.serve())
            listener = bind("127.0.0.1", 0)
            proxy = ServerThread(listener, [p.url for p in ps], [d.url for d in ds], limits, api_key)
            proxy.start()
            try:
                async with aiohttp.ClientSession(url_of(listener)) as client:
                    await asyncio.wait_for(test(client, ps, ds), seconds)
            finally:
                await asyncio.to_thread(proxy.stop)
                listener.close()

    asyncio.run(run())


def good_prefill() -> FakeEngine:
    return FakeEngine({"kv_transfer_params": PARAMS})


def good_decode() -> FakeEngine:
    return FakeEngine({"choices": [{"text": "x"}]})


@asynccontextmanager
async def command(*options: str) -> AsyncIterator[tuple[aiohttp.ClientSession, asyncio.subprocess.Process]]:
    """Run `adrenaline proxy`, the command, with these options; give a client of it and the process."""
    argv = [sys.executable, "-m", "vllm_adrenaline.cli", "proxy", "--port", "0", *options]
    proxy = await asyncio.create_subprocess_exec(*argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    try:
        assert proxy.stdout is not None
        url = (await asyncio.wait_for(proxy.stdout.readline(), 20)).split()[-1].decode()
        async with aiohttp.ClientSession(url) as client:
            while True:
                try:
                    async with client.get("/ready") as answer:
                        assert answer.status == 200
                    break
                except aiohttp.ClientConnectionError:
                    await asyncio.sleep(0.05)
            yield client, proxy
    finally:
        if proxy.returncode is None:
            os.kill(proxy.pid, signal.SIGKILL)
        await proxy.wait()
