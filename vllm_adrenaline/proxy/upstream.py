"""The engines behind the proxy, and how they are asked."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import aiohttp
from starlette.datastructures import Headers as ClientHeaders

from vllm_adrenaline.proxy import choice
from vllm_adrenaline.proxy.snapshot import Snapshot
from vllm_adrenaline.system.http_get import UNIX

CONNECT_TIMEOUT_S = 5.0
HEALTH_TIMEOUT_S = 5.0
METRICS_TIMEOUT_S = 2.0
REST_S = 5.0
LEAVE_S = 10.0
# vLLM closes idle connections after 5 s (VLLM_HTTP_TIMEOUT_KEEP_ALIVE); a request on one being closed would fail.
KEEP_ALIVE_S = 2.0
FOR_ENGINES = ("accept", "traceparent", "tracestate")
"""Headers of clients that go to engines, beside the request's name and the client's key. Others could steer an engine,
or are of no use."""
# RFC 9110 7.6.1, and what each side states for itself.
NOT_FOR_CLIENTS = frozenset(
    (
        "connection",
        "date",
        "keep-alive",
        "proxy-authenticate",
        "proxy-authorization",
        "proxy-connection",
        "server",
        "te",
        "trailer",
        "transfer-encoding",
        "upgrade",
    )
)

Headers = list[tuple[str, str]]
UNREACHABLE = (aiohttp.ClientError, asyncio.TimeoutError, OSError)
"""Exceptions of a session for an engine that does not answer."""


class EngineFailed(Exception):
    """An engine that did not answer as it should. `what` is one of unreachable, silent, error; the text is for the log.

    `elsewhere`: it has done nothing for the request. `status` is what a client gets to see.
    """

    def __init__(self, engine: Engine, what: str, detail: str, elsewhere: bool = False, status: int = 503) -> None:
        super().__init__(f"the {engine.kind} engine at {engine.address}: {detail}")
        self.kind, self.what, self.elsewhere, self.status = engine.kind, what, elsewhere, status


class Engine:
    """An engine, and the HTTP session for it.

    `kind` is prefill or decode; `address` is http://host:port, or unix: and the path of a socket. Clients know it by
    its `name` only. `is_down`: it could not be reached when it was last asked to generate. Where others can do its
    work, it is not asked again before `rests_until` (time.monotonic). `requests` under way have `outstanding` tokens.
    `room`: tokens of KV that it could still have (room.py); None: it does not say.
    """

    session: aiohttp.ClientSession

    def __init__(self, kind: str, address: str, name: str = "") -> None:
        self.kind, self.name, self.address = kind, name, address.rstrip("/")
        self.is_down, self.rests_until = False, 0.0
        self.outstanding = self.requests = 0
        self.room: int | None = None
        self._url = "http://engine" if address.startswith(UNIX) else self.address

    def open(self) -> aiohttp.ClientSession:
        """Make and return the session. It limits nothing but the time that connecting takes."""
        kept: dict[str, Any] = {"limit": 0, "keepalive_timeout": KEEP_ALIVE_S}
        self.session = aiohttp.ClientSession(
            connector=aiohttp.UnixConnector(self.address.removeprefix(UNIX), **kept)
            if self.address.startswith(UNIX)
            else aiohttp.TCPConnector(**kept),
            timeout=aiohttp.ClientTimeout(total=None, connect=CONNECT_TIMEOUT_S, sock_connect=CONNECT_TIMEOUT_S),
            cookie_jar=aiohttp.DummyCookieJar(),
            # Bytes go through as they are.
            auto_decompress=False,
            skip_auto_headers=("Accept-Encoding", "User-Agent"),
        )
        return self.session

    @contextmanager
    def carrying(self, tokens: int) -> Iterator[None]:
        """Count a request of so many tokens as this engine's while the context lasts."""
        self.outstanding += tokens
        self.requests += 1
        try:
            yield
        finally:
            self.outstanding -= tokens
            self.requests -= 1

    def post(self, path: str, data: bytes, headers: Headers) -> Any:
        """Return the context manager of a request with a JSON body."""
        sent = [*headers, ("Content-Type", "application/json")]
        return self.session.post(self._url + path, data=data, headers=sent, allow_redirects=False)

    def note(self, was_reached: bool) -> None:
        """Note whether it could be reached. A host that is gone would cost each request the whole time to connect."""
        self.is_down, self.rests_until = not was_reached, 0.0 if was_reached else time.monotonic() + REST_S

    async def get(self, path: str, headers: Headers, timeout_s: float) -> tuple[int, Headers, bytes]:
        """Return status, headers and body of a page. Raises EngineFailed for an engine that does not answer."""
        timeout = aiohttp.ClientTimeout(total=timeout_s)
        try:
            async with self.session.get(self._url + path, headers=headers, timeout=timeout) as answer:
                return answer.status, list(answer.headers.items()), await answer.read()
        except UNREACHABLE as error:
            raise unreachable(self, error) from error

    async def metrics(self) -> Snapshot | None:
        """Return the engine's metrics; None if it does not answer with any within two seconds.

        Raises UnicodeDecodeError, and what is read of it raises ValueError, if they are something else.
        """
        try:
            status, _, page = await self.get("/metrics", [], METRICS_TIMEOUT_S)
        except EngineFailed:
            return None
        return Snapshot(page.decode()) if status == 200 else None

    async def is_healthy(self) -> bool:
        """Say whether the engine answers /health with 200 within five seconds."""
        try:
            return (await self.get("/health", [], HEALTH_TIMEOUT_S))[0] == 200
        except EngineFailed:
            return False


