"""Prompts that nobody will take are given up. Without that they would keep the prefill engine's memory a while.

The proxy names each prompt by a ticket when it asks for it. In a request for another prompt, of one token, it says that
it gives that one up: it need not have heard what the prefill engine answered (kv/stamp.py, GIVES_UP). If a decode
engine took the prompt after all, nothing happens.
"""

from __future__ import annotations

import asyncio
import logging

import msgspec

from vllm_adrenaline.proxy import bodies
from vllm_adrenaline.proxy.upstream import UNREACHABLE, Engine, Headers

logger = logging.getLogger(__name__)

PATH = "/v1/completions"
TIMEOUT_S = 10.0
AT_ONCE = 16
"""Requests of these that a proxy has under way."""
MOST = 8192
"""That wait at most. The prefill engine lets other prompts go by itself, after --adrenaline-claim-seconds."""


class Releases:
    """Prompts that are being given up, as tasks in the background."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[None]] = set()
        self._turn = asyncio.Semaphore(AT_ONCE)

    def give_up(self, engine: Engine, model: msgspec.Raw | None, ticket: str, headers: Headers) -> None:
        """Begin to give up the prompt that a prefill engine knows by this ticket.

        `model` and `headers` are those of its request.
        """
        if len(self._tasks) >= MOST:
            logger.warning("%d prompts are being given up already", MOST)
            return
        task = asyncio.create_task(self._give_up(engine, model, ticket, headers))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _give_up(self, engine: Engine, model: msgspec.Raw | None, ticket: str, headers: Headers) -> None:
        own = [(name, value) for name, value in headers if name.lower() != "x-request-id"]
        body = {"prompt": [0], "max_tokens": 1, "kv_transfer_params": {bodies.GIVES_UP: ticket}}
        data = bodies.encode(body if model is None else body | {"model": model})
        try:
            async with self._turn, asyncio.timeout(TIMEOUT_S), engine.post(PATH, data, own) as answer:
                await answer.read()
        except UNREACHABLE as error:
            logger.warning("the %s engine at %s cannot give up a prompt: %s", engine.kind, engine.address, error)
