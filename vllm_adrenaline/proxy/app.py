"""The proxy: an OpenAI-compatible ASGI application in front of prefill and decode engines.

It is one process and has no state but its HTTP sessions and its counts.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp

from vllm_adrenaline.proxy.counts import Counts
from vllm_adrenaline.proxy.errors import error_response
from vllm_adrenaline.proxy.generate import Generate
from vllm_adrenaline.proxy.guard import Guard, request_id
from vllm_adrenaline.proxy.limits import Limits
from vllm_adrenaline.proxy.upstream import Engine, EngineFailed, Engines, client_headers, engine_headers

logger = logging.getLogger(__name__)

PAGE_TIMEOUT_S = 30.0
METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Pages:
    """The endpoints that do not generate."""

    def __init__(self, prefill: Engines, decode: Engines, counts: Counts) -> None:
        self._engines = {"prefill": prefill, "decode": decode}
        self._counts = counts
        self._asking: asyncio.Task[list[bool]] | None = None

    async def live(self, _: Request) -> Response:
        """Answer 200: the proxy itself runs."""
        return JSONResponse({"status": "ok"})

    async def health(self, request: Request) -> Response:
        """Answer 200 when every engine is healthy, else 503 with the names of those that are not.

        The engines are asked once for all who ask at the same time.
        """
        engines = [engine for kind in self._engines.values() for engine in kind.all]
        if self._asking is None or self._asking.done():
            self._asking = asyncio.create_task(self._healthy(engines))
        healthy = await asyncio.shield(self._asking)
        ill = [engine.kind for engine, good in zip(engines, healthy, strict=True) if not good]
        if not ill:
            return JSONResponse({"status": "ok"})
        names = ", ".join(f"{ill.count(kind)} {kind} engine(s)" for kind in dict.fromkeys(ill))
        return error_response(503, f"not healthy: {names}", request_id(request.scope))

    async def _healthy(self, engines: Sequence[Engine]) -> list[bool]:
        return await asyncio.gather(*(engine.is_healthy() for engine in engines))

    async def models(self, request: Request) -> Response:
        """Answer with a decode engine's list of models."""
        return await self._page(self._engines["decode"].in_turn(), "/v1/models", request)

    async def metrics(self, _: Request) -> Response:
        """Answer with the proxy's own metrics."""
        return Response(self._counts.text(), media_type=METRICS_TYPE)

    async def engine_metrics(self, request: Request) -> Response:
        """Answer with the metrics of one engine: by its kind, and its number if there are several."""
        kind, number = request.path_params["kind"], request.path_params.get("number", 0)
        engines = self._engines[kind].all if kind in self._engines else []
        if number >= len(engines):
            raise HTTPException(404, "there is no such engine")
        return await self._page([engines[number]], "/metrics", request)

    async def _page(self, engines: Sequence[Engine], path: str, request: Request) -> Response:
        """Answer with a page of the first of these engines that answers."""
        name = request_id(request.scope)
        for engine in engines:
            try:
                headers = engine_headers(request.headers.items(), name)
                status, given, content = await engine.get(path, headers, PAGE_TIMEOUT_S)
            except EngineFailed as failed:
                self._counts.failures.labels(failed.kind, failed.what).inc()
                logger.warning("%s (request %s)", failed, name)
                continue
            response = Response(content, status_code=status)
            response.raw_headers = client_headers(given)
            return response
        return error_response(503, f"no {engines[0].kind} engine answers", name)


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    response = error_response(error.status_code, error.detail, request_id(request.scope))
    response.headers.update(error.headers or {})
    return response


def create_app(
    prefill: Sequence[str],
    decode: Sequence[str],
    limits: Limits | None = None,
    api_key: str | None = None,
    counts: Counts | None = None,
) -> ASGIApp:
    """Return the application in front of engines at these addresses (upstream.Engine).

    Without a prefill engine, requests go to the decode engines in turn, as they are. With an `api_key`, clients must
    send it. Raises ValueError if there is no decode engine.
    """
    if not decode:
        raise ValueError("at least one decode engine is needed")
    limits, counts = limits or Limits(), counts or Counts()
    kinds = Engines("prefill", prefill), Engines("decode", decode)
    for engines in kinds:
        counts.engines.labels(engines.kind).set(len(engines.all))
    pages, generate = Pages(*kinds, counts), Generate(*kinds, limits, counts)

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        async with AsyncExitStack() as stack:
            for engines in kinds:
                await engines.open(stack)
            yield

    app = Starlette(
        routes=[
            Route("/live", pages.live),
            Route("/health", pages.health),
            Route("/metrics", pages.metrics),
            Route("/{kind}/metrics", pages.engine_metrics),
            Route("/{kind}/{number:int}/metrics", pages.engine_metrics),
            Route("/v1/models", pages.models),
            Route("/v1/completions", generate, methods=["POST"]),
            Route("/v1/chat/completions", generate, methods=["POST"]),
        ],
        exception_handlers={HTTPException: _http_error},
        lifespan=lifespan,
    )
    return Guard(app, limits, api_key, counts)
