"""What the proxy's page shows: the page itself, and what the engines do, asked at most once a second."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response

from vllm_adrenaline.proxy.counts import Counts
from vllm_adrenaline.proxy.shared import Shared
from vllm_adrenaline.proxy.snapshot import Recent
from vllm_adrenaline.proxy.upstream import Engine
from vllm_adrenaline.system import web_page

KEPT_S = 1.0
"""How long an answer is given again. So engines are asked once a second, however many look."""
MOST_ENGINES = 32
"""Engines that are asked, so that the answer is bounded."""


class StatePages:
    """The page at / and the JSON that it reads at /adrenaline/state."""

    def __init__(self, engines: Callable[[], Sequence[Engine]], counts: Counts) -> None:
        self._engines, self._counts = engines, counts
        self._recent: dict[str, Recent] = {}
        self._told = Shared(self._ask, KEPT_S)
        self._page = web_page.complete(Path(__file__).with_name("page.html").read_text())
        self._headers = {
            "Content-Security-Policy": web_page.content_security_policy(self._page),
            "X-Content-Type-Options": "nosniff",
            "Referrer-Policy": "no-referrer",
        }

    async def page(self, _: Request) -> Response:
        """Answer with the page, which is the same for everybody and says nothing of the engines."""
        return HTMLResponse(self._page, headers=self._headers)

    async def state(self, _: Request) -> Response:
        """Answer with what the proxy and its engines do. Addresses are left out."""
        return JSONResponse(await self._told.get(), headers={"Cache-Control": "no-store"})

    async def _ask(self) -> dict[str, Any]:
        engines = self._engines()
        asked = engines[:MOST_ENGINES]
        told = await asyncio.gather(*(self._of(engine) for engine in asked))
        names = {engine.name for engine in asked}
        self._recent = {name: recent for name, recent in self._recent.items() if name in names}
        return {"proxy": self._counts.totals(), "engines": told, "more": len(engines) - len(asked)}

    async def _of(self, engine: Engine) -> dict[str, Any]:
        """Return an engine's state and rates; None for those where it does not answer."""
        found: dict[str, Any] = {"name": engine.name, "kind": engine.kind, "available": not engine.is_down}
        found |= {"outstanding_tokens": engine.outstanding, "state": None, "rates": None}
        try:
            if (metrics := await engine.metrics()) is not None:
                recent = self._recent.setdefault(engine.name, Recent())
                rates = recent.rates(time.monotonic(), metrics.counters())
                found |= {"state": metrics.state(), "rates": rates}
        except (ValueError, KeyError):  # what is there is no engine
            pass
        return found
