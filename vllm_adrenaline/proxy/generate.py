"""Generation: a request runs on a prefill, then on a decode engine, whose answer goes through untouched, as it comes.

What fails before the client has a byte is done elsewhere where it can be, and is an error in words otherwise. Of an
answer that has begun nothing is taken back: a stream ends with an error event, anything else is cut.
"""

from __future__ import annotations

import asyncio
import json
import logging
import secrets
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from vllm_adrenaline.proxy import bodies, errors, release
from vllm_adrenaline.proxy.apis import APIS, Api
from vllm_adrenaline.proxy.counts import Counts
from vllm_adrenaline.proxy.errors import Refused, error_response
from vllm_adrenaline.proxy.guard import Bodies, request_id
from vllm_adrenaline.proxy.limits import Limits
from vllm_adrenaline.proxy.upstream import (
    UNREACHABLE,
    Engine,
    EngineFailed,
    Engines,
    Headers,
    client_headers,
    engine_headers,
    unreachable,
)

logger = logging.getLogger(__name__)

EVENTS = "text/event-stream"
LOGGED = 500
"""Bytes of an engine's error that go to the log."""


class ClientGone(Exception):
    """The client closed its connection before the request was complete, or takes nothing of its answer."""


class Generate:
    """The endpoints that engines do work for: those that generate, e.g. /v1/completions, and others with a body."""

    def __init__(self, prefill: Engines, decode: Engines, limits: Limits, counts: Counts) -> None:
        self._prefill, self._decode, self._limits, self._counts = prefill, decode, limits, counts
        self._bodies = Bodies(limits)
        self._releases = release.Releases(decode)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request. All work for it stops as soon as the client is gone."""
        name = request_id(scope)
        try:
            with self._bodies.share() as take:
                raw = await self._read(Request(scope), receive, take)
                work = asyncio.create_task(self._answer(scope, raw, send, name))
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
            self._counts.refused.labels("body").inc()
            await error_response(refused.status, refused.message, name, refused.param)(scope, receive, send)
        except EngineFailed as failed:
            self._note(failed, name)
            status, text = (504, "is silent") if failed.what == "silent" else (503, "does not answer")
            await error_response(status, f"the {failed.kind} engine {text}", name)(scope, receive, send)

    def _note(self, failed: EngineFailed, name: str) -> None:
        self._counts.failures.labels(failed.kind, failed.what).inc()
        logger.warning("%s (request %s)", failed, name)

    async def _read(self, request: Request, receive: Receive, take: Callable[[int], None]) -> bytes:
        """Return the body. `take` bounds it, as it comes; what the client says of its length is heard first."""
        length = request.headers.get("content-length", "0")
        if length.isdecimal() and int(length) > self._limits.max_body_bytes:
            take(int(length))
        parts = bytearray()
        try:
            async with asyncio.timeout(self._limits.body_seconds):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise ClientGone
                    part = message.get("body", b"")
                    take(len(part))
                    parts += part
                    if not message.get("more_body", False):
                        return bytes(parts)
        except TimeoutError:
            late = f"the request's body did not come within {self._limits.body_seconds:g} s"
            raise Refused(408, late) from None

    async def _answer(self, scope: Scope, raw: bytes, send: Send, name: str) -> None:
        body = bodies.parse(raw)
        path: str = scope["path"]
        api = APIS.get(path)
        answer = _Sender(self._limits, path, engine_headers(Request(scope).headers, name), send, name)
        if api is None or not self._prefill.all:
            return await self._decoded(answer, raw)
        if not bodies.can_disaggregate(api, body):
            self._counts.whole.inc()
            return await self._decoded(answer, raw)
        if await self._decode.are_down():  # else prompts would be computed that nobody can decode
            raise EngineFailed(self._decode.all[0], "unreachable", "it is not healthy again")
        found = await self._prefilled(path, api, body, answer.headers, name)
        if found is None:
            self._counts.without_prefill.inc()
            return await self._decoded(answer, raw)
        engine, content = found
        if isinstance(content, Response):
            return await content(scope, _nothing, send)
        params = bodies.params_of(content)
        if bodies.stays(params):
            try:
                return await answer.pass_on(engine, raw)
            except EngineFailed as failed:
                if failed.what == "silent":
                    raise
                self._note(failed, name)  # the client has nothing yet: any decode engine will do
                return await self._decoded(answer, raw)
        if params is None:
            return await self._decoded(answer, raw)
        try:
            await self._decoded(answer, bodies.encode(bodies.for_decode(body, params)))
        finally:  # also when the client is gone
            if not answer.taken:
                self._releases.start(body.get("model"), params, answer.headers)

    async def _prefilled(
        self, path: str, api: Api, body: bodies.Body, headers: Headers, name: str
    ) -> tuple[Engine, bytes | Response] | None:
        """Return a prefill engine and its answer, or the response for the client if it refused the request.

        None says that none of them answers: the decode engine will compute the prompt itself.
        """
        ticket = secrets.token_hex(16)
        data = bodies.encode(bodies.for_prefill(api, body, ticket))
        for engine in self._prefill.in_turn():
            if time.monotonic() < engine.rests_until:
                continue
            try:
                async with asyncio.timeout(self._limits.first_byte_seconds):
                    async with engine.post(path, data, headers) as answer:
                        content = await answer.read()
                        status, given = answer.status, answer.headers.items()
                engine.note(was_reached=True)
            except asyncio.CancelledError:  # the client is gone; the answer may be on its way
                self._releases.give_up(engine, body.get("model"), ticket, headers)
                raise
            except UNREACHABLE as error:
                failed = unreachable(engine, error)
                engine.note(was_reached=not failed.elsewhere)
                if isinstance(error, TimeoutError) and not failed.elsewhere:
                    raise EngineFailed(engine, "silent", "no answer in time") from error
                self._note(failed, name)
                continue
            if status >= 500:
                self._note(EngineFailed(engine, "error", _shown(status, content)), name)
                continue
            if status == 200:
                return engine, content
            response = Response(content, status_code=status)
            response.raw_headers = client_headers(given)
            return engine, response
        return None

    async def _decoded(self, answer: _Sender, data: bytes) -> None:
        """Send the answer of a decode engine on: of the next one that can be reached."""
        *others, last = self._decode.in_turn()
        for engine in others:
            try:
                return await answer.pass_on(engine, data)
            except EngineFailed as failed:
                if not failed.elsewhere:
                    raise
                self._note(failed, answer.name)
        await answer.pass_on(last, data)


class _Sender:
    """Sends the answer of an engine to the client. `taken` says that an engine has accepted the request."""

    def __init__(self, limits: Limits, path: str, headers: Headers, send: Send, name: str) -> None:
        self._limits, self._path, self.headers, self._send, self.name = limits, path, headers, send, name
        self.taken = self._started = False

    async def pass_on(self, engine: Engine, data: bytes) -> None:
        """Ask the engine and send on what it says. Raises EngineFailed as long as the client has nothing."""
        last, sending, events = b"", False, False
        now = asyncio.get_running_loop().time
        try:
            async with asyncio.timeout(self._limits.first_byte_seconds) as deadline:
                async with engine.post(self._path, data, self.headers) as answer:
                    engine.note(was_reached=True)
                    if answer.status >= 500:
                        return await self._error(engine, answer.status, await answer.content.read(LOGGED))
                    self.taken = answer.status < 400
                    events = answer.headers.get("Content-Type", "").startswith(EVENTS)
                    start = {"status": answer.status, "headers": client_headers(answer.headers.items())}
                    # Nothing of an answer that is whole at once is sent before its first byte is there: until then it
                    # may still become an error.
                    async for chunk in answer.content.iter_any():
                        sending = True
                        deadline.reschedule(now() + self._limits.reading_seconds)
                        if not self._started:
                            await self._begin(**start)
                        await self._send({"type": "http.response.body", "body": chunk, "more_body": True})
                        sending, last = False, chunk
                        deadline.reschedule(now() + self._limits.token_seconds)
                    if not self._started:
                        await self._begin(**start)
        except UNREACHABLE as error:
            if sending:
                raise ClientGone from error
            failed = unreachable(engine, error)
            engine.note(was_reached=not failed.elsewhere)
            if deadline.expired():
                failed = EngineFailed(engine, "silent", "silent for too long")
            if not self._started:
                raise failed from error
            return await self._broken(failed, events and last.endswith(b"\n\n"))
        await self._send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _begin(self, status: int, headers: list[tuple[bytes, bytes]]) -> None:
        await self._send({"type": "http.response.start", "status": status, "headers": headers})
        self._started = True

    async def _error(self, engine: Engine, status: int, content: bytes) -> None:
        """Answer with an engine's status. What it says is for the log: it may name files, addresses, other requests."""
        logger.warning("%s (request %s)", EngineFailed(engine, "error", _shown(status, content)), self.name)
        response = error_response(status, f"the {engine.kind} engine failed", self.name)
        await response({"type": "http"}, _nothing, self._send)

    async def _broken(self, failed: EngineFailed, between_events: bool) -> None:
        """End an answer that has begun, so that the client cannot mistake what it has for the whole."""
        logger.warning("%s, in the middle of an answer (request %s)", failed, self.name)
        if between_events:
            message = f"the {failed.kind} engine ended in the middle of its answer (request {self.name})"
            named = (api := APIS.get(self._path)) is not None and api.named_events
            event = f"{'event: error' * named}\ndata: {json.dumps(errors.content(503, message))}\n\n".lstrip()
            await self._send({"type": "http.response.body", "body": event.encode(), "more_body": False})
        # Else: returning without an end makes the server cut the connection.


def _shown(status: int, content: bytes) -> str:
    return f"status {status}: {content[:LOGGED].decode(errors='replace')}"


async def _wait_until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _nothing() -> Any:  # a response that is not streamed asks for nothing
    with suppress(asyncio.CancelledError):
        await asyncio.Event().wait()
