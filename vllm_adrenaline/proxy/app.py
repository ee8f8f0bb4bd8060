"""The proxy: an OpenAI-compatible ASGI application that runs each request on a prefill, then a decode engine.

It is one process and has no state but its HTTP session. Bodies of answers go through untouched, as they come.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from vllm_adrenaline.proxy import bodies, release
from vllm_adrenaline.proxy.errors import Refused, error_response
from vllm_adrenaline.proxy.upstream import (
    UNREACHABLE,
    Engines,
    EngineUnreachable,
    Headers,
    client_headers,
    engine_headers,
    is_healthy,
    open_session,
    with_request_id,
)

logger = logging.getLogger(__name__)

MAX_BODY_BYTES = 64 * 2**20


class ClientGone(Exception):
    """The client closed its connection before the request was complete."""


class Proxy:
    """What all endpoints share: the engines, and one HTTP session that lives as long as the application."""

    session: aiohttp.ClientSession

    def __init__(self, prefill: Engines, decode: Engines, max_body_bytes: int) -> None:
        self.prefill, self.decode, self.max_body_bytes = prefill, decode, max_body_bytes
        self.releases = release.Releases(decode)

    async def health(self, _: Request) -> Response:
        """Answer 200 when every engine is healthy, else 503 with the names of those that are not."""
        engines = [(group.kind, url) for group in (self.prefill, self.decode) for url in group.urls]
        healthy = await asyncio.gather(*(is_healthy(self.session, url) for _, url in engines))
        ill = [f"{kind} engine {url}" for (kind, url), good in zip(engines, healthy, strict=True) if not good]
        return error_response(503, f"not healthy: {', '.join(ill)}") if ill else JSONResponse({"status": "ok"})

    async def models(self, request: Request) -> Response:
        """Answer with the decode engine's list of models."""
        url = f"{self.decode.next()}/v1/models"
        timeout = aiohttp.ClientTimeout(total=30)
        try:
            async with self.session.get(
                url, headers=engine_headers(request.headers.items()), timeout=timeout
            ) as answer:
                response = Response(await answer.read(), status_code=answer.status)
                response.raw_headers = client_headers(answer.headers.items())
                return response
        except UNREACHABLE:
            return error_response(503, f"the decode engine at {url} does not answer")


