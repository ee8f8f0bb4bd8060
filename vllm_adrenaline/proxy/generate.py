"""Generation: a request runs on a prefill, then on a decode engine, whose answer goes through untouched, as it comes.

What fails before the client has a byte is done elsewhere where it can be, and is an error in words otherwise. Of an
answer that has begun nothing is taken back: a stream ends with an error event, anything else is cut.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from vllm_adrenaline.proxy import bodies, choice
from vllm_adrenaline.proxy.apis import APIS, Api
from vllm_adrenaline.proxy.counts import Counts
from vllm_adrenaline.proxy.errors import Refused, error_response
from vllm_adrenaline.proxy.guard import Bodies, request_id
from vllm_adrenaline.proxy.limits import Limits
from vllm_adrenaline.proxy.release import Releases
from vllm_adrenaline.proxy.sender import ClientGone, Sender, said
from vllm_adrenaline.proxy.upstream import (
    UNREACHABLE,
    Engine,
    EngineFailed,
    Engines,
    client_headers,
    engine_headers,
    unreachable,
)

logger = logging.getLogger(__name__)

SESSION = "x-session-id"
"""The header that keeps requests together; vLLM has the same one."""
LONG_ANSWER = 1024
"""Tokens that count of an answer whose limit is higher. Most end earlier."""


@dataclass(frozen=True)
class _Prompt:
    """What the choice of an engine goes by: tokens of prompt and answer, beginnings of the prompt, the session."""

    tokens: int
    answer_tokens: int
    beginnings: choice.Beginnings
    session: str | None


class Generate:
    """The endpoints that engines do work for: those that generate, e.g. /v1/completions, and others with a body."""

    def __init__(self, prefill: Engines, decode: Engines, limits: Limits, counts: Counts) -> None:
        self._prefill, self._decode, self._limits, self._counts = prefill, decode, limits, counts
        self._bodies = Bodies(limits)
        self._releases = Releases()

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
            text = {"silent": "is silent", "error": "failed"}.get(failed.what, "does not answer")
            await error_response(failed.status, f"the {failed.kind} engine {text}", name)(scope, receive, send)

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
        headers = Request(scope).headers
        path: str = scope["path"]
        api = APIS.get(path)
        answer = Sender(self._limits, path, engine_headers(headers, name), send, name)
        prompt = self._prompt(api, body, headers.get(SESSION))
        if api is None or not self._prefill.all:
            return await self._decoded(answer, raw, prompt)
        if not bodies.can_disaggregate(api, body):
            self._counts.whole.inc()
            return await self._decoded(answer, raw, prompt)
        if await self._decode.are_down():  # else prompts would be computed that nobody can decode
            raise EngineFailed(self._decode.all[0], "unreachable", "it is not healthy again")
        ticket = secrets.token_hex(16)
        data = bodies.encode(bodies.for_prefill(api, body, ticket))

        def give_up(engine: Engine) -> None:
            self._releases.give_up(engine, body.get("model"), ticket, answer.headers)

        found = await self._prefilled(answer, data, prompt, give_up)
        if found is None:
            self._counts.without_prefill.inc()
            return await self._decoded(answer, raw, prompt)
        engine, content = found
        if isinstance(content, Response):
            return await content(scope, _nothing, send)
        params = bodies.params_of(content)
        if bodies.stays(params):
            try:
                return await self._ask(engine, answer, raw, prompt)
            except EngineFailed as failed:
                if failed.what == "silent":
                    raise
                self._note(failed, name)  # the client has nothing yet: any decode engine will do
                return await self._decoded(answer, raw, prompt)
        if params is None:
            return await self._decoded(answer, raw, prompt)
        try:
            await self._decoded(answer, bodies.encode(bodies.for_decode(body, params)), prompt)
        finally:  # also when the client is gone
            if not answer.taken:
                give_up(engine)

    def _prompt(self, api: Api | None, body: bodies.Body, session: str | None) -> _Prompt:
        if api is None:
            return _Prompt(0, 0, (), session)
        parts = [memoryview(body[field]) for field in api.prompt if field in body]
        tokens = sum(len(part) for part in parts) // choice.BYTES_PER_TOKEN
        compared = choice.beginnings(parts) if len(self._prefill.all) > 1 else ()
        return _Prompt(tokens, min(bodies.limit_of(api, body), LONG_ANSWER), compared, session)

    async def _prefilled(
        self, answer: Sender, data: bytes, prompt: _Prompt, give_up: Callable[[Engine], None]
    ) -> tuple[Engine, bytes | Response] | None:
        """Return a prefill engine and its answer, or the response for the client if it refused the request.

        None says that none of them answers: the decode engine will compute the prompt itself. `give_up` is called with
        an engine that may have a prompt that nobody will take.
        """
        for engine in self._prefill.choose(prompt.beginnings, prompt.session):
            if time.monotonic() < engine.rests_until:
                continue
            self._prefill.remember(prompt.beginnings, engine)
            self._counts.requests.labels(engine.name).inc()
            try:
                with engine.carrying(prompt.tokens):
                    async with asyncio.timeout(self._limits.first_byte_seconds):
                        async with engine.post(answer.path, data, answer.headers) as got:
                            content = await got.read()
                            status, given = got.status, got.headers.items()
                engine.note(was_reached=True)
            except asyncio.CancelledError:  # the client is gone; the answer may be on its way
                give_up(engine)
                raise
            except UNREACHABLE as error:
                failed = unreachable(engine, error)
                engine.note(was_reached=not failed.elsewhere)
                if not failed.elsewhere:
                    give_up(engine)
                    if isinstance(error, TimeoutError):
                        raise EngineFailed(engine, "silent", "no answer in time", status=504) from error
                self._note(failed, answer.name)
                continue
            if status >= 500:
                self._note(EngineFailed(engine, "error", said(status, content)), answer.name)
                continue
            if status == 200:
                return engine, content
            response = Response(content, status_code=status)
            response.raw_headers = client_headers(given)
            return engine, response
        return None

    async def _decoded(self, answer: Sender, data: bytes, prompt: _Prompt) -> None:
        """Send the answer of a decode engine on.

        All that cannot be reached are passed over. Of those that fail after they had the request, one is: if it is the
        request that kills engines, it does not kill all of them.
        """
        *others, last = self._decode.choose(session=prompt.session, tokens=prompt.tokens + prompt.answer_tokens)
        may_fail = True
        for engine in others:
            try:
                return await self._ask(engine, answer, data, prompt)
            except EngineFailed as failed:
                if failed.what == "silent" or not (failed.elsewhere or may_fail):
                    raise
                may_fail = may_fail and failed.elsewhere
                self._note(failed, answer.name)
        await self._ask(last, answer, data, prompt)

    async def _ask(self, engine: Engine, answer: Sender, data: bytes, prompt: _Prompt) -> None:
        self._counts.requests.labels(engine.name).inc()
        with engine.carrying(prompt.tokens + prompt.answer_tokens):
            await answer.pass_on(engine, data)


async def _wait_until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _nothing() -> Any:  # a response that is not streamed asks for nothing
    with suppress(asyncio.CancelledError):
        await asyncio.Event().wait()
