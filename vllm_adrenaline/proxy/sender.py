"""The answer of an engine on its way to the client: untouched, and as it comes."""

from __future__ import annotations

import asyncio
import json
import logging

from starlette.types import Send

from vllm_adrenaline.proxy import errors
from vllm_adrenaline.proxy.apis import APIS
from vllm_adrenaline.proxy.limits import Limits
from vllm_adrenaline.proxy.upstream import UNREACHABLE, Engine, EngineFailed, Headers, client_headers, unreachable

logger = logging.getLogger(__name__)

EVENTS = "text/event-stream"
LOGGED = 500
"""Bytes of an engine's error that go to the log."""


class ClientGone(Exception):
    """The client closed its connection before the request was complete, or takes nothing of its answer."""


class Sender:
    """Sends the answer of an engine to the client. `taken` says that an engine has accepted the request."""

    def __init__(self, limits: Limits, path: str, headers: Headers, send: Send, name: str) -> None:
        self._limits, self._send = limits, send
        self.path, self.headers, self.name = path, headers, name
        self.taken = self._started = False

    async def pass_on(self, engine: Engine, data: bytes) -> None:
        """Ask the engine and send on what it says. Raises EngineFailed as long as the client has nothing."""
        last, sending, events, tokens = b"", False, False, False
        awaited = b"" if (api := APIS.get(self.path)) is None else api.first_token
        limits, now = self._limits, asyncio.get_running_loop().time
        try:
            async with asyncio.timeout(limits.first_byte_seconds) as deadline:
                async with engine.post(self.path, data, self.headers) as answer:
                    engine.note(was_reached=True)
                    if answer.status >= 500:
                        shown = said(answer.status, await answer.content.read(LOGGED))
                        raise EngineFailed(engine, "error", shown, status=answer.status)
                    self.taken = answer.status < 400
                    events = answer.headers.get("Content-Type", "").startswith(EVENTS)
                    start = {"status": answer.status, "headers": client_headers(answer.headers.items())}
                    # Nothing of an answer that is whole at once is sent before its first byte is there: until then it
                    # may still become an error.
                    async for chunk in answer.content.iter_any():
                        sending = True
                        deadline.reschedule(now() + limits.reading_seconds)
                        if not self._started:
                            await self._begin(**start)
                        await self._send({"type": "http.response.body", "body": chunk, "more_body": True})
                        sending, last, tokens = False, chunk, tokens or awaited in chunk
                        deadline.reschedule(now() + (limits.token_seconds if tokens else limits.first_byte_seconds))
                    if not self._started:
                        await self._begin(**start)
        except UNREACHABLE as error:
            if sending:
                raise ClientGone from error
            failed = unreachable(engine, error)
            engine.note(was_reached=not failed.elsewhere)
            if deadline.expired():
                failed = EngineFailed(engine, "silent", "silent for too long", status=504)
            if not self._started:
                raise failed from error
            return await self._broken(failed, events and last.endswith(b"\n\n"))
        await self._send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _begin(self, status: int, headers: list[tuple[bytes, bytes]]) -> None:
        await self._send({"type": "http.response.start", "status": status, "headers": headers})
        self._started = True

    async def _broken(self, failed: EngineFailed, between_events: bool) -> None:
        """End an answer that has begun, so that the client cannot mistake what it has for the whole."""
        logger.warning("%s, in the middle of an answer (request %s)", failed, self.name)
        if between_events:
            message = f"the {failed.kind} engine ended in the middle of its answer (request {self.name})"
            named = (api := APIS.get(self.path)) is not None and api.named_events
            event = f"{'event: error' * named}\ndata: {json.dumps(errors.content(503, message))}\n\n".lstrip()
            await self._send({"type": "http.response.body", "body": event.encode(), "more_body": False})
        # Else: returning without an end makes the server cut the connection.


def said(status: int, content: bytes) -> str:
    """Return what an engine said of its failure. It is for the log: it may name files, addresses, other requests."""
    return f"status {status}: {content[:LOGGED].decode(errors='replace')}"