class Generate:
    """An endpoint that generates, e.g. /v1/completions: first prefill, then the decode engine's answer, streamed."""

    def __init__(self, proxy: Proxy) -> None:
        self.proxy = proxy

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request. All work for it stops as soon as the client is gone."""
        try:
            raw = await self._read(Request(scope), receive)
            work = asyncio.create_task(self._answer(scope, raw, receive, send))
            gone = asyncio.create_task(_wait_until_gone(receive))
            try:
                await asyncio.wait((work, gone), return_when=asyncio.FIRST_COMPLETED)
            finally:
                # Closing the upstream connection is how vLLM learns that it should abort the request.
                for task in (work, gone):
                    task.cancel()
                done, _ = await asyncio.gather(work, gone, return_exceptions=True)
            if isinstance(done, Exception):
                raise done
        except ClientGone:
            return
        except Refused as refused:
            await error_response(refused.status, refused.message, refused.param)(scope, receive, send)
        except EngineUnreachable as error:
            logger.warning("%s", error)
            await error_response(503, str(error))(scope, receive, send)

    async def _read(self, request: Request, receive: Receive) -> bytes:
        limit = self.proxy.max_body_bytes
        too_large = Refused(413, f"the request body is larger than {limit} bytes")
        length = request.headers.get("content-length", "0")
        if length.isdecimal() and int(length) > limit:
            raise too_large
        parts, size = [], 0
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise ClientGone
            parts.append(message.get("body", b""))
            size += len(parts[-1])
            if size > limit:
                raise too_large
            if not message.get("more_body", False):
                return b"".join(parts)

    async def _answer(self, scope: Scope, raw: bytes, receive: Receive, send: Send) -> None:
        body = bodies.parse(raw)
        headers = engine_headers(Request(scope).headers.items())
        headers.append(("Content-Type", "application/json"))
        headers = with_request_id(headers)
        path: str = scope["path"]
        if not (self.proxy.prefill.urls and bodies.can_disaggregate(body)):
            return await self._generate("decode", self.proxy.decode.next(), path, raw, headers, send, asyncio.Event())
        url = self.proxy.prefill.next()
        answer = await self._prefill(url, path, body, headers)
        if isinstance(answer, Response):
            return await answer(scope, receive, send)
        params, taken = bodies.params_of(answer), asyncio.Event()
        if bodies.stays(params):
            try:
                return await self._generate("prefill", url, path, raw, headers, send, taken)
            except EngineUnreachable as error:  # it has computed nothing: any decode engine will do
                logger.warning("%s", error)
                return await self._generate("decode", self.proxy.decode.next(), path, raw, headers, send, taken)
        try:
            raw = json.dumps(bodies.for_decode(body, params)).encode()
            await self._generate("decode", self.proxy.decode.next(), path, raw, headers, send, taken)
        finally:  # also when the client is gone
            if params is not None and not taken.is_set():
                give_up = release.body_of(body.get("model"), params)
                self.proxy.releases.start(self.proxy.session, give_up, headers)

    async def _prefill(self, url: str, path: str, body: dict[str, Any], headers: Headers) -> bytes | Response:
        """Return the prefill engine's answer. If it refused the request, return the response for the client."""
        # Read here, so it has to come uncompressed.
        plain = [(name, value) for name, value in headers if name.lower() != "accept-encoding"]
        data = json.dumps(bodies.for_prefill(body)).encode()
        try:
            async with self.proxy.session.post(url + path, data=data, headers=plain, allow_redirects=False) as answer:
                content = await answer.read()
        except UNREACHABLE as error:
            raise EngineUnreachable(f"the prefill engine at {url} does not answer ({_short(error)})") from error
        if answer.status == 200:
            return content
        response = Response(content, status_code=answer.status)
        response.raw_headers = client_headers(answer.headers.items())
        return response

    async def _generate(
        self, kind: str, url: str, path: str, data: bytes, headers: Headers, send: Send, taken: asyncio.Event
    ) -> None:
        """Send the answer of an engine of this kind on. `taken` is set as soon as it has accepted the request."""
        started = False
        try:
            async with self.proxy.session.post(url + path, data=data, headers=headers, allow_redirects=False) as answer:
                if answer.status < 400:
                    taken.set()
                response_headers = client_headers(answer.headers.items())
                await send({"type": "http.response.start", "status": answer.status, "headers": response_headers})
                started = True
                async for chunk in answer.content.iter_any():
                    await send({"type": "http.response.body", "body": chunk, "more_body": True})
        except UNREACHABLE as error:
            message = f"the {kind} engine at {url} does not answer ({_short(error)})"
            if not started:
                raise EngineUnreachable(message) from error
            # The status is sent already: returning without an end makes the server cut the connection, so the client
            # cannot mistake what it has for a whole answer.
            logger.warning("%s in the middle of an answer", message)
            return
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _wait_until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _short(error: BaseException) -> str:
    return str(error) or type(error).__name__


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    response = error_response(error.status_code, f"{request.method} {request.url.path}: {error.detail}")
    response.headers.update(error.headers or {})
    return response


def create_app(prefill: Sequence[str], decode: Sequence[str], max_body_bytes: int = MAX_BODY_BYTES) -> Starlette:
    """Return the application in front of engines at these URLs (http://host:port).

    Without a prefill engine, requests go to the decode engines in turn, as they are. Raises ValueError if there is no
    decode engine.
    """
    if not decode:
        raise ValueError("at least one decode engine is needed")
    proxy = Proxy(Engines("prefill", prefill), Engines("decode", decode), max_body_bytes)

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        async with open_session() as proxy.session:
            yield

    generate = Generate(proxy)
    return Starlette(
        routes=[
            Route("/health", proxy.health),
            Route("/v1/models", proxy.models),
            Route("/v1/completions", generate, methods=["POST"]),
            Route("/v1/chat/completions", generate, methods=["POST"]),
        ],
        exception_handlers={HTTPException: _http_error},
        lifespan=lifespan,
    )
