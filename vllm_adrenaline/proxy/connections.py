"""The connections of the proxy's clients: how many there are, and how long each may keep the proxy waiting.

uvicorn 0.54 bounds neither: a connection that never sends a whole request stays. h11 bounds the size of the headers.
"""

from __future__ import annotations

import asyncio
import json
import uuid
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from vllm_adrenaline.proxy import errors
from vllm_adrenaline.proxy.counts import Counts
from vllm_adrenaline.proxy.limits import Limits

LINGER_S = 2.0
"""Time that a client has to send the rest of a body that nobody wants. To close at once could cost it the answer."""


class Connections:
    """All connections. Those that owe the headers of a request are known, in the order in which they began to."""

    def __init__(self, limits: Limits, counts: Counts) -> None:
        self.limits, self.counts = limits, counts
        self._silent: dict[LimitedProtocol, None] = {}

    def protocol(self, **options: Any) -> LimitedProtocol:
        """Return the protocol of a new connection, as uvicorn makes it."""
        return LimitedProtocol(self, **options)

    def owes_headers(self, connection: LimitedProtocol, owes: bool) -> None:
        """Note whether a connection owes the headers of a request."""
        if owes:
            self._silent.setdefault(connection)
        else:
            self._silent.pop(connection, None)

    def make_room(self, connections: int) -> bool:
        """Close the connection that has been silent longest, if there are too many. Say whether there is room."""
        if connections <= self.limits.max_connections:
            return True
        self.counts.refused.labels("connections").inc()
        oldest = next(iter(self._silent), None)
        if oldest is None:
            return False
        self.owes_headers(oldest, False)
        oldest.drop()
        return True


class LimitedProtocol(H11Protocol):
    """A connection that is closed when its client does not send in time what it has to."""

    def __init__(self, all_connections: Connections, **options: Any) -> None:
        super().__init__(**options)
        self._all = all_connections
        self._deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Take a new connection, or close it if there are too many that do something."""
        super().connection_made(transport)
        if not self._all.make_room(len(self.connections)):
            transport.abort()
        self._all.counts.connections.set(len(self.connections))
        self._has(self._all.limits.head_seconds, "silent")
        self._all.owes_headers(self, True)

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the connection."""
        self._all.owes_headers(self, False)
        self._stop()
        super().connection_lost(exc)
        self._all.counts.connections.set(len(self.connections))

    def data_received(self, data: bytes) -> None:
        """Take what the client sends; once its headers are there, it owes none."""
        super().data_received(data)
        owes = self.conn.their_state is h11.IDLE and not self.transport.is_closing()
        if owes and self._deadline is None:
            self._has(self._all.limits.head_seconds, "silent")
        elif not owes and not self._lingers:
            self._stop()
        self._all.owes_headers(self, owes)

    def on_response_complete(self) -> None:
        """Wait for the next request; of one whose body is not there yet, for the rest of that, but not long."""
        super().on_response_complete()
        if self.transport.is_closing():
            return
        if self._lingers:
            self._has(LINGER_S, "body")
        elif self.conn.their_state is h11.IDLE:  # uvicorn closes it when it stays so (timeout_keep_alive)
            self._all.owes_headers(self, True)

    @property
    def _lingers(self) -> bool:
        return self.conn.our_state is h11.DONE and self.conn.their_state is h11.SEND_BODY

    def _has(self, seconds: float, reason: str) -> None:
        self._stop()
        self._deadline = self.loop.call_later(seconds, self._late, reason)

    def _stop(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _late(self, reason: str) -> None:
        self._all.counts.refused.labels(reason).inc()
        self.drop()

    def drop(self) -> None:
        """Close the connection at once."""
        self.transport.abort()

    def send_400_response(self, msg: str) -> None:
        """Answer what is no HTTP, or has too large headers, in the shape of all errors."""
        self._all.counts.refused.labels("http").inc()
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            text = f"no HTTP request, or its headers have more than {self._all.limits.max_header_bytes} bytes"
            body = json.dumps(errors.content(400, text)).encode()
            headers = [
                (b"content-type", b"application/json"),
                (b"content-length", str(len(body)).encode()),
                (errors.REQUEST_ID.lower().encode(), uuid.uuid4().hex.encode()),
                (b"connection", b"close"),
            ]
            for event in (h11.Response(status_code=400, headers=headers), h11.Data(data=body), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event) or b"")
        self.transport.close()
