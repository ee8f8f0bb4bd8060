"""Requests of an `LLM` whose prompts a prefill engine computes first. Then this process's engine core gets them."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import aiohttp

from vllm_adrenaline.proxy import bodies
from vllm_adrenaline.proxy.errors import Refused
from vllm_adrenaline.proxy.upstream import UNREACHABLE, Engine

if TYPE_CHECKING:
    from vllm.v1.engine import EngineCoreRequest

logger = logging.getLogger("vllm.adrenaline")

AT_ONCE = 256
"""Prompts that the prefill engine is asked for at the same time. It queues what it cannot compute yet."""
PARAMS = "kv_transfer_params"


def can_be_asked_for(request: EngineCoreRequest) -> bool:
    """Say whether a prefill engine can compute the prompt of a request: plain tokens, with nothing wanted of them."""
    sampling = request.sampling_params
    return (
        sampling is not None
        and sampling.prompt_logprobs is None
        and PARAMS not in (sampling.extra_args or {})
        and bool(request.prompt_token_ids)
        and request.prompt_embeds is None
        and not request.mm_features
        and request.lora_request is None
    )


class PromptsFirst(threading.Thread):
    """The thread that asks a prefill engine for prompts, in the order of their requests.

    A request whose prompt the prefill engine cannot compute, or does not, goes to the engine core as it is: that
    computes the prompt itself.

    Attributes:
        forward: gives a request to the engine core, from any thread; to be set before the first request.
    """

    forward: Callable[[EngineCoreRequest], None]

    def __init__(self, url: str) -> None:
        """Start the thread. `url`: of the prefill engine's API, as in Engine."""
        super().__init__(name="adrenaline-prompts", daemon=True)
        self._engine = Engine("prefill", url)
        self._loop = asyncio.new_event_loop()
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._seats = asyncio.Semaphore(AT_ONCE)
        self._is_away = False
        self._session: aiohttp.ClientSession | None = None
        self.start()

    # The thread of the LLM

    def take(self, request: EngineCoreRequest) -> None:
        """Take a new request."""
        if can_be_asked_for(request):
            self._loop.call_soon_threadsafe(self._begin, request)
        else:
            self.forward(request)

    def drop(self, request_ids: Iterable[str]) -> None:
        """Forget these requests. Those that were forwarded are the engine core's; none is from now on."""
        asyncio.run_coroutine_threadsafe(self._drop(list(request_ids)), self._loop).result()

    def stop(self) -> None:
        """Forget all requests, and end."""
        if self.is_alive():
            asyncio.run_coroutine_threadsafe(self._end(), self._loop).result()
            self.join()

    # Own thread

    def run(self) -> None:
        self._loop.run_forever()
        self._loop.close()

    def _begin(self, request: EngineCoreRequest) -> None:
        task = self._tasks[request.request_id] = self._loop.create_task(self._compute_first(request))
        task.add_done_callback(lambda _: self._tasks.pop(request.request_id, None))

    async def _compute_first(self, request: EngineCoreRequest) -> None:
        async with self._seats:
            params = await self._ask(request)
        if params is not None:
            sampling = request.sampling_params = request.sampling_params.clone()
            sampling.extra_args = {**(sampling.extra_args or {}), PARAMS: params}
        self.forward(request)  # nothing is awaited since the answer: either it is dropped or forwarded, never both

    async def _ask(self, request: EngineCoreRequest) -> dict[str, Any] | None:
        """Return where the prompt's KV cache is; None if the prefill engine does not have it."""
        # A first token that ended the request would make vLLM drop the KV cache instead of handing it over.
        body: dict[str, Any] = {"prompt": request.prompt_token_ids, "max_tokens": 1, "ignore_eos": True}
        body[PARAMS] = bodies.KEEP_KV_FOR_DECODE
        if request.cache_salt is not None:
            body["cache_salt"] = request.cache_salt
        if self._session is None:
            self._session = self._engine.open()
        try:
            async with self._engine.post("/v1/completions", bodies.encode(body), []) as answer:
                text = await answer.read()
                if answer.status != 200:
                    raise Refused(answer.status, text.decode(errors="replace")[:500])
            params = bodies.params_of(text)
        except (*UNREACHABLE, Refused) as error:
            if not self._is_away:
                logger.warning(
                    "the prefill engine at %s computes no prompts: this engine does so itself until it is back (%s)",
                    self._engine.address,
                    error or type(error).__name__,
                )
            self._is_away = True
            return None
        self._is_away = False
        return params

    async def _drop(self, request_ids: list[str]) -> None:
        tasks = [task for each in request_ids if (task := self._tasks.get(each)) is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _end(self) -> None:
        await self._drop(list(self._tasks))
        if self._session is not None:
            await self._session.close()
        self._loop.call_soon(self._loop.stop)
