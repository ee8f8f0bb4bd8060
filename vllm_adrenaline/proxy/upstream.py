"""The engines behind the proxy, and the one HTTP session that all requests to them share."""

from __future__ import annotations

import asyncio
import itertools
import uuid
from collections.abc import Iterable, Sequence

import aiohttp

CONNECT_TIMEOUT_S = 5.0
HEALTH_TIMEOUT_S = 5.0
# vLLM closes idle connections after 5 s (VLLM_HTTP_TIMEOUT_KEEP_ALIVE); a request on one being closed would fail.
KEEP_ALIVE_S = 2.0

# RFC 9110 7.6.1, and what each side states for itself.
HOP_BY_HOP = frozenset(
    (
        "connection",
        "keep-alive",
        "proxy-authenticate",
        "proxy-authorization",
        "proxy-connection",
        "te",
        "trailer",
        "transfer-encoding",
        "upgrade",
    )
)
NOT_FOR_ENGINES = HOP_BY_HOP | {"host", "content-length", "content-type", "expect"}
NOT_FOR_CLIENTS = HOP_BY_HOP | {"date", "server"}

Headers = list[tuple[str, str]]
UNREACHABLE = (aiohttp.ClientError, asyncio.TimeoutError, OSError)
"""Exceptions of the session for an engine that does not answer."""
LONGEST_ID = 256
"""Characters of a client's X-Request-Id at most. Engines make it longer and send it in control messages."""


class EngineUnreachable(Exception):
    """An engine did not answer at all."""


class Engines:
    """Engines of one kind, used in turn."""

    def __init__(self, kind: str, urls: Sequence[str]) -> None:
        self.kind = kind
        self.urls = [url.rstrip("/") for url in urls]
        self._turn = itertools.cycle(self.urls)

    def next(self) -> str:
        """Return the engine whose turn it is."""
        return next(self._turn)


def open_session() -> aiohttp.ClientSession:
    """Return the session for all requests. Nothing is limited but the time that connecting takes."""
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEP_ALIVE_S),
        timeout=aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_TIMEOUT_S, sock_read=None),
        cookie_jar=aiohttp.DummyCookieJar(),
        # Bytes go through as they are, compressed or not.
        auto_decompress=False,
        skip_auto_headers=("Accept-Encoding", "User-Agent"),
        read_bufsize=2**20,
    )


def engine_headers(headers: Iterable[tuple[str, str]]) -> Headers:
    """Return the client's headers without those that belong to its connection to the proxy."""
    return [(name, value) for name, value in headers if name.lower() not in NOT_FOR_ENGINES]


def with_request_id(headers: Headers) -> Headers:
    """Return the headers with one X-Request-Id that engines can use: the client's, or a new one if that is unfit."""
    given = [value for name, value in headers if name.lower() == "x-request-id"]
    if len(given) == 1 and 0 < len(given[0]) <= LONGEST_ID and given[0].isascii() and given[0].isprintable():
        return headers
    others = [(name, value) for name, value in headers if name.lower() != "x-request-id"]
    return [*others, ("X-Request-Id", uuid.uuid4().hex)]


def client_headers(headers: Iterable[tuple[str, str]]) -> list[tuple[bytes, bytes]]:
    """Return an engine's headers for the client, in ASGI's form."""
    return [
        (name.lower().encode("latin-1"), value.encode("latin-1"))
        for name, value in headers
        if name.lower() not in NOT_FOR_CLIENTS
    ]


async def is_healthy(session: aiohttp.ClientSession, url: str) -> bool:
    """Say whether the engine answers /health with 200 within five seconds."""
    timeout = aiohttp.ClientTimeout(total=HEALTH_TIMEOUT_S)
    try:
        async with session.get(f"{url}/health", timeout=timeout) as answer:
            return answer.status == 200
    except (TimeoutError, aiohttp.ClientError, OSError):
        return False
