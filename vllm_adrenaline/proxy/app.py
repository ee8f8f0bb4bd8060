"""The proxy: an OpenAI-compatible ASGI application in front of prefill and decode engines.

It is one process and has no state but its HTTP sessions and its counts.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from vllm_adrenaline.proxy import engine_file, room
from vllm_adrenaline.proxy.apis import APIS, FORWARDED
from vllm_adrenaline.proxy.counts import Counts
from vllm_adrenaline.proxy.engine_file import EngineLists
from vllm_adrenaline.proxy.errors import error_response
from vllm_adrenaline.proxy.generate import Generate
from vllm_adrenaline.proxy.guard import DRAINING, Guard, request_id
from vllm_adrenaline.proxy.limits import Limits
from vllm_adrenaline.proxy.shared import Shared
from vllm_adrenaline.proxy.state import StatePages
from vllm_adrenaline.proxy.upstream import Engine, EngineFailed, Engines, client_headers, engine_headers

logger = logging.getLogger(__name__)

PAGE_TIMEOUT_S = 30.0
METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Pages:
    """The endpoints that do not generate."""

    def __init__(self, prefill: Engines, decode: Engines, counts: Counts) -> None:
        self._prefill, self._decode = prefill, decode
        self._counts = counts
        self._health = Shared(self._ask)
        self.guard: Guard

    @property
    def _engines(self) -> list[Engine]:
        return [*self._prefill.all, *self._decode.all]

    async def live(self, _: Request) -> Response:
        """Answer 200: the proxy itself runs."""
        return JSONResponse({"status": "ok"})

    async def health(self, request: Request) -> Response:
        """Answer 200 when every engine is healthy, else 503 with the numbers of those that are not."""
        ill = [engine.kind for engine, good in await self._health.get() if not good]
        if not ill:
            return JSONResponse({"status": "ok"})
        names = ", ".join(f"{ill.count(kind)} {kind} engine(s)" for kind in dict.fromkeys(ill))
        return error_response(503, f"not healthy: {names}", request_id(request.scope))

    async def ready(self, request: Request) -> Response:
        """Answer 200 when requests can be answered: a decode engine is healthy, and the proxy is not about to end."""
        if self.guard.drains:
            return error_response(503, DRAINING, request_id(request.scope))
        if any(good for engine, good in await self._health.get() if engine.kind == self._decode.kind):
            return JSONResponse({"status": "ok"})
        return error_response(503, "no decode engine is healthy", request_id(request.scope))

    async def _ask(self) -> list[tuple[Engine, bool]]:
        """Return all engines, and whether they are healthy."""
        engines = self._engines
        return list(zip(engines, await asyncio.gather(*(engine.is_healthy() for engine in engines)), strict=True))

    async def models(self, request: Request) -> Response:
        """Answer with a decode engine's list of models."""
        return await self._page(self._decode.choose(), "/v1/models", request)

    async def version(self, request: Request) -> Response:
        """Answer with a decode engine's version of vLLM."""
        return await self._page(self._decode.choose(), "/version", request)

    async def metrics(self, _: Request) -> Response:
        """Answer with the proxy's own metrics."""
        self._counts.outstanding.clear()
        for engine in self._engines:
            self._counts.outstanding.labels(engine.name).set(engine.outstanding)
        return Response(self._counts.text(), media_type=METRICS_TYPE)

    async def engines(self, _: Request) -> Response:
        """Answer with the engines by name: kind, what they have to do, and whether they could be reached last."""
        return JSONResponse(
            [
                {
                    "name": each.name,
                    "kind": each.kind,
                    "available": not each.is_down,
                    "outstanding_tokens": each.outstanding,
                }
                for each in self._engines
            ]
        )

    async def engine_metrics(self, request: Request) -> Response:
        """Answer with the metrics of one engine, by its name."""
        engine = next((each for each in self._engines if each.name == request.path_params["name"]), None)
        if engine is None:
            raise HTTPException(404, "there is no such engine")
        return await self._page([engine], "/metrics", request)

    async def _page(self, engines: Sequence[Engine], path: str, request: Request) -> Response:
        """Answer with a page of the first of these engines that answers."""
        name = request_id(request.scope)
        for engine in engines:
            try:
                headers = engine_headers(request.headers, name)
                status, given, content = await engine.get(path, headers, PAGE_TIMEOUT_S)
            except EngineFailed as failed:
                self._counts.failures.labels(failed.kind, failed.what).inc()
                logger.warning("%s (request %s)", failed, name)
                continue
            if status >= 500:
                logger.warning("the %s engine at %s: status %d (request %s)", engine.kind, engine.address, status, name)
                return error_response(status, f"the {engine.kind} engine failed", name)
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
    engines: EngineLists,
    limits: Limits | None = None,
    api_key: str | None = None,
    counts: Counts | None = None,
    watched: Path | None = None,
) -> Guard:
    """Return the application in front of these engines; they follow the file `watched`.

    Without a prefill engine, requests go to the decode engines as they are. With an `api_key`, clients must send it.
    """
    limits, counts = limits or Limits(), counts or Counts()
    kinds = prefill, decode = Engines("prefill"), Engines("decode")
    state = StatePages(lambda: [*prefill.all, *decode.all], counts)
    pages, generate = Pages(prefill, decode, counts), Generate(prefill, decode, limits, counts)

    def have(lists: EngineLists) -> None:
        for each in kinds:
            each.replace(lists.of(each.kind))
            counts.engines.labels(each.kind).set(len(each.all))

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        have(engines)
        watchers = [asyncio.create_task(room.watch(decode))]
        if watched:
            watchers.append(asyncio.create_task(engine_file.watch(watched, engines, have)))
        yield
        for watcher in watchers:
            watcher.cancel()
        for each in kinds:
            await each.close()

    app = Starlette(
        routes=[
            Route("/", state.page),
            Route("/adrenaline/state", state.state),
            Route("/live", pages.live),
            Route("/health", pages.health),
            Route("/ready", pages.ready),
            Route("/version", pages.version),
            Route("/metrics", pages.metrics),
            Route("/engines", pages.engines),
            Route("/engines/{name}/metrics", pages.engine_metrics),
            Route("/v1/models", pages.models),
            *(Route(path, generate, methods=["POST"]) for path in (*APIS, *FORWARDED)),
        ],
        exception_handlers={HTTPException: _http_error},
        lifespan=lifespan,
    )
    pages.guard = Guard(app, limits, api_key, counts)
    return pages.guard
