"""Releases of prompts that no decode engine took. Without them a prompt would keep the prefill engine's memory a while.

A release goes over HTTP alone, as vLLM itself does it for requests that it refuses. A decode engine that gets the
parameters of one prompt together with another prompt tells the prefill engine that nobody wants the first one. If that
one was taken after all, nothing happens.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import msgspec

from vllm_adrenaline.proxy import bodies
from vllm_adrenaline.proxy.upstream import UNREACHABLE, Engines, Headers

logger = logging.getLogger(__name__)

PATH = "/v1/completions"
TIMEOUT_S = 10.0
AT_ONCE = 64
"""Releases under way at most. The prefill engine lets other prompts go by itself, some seconds later."""


def body_of(model: msgspec.Raw | None, params: dict[str, Any]) -> bytes:
    """Return the body of the request that releases the prompt of `params`: its own prompt of one token does not fit."""
    body = {"prompt": [0], "max_tokens": 1, "kv_transfer_params": params}
    return bodies.encode(body if model is None else body | {"model": model})


class Releases:
    """The releases under way, as tasks in the background."""

    def __init__(self, decode: Engines) -> None:
        self._decode = decode
        self._tasks: set[asyncio.Task[None]] = set()

    def start(self, data: bytes, headers: Headers) -> None:
        """Start to release a prompt. `data` is made by `body_of`; `headers` are those of the prompt's request."""
        if len(self._tasks) >= AT_ONCE:
            logger.warning("%d prompts are being given up already", AT_ONCE)
            return
        own = [(name, value) for name, value in headers if name.lower() != "x-request-id"]
        task = asyncio.create_task(self._release(data, own))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _release(self, data: bytes, headers: Headers) -> None:
        for engine in self._decode.in_turn():  # any of them will do
            try:
                async with asyncio.timeout(TIMEOUT_S), engine.post(PATH, data, headers) as answer:
                    await answer.read()
                    return
            except UNREACHABLE as error:
                logger.warning("the decode engine at %s cannot give up a prompt: %s", engine.address, error)
