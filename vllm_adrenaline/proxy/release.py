"""Releases of prompts that no decode engine took. Without them a prompt would keep the prefill engine's memory a while.

A release goes over HTTP alone, as vLLM itself does it for requests that it refuses. A decode engine that gets the
parameters of one prompt together with another prompt tells the prefill engine that nobody wants the first one. If that
one was taken after all, nothing happens. Of a prompt whose client left before the prefill engine had answered there are
no parameters, only its ticket: the prefill engine hears of it in a request for another prompt.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from typing import Any

import msgspec

from vllm_adrenaline.proxy import bodies
from vllm_adrenaline.proxy.upstream import UNREACHABLE, Engine, Engines, Headers

logger = logging.getLogger(__name__)

PATH = "/v1/completions"
TIMEOUT_S = 10.0
AT_ONCE = 64
"""Releases under way at most. The prefill engine lets other prompts go by itself, some seconds later."""


class Releases:
    """The releases under way, as tasks in the background."""

    def __init__(self, decode: Engines) -> None:
        self._decode = decode
        self._tasks: set[asyncio.Task[None]] = set()

    def start(self, model: msgspec.Raw | None, params: dict[str, Any], headers: Headers) -> None:
        """Start to release the prompt of `params`. `model` and `headers` are those of its request."""
        self._start(self._decode.choose(), model, params, headers)  # any of them will do

    def give_up(self, engine: Engine, model: msgspec.Raw | None, ticket: str, headers: Headers) -> None:
        """Start to release a prompt that a prefill engine was asked for, and may have computed."""
        self._start([engine], model, {bodies.GIVES_UP: ticket}, headers)

    def _start(
        self, engines: Sequence[Engine], model: msgspec.Raw | None, params: dict[str, Any], headers: Headers
    ) -> None:
        if len(self._tasks) >= AT_ONCE:
            logger.warning("%d prompts are being given up already", AT_ONCE)
            return
        own = [(name, value) for name, value in headers if name.lower() != "x-request-id"]
        body = {"prompt": [0], "max_tokens": 1, "kv_transfer_params": params}
        data = bodies.encode(body if model is None else body | {"model": model})
        task = asyncio.create_task(self._release(engines, data, own))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _release(self, engines: Sequence[Engine], data: bytes, headers: Headers) -> None:
        for engine in engines:
            try:
                async with asyncio.timeout(TIMEOUT_S), engine.post(PATH, data, headers) as answer:
                    await answer.read()
                    return
            except UNREACHABLE as error:
                logger.warning("the %s engine at %s cannot give up a prompt: %s", engine.kind, engine.address, error)