def unreachable(engine: Engine, error: BaseException) -> EngineFailed:
    """Return what an exception of an engine's session says of the engine."""
    elsewhere = isinstance(error, (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError))
    return EngineFailed(engine, "unreachable", str(error) or type(error).__name__, elsewhere)


class Engines:
    """The engines of one kind. There are none at first: what is there when an event loop runs is `replace`d."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.all: list[Engine] = []
        self._memory = choice.Memory()
        self._leaving: dict[Engine, asyncio.Task[None]] = {}

    def choose(self, prompt: choice.Beginnings = (), session: str | None = None, tokens: int = 0) -> list[Engine]:
        """Return all engines in the order in which they should be asked (choice.order)."""
        now = time.monotonic()
        found = [
            choice.Candidate(each.address, each.outstanding, now >= each.rests_until, each.room) for each in self.all
        ]
        indexes = choice.order(found, random.randrange, self._memory.cached(prompt), session, tokens)
        return [self.all[index] for index in indexes]

    def remember(self, prompt: choice.Beginnings, engine: Engine) -> None:
        """Note that the engine computes this prompt."""
        self._memory.remember(prompt, engine.address)

    def replace(self, named: Sequence[tuple[str, str]]) -> None:
        """Have the engines with these names and addresses from now on. Requests under way end where they are."""
        known = {each.address: each for each in self.all}
        self.all = []
        for name, address in named:
            engine = known.pop(address, None)
            if engine is None:
                engine = Engine(self.kind, address)
                engine.open()
            engine.name = name
            self.all.append(engine)
        for engine in known.values():
            self._leaving[engine] = asyncio.create_task(self._close_later(engine))

    async def _close_later(self, engine: Engine) -> None:
        """Close the session when no request has the engine. One may have chosen it that has not begun yet."""
        while True:
            await asyncio.sleep(LEAVE_S)
            if not engine.requests:
                break
        await engine.session.close()
        del self._leaving[engine]

    async def are_down(self) -> bool:
        """Say whether none of them can be reached. Only those that could not be reached last are asked again."""
        return all(engine.is_down for engine in self.all) and not any(
            await asyncio.gather(*(engine.is_healthy() for engine in self.all))
        )

    async def close(self) -> None:
        """Close the sessions."""
        for engine, task in self._leaving.items():
            task.cancel()
            await engine.session.close()
        for engine in self.all:
            await engine.session.close()


def authorization(headers: ClientHeaders) -> str:
    """Return a client's Authorization; empty without one. A client of Anthropic's API has its key elsewhere."""
    given, key = headers.get("authorization"), headers.get("x-api-key")
    return f"Bearer {key}" if given is None and key else given or ""


def engine_headers(headers: ClientHeaders, request_id: str) -> Headers:
    """Return those of the client's headers that engines get, and the name of the request."""
    kept = [(name, value) for name, value in headers.items() if name in FOR_ENGINES]
    if key := authorization(headers):
        kept.append(("authorization", key))
    return [*kept, ("X-Request-Id", request_id)]


def client_headers(headers: Iterable[tuple[str, str]]) -> list[tuple[bytes, bytes]]:
    """Return an engine's headers for the client, in ASGI's form."""
    return [
        (name.lower().encode("latin-1"), value.encode("latin-1"))
        for name, value in headers
        if name.lower() not in NOT_FOR_CLIENTS
    ]
