"""An open-loop client: requests are sent when they are due, whether or not earlier ones are done."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass

import aiohttp

from vllm_adrenaline.errors import AdrenalineError
from vllm_adrenaline.workload.load import Request


@dataclass(frozen=True)
class Answer:
    """Seconds since the start of the run: when the request was sent, and when each token came."""

    sent: float
    times: list[float]
    tokens: list[int]


async def _one(session: aiohttp.ClientSession, url: str, model: str, request: Request, start: float) -> Answer:
    await asyncio.sleep(max(0.0, start + request.at - time.monotonic()))
    sent = time.monotonic() - start
    body = {"model": model, "prompt": request.prompt, "max_tokens": request.tokens, "temperature": 0}
    body |= {"ignore_eos": True, "stream": True, "return_token_ids": True}
    times: list[float] = []
    tokens: list[int] = []
    async with session.post(f"{url}/v1/completions", json=body) as response:
        if response.status != 200:
            raise AdrenalineError(f"{url} answers {response.status}: {await response.text()}")
        async for line in response.content:
            if line.startswith(b"data: {"):
                chunk = json.loads(line[6:])
                if "error" in chunk:
                    raise AdrenalineError(f"{url}: {chunk['error']}")
                new = chunk["choices"][0].get("token_ids") or []
                times += [time.monotonic() - start] * len(new)
                tokens += new
    if len(tokens) != request.tokens:
        raise AdrenalineError(f"{url}: {len(tokens)} of {request.tokens} tokens came")
    return Answer(sent, times, tokens)


async def _all(url: str, model: str, requests: Sequence[Request]) -> list[Answer]:
    timeout = aiohttp.ClientTimeout(total=None)
    async with aiohttp.ClientSession(timeout=timeout, connector=aiohttp.TCPConnector(limit=0)) as session:
        start = time.monotonic() + 0.1
        return await asyncio.gather(*(_one(session, url, model, request, start) for request in requests))


def send(url: str, model: str, requests: Sequence[Request]) -> list[Answer]:
    """Send all requests when they are due; return their answers in order. Raises AdrenalineError for a bad answer."""
    try:
        return asyncio.run(_all(url, model, requests))
    except aiohttp.ClientError as error:
        raise AdrenalineError(f"{url} does not answer: {error}") from None
