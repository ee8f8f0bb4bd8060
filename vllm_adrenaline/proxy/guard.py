"""What a request passes before anything is done for it: its name, the API key, the number of requests under way."""

from __future__ import annotations

import hmac
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from vllm_adrenaline.proxy.counts import Counts
from vllm_adrenaline.proxy.errors import REQUEST_ID, Refused, error_response
from vllm_adrenaline.proxy.limits import BODIES, Limits
from vllm_adrenaline.proxy.upstream import authorization

OPEN = ("/", "/health", "/live", "/ready")
"""Paths that need no key and are never too many: whoever watches over the proxy asks there. The page at / is the same
for everybody; what it shows needs the key."""
DRAINING = "this server is about to end"
LONGEST_ID = 256
"""Characters of a client's X-Request-Id at most. Engines make it longer and send it in control messages."""


def request_id(scope: Scope) -> str:
    """Return the name that the guard gave to a request."""
    return str(scope["state"]["request_id"])


def name_of(headers: Headers) -> str:
    """Return the client's X-Request-Id, or a new one if that is unfit for engines."""
    given = headers.getlist(REQUEST_ID)
    fit = len(given) == 1 and 0 < len(given[0]) <= LONGEST_ID and given[0].isascii() and given[0].isprintable()
    return given[0] if fit else uuid.uuid4().hex


class Guard:
    """An ASGI application around another one: it lets through who may pass.

    `under_way`: the requests that are being answered. `drains`: these are the last ones.
    """

    def __init__(self, app: ASGIApp, limits: Limits, api_key: str | None, counts: Counts) -> None:
        self._app, self._limits, self._counts = app, limits, counts
        self._wanted = None if api_key is None else f"Bearer {api_key}".encode()
        self.under_way, self.drains = 0, False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a request, or refuse it."""
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        headers = Headers(scope=scope)
        name = scope.setdefault("state", {})["request_id"] = name_of(headers)
        if scope["path"] in OPEN:
            return await self._app(scope, receive, send)
        refusal = self._refusal(scope, headers)
        if refusal is not None:
            reason, status, message = refusal
            self._counts.refused.labels(reason).inc()
            response = error_response(status, message, name)
            if self.drains:
                response.headers["Connection"] = "close"  # the next request goes elsewhere
            return await response(scope, receive, send)
        self.under_way += 1
        self._counts.under_way.set(self.under_way)
        try:
            await self._app(scope, receive, send)
        finally:
            self.under_way -= 1
            self._counts.under_way.set(self.under_way)

    def _refusal(self, scope: Scope, headers: Headers) -> tuple[str, int, str] | None:
        # The HTTP parser has a limit too, but a head that comes in one piece passes it.
        size = sum(len(name) + len(value) for name, value in scope["headers"]) + len(scope.get("raw_path", b""))
        if size + len(scope["query_string"]) > self._limits.max_header_bytes:
            return "headers", 431, f"the request's headers have more than {self._limits.max_header_bytes} bytes"
        given = authorization(headers).encode("latin-1")
        if self._wanted is not None and not hmac.compare_digest(given, self._wanted):
            return "key", 401, "this server wants an API key: Authorization: Bearer KEY"
        if self.drains:
            return "draining", 503, DRAINING
        if self.under_way >= self._limits.max_requests:
            return "requests", 429, f"{self.under_way} requests are under way already"
        return None


class Bodies:
    """The bytes of request bodies that the proxy holds, of all requests together."""

    def __init__(self, limits: Limits) -> None:
        self._most, self._left = limits.max_body_bytes, BODIES * limits.max_body_bytes

    @contextmanager
    def share(self) -> Iterator[Callable[[int], None]]:
        """Give a request a function that takes some bytes more for it; they are given back at the end.

        The function raises Refused when the request has too many, or all together have.
        """
        taken = 0

        def take(count: int) -> None:
            nonlocal taken
            if taken + count > self._most:
                raise Refused(413, f"the request body is larger than {self._most} bytes")
            if count > self._left:
                raise Refused(429, "the bodies of the requests under way are too large together")
            taken += count
            self._left -= count

        try:
            yield take
        finally:
            self._left += taken
