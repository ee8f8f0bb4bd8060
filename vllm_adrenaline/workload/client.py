"""An HTTP client of OpenAI-compatible servers. It streams answers and takes the time at which every token comes.

The client is open-loop: requests are sent when they are due, whether or not earlier ones are done.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import Any

import aiohttp

from vllm_adrenaline.errors import AdrenalineError
from vllm_adrenaline.workload.load import Request

CONNECT_S = 10.0
"""Seconds after which a server that takes no connection is given up."""
LONGEST_ERROR = 500
"""Characters of a server's error message that are shown."""


@dataclass(frozen=True)
class Answer:
    """The token ids of one answer, and times in seconds since the start of the run.

    `sent` is when the request was sent, `times` when each of the tokens came.
    """

    sent: float
    times: list[float]
    tokens: list[int]


def open_session(silence_s: float | None = None) -> aiohttp.ClientSession:
    """Return an HTTP session for any number of requests at once, however long they take.

    `silence_s`: seconds without a byte after which a server that accepted a request is given up; None: never.
    """
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_S, sock_read=silence_s)
    return aiohttp.ClientSession(timeout=timeout, connector=aiohttp.TCPConnector(limit=0))


def path_of(request: Request) -> str:
    """Return the path of the API that a request goes to."""
    return "/v1/chat/completions" if request.chat else "/v1/completions"


def body_of(model: str, request: Request) -> dict[str, Any]:
    """Return the JSON body of a request: greedy, of exact length, streamed, with token ids in the answer."""
    prompt = {"messages": [{"role": "user", "content": request.prompt}]} if request.chat else {"prompt": request.prompt}
    return prompt | {
        "model": model,
        "max_tokens": request.tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "return_token_ids": True,
    }


async def stream(session: aiohttp.ClientSession, url: str, body: dict[str, Any]) -> AsyncIterator[list[int]]:
    """Post a body to the URL of an API and yield token ids as they come.

    Raises AdrenalineError for an error in the answer, and what aiohttp raises for a server that does not answer.
    """
    async with session.post(url, json=body) as response:
        if response.status != 200:
            raise AdrenalineError(f"{url} answered {response.status}: {(await response.text())[:LONGEST_ERROR]}")
        async for line in response.content:
            if line.startswith(b"data: {"):
                event = json.loads(line[6:])
                if "error" in event:
                    raise AdrenalineError(f"{url}: {event['error']}")
                new = [token for choice in event["choices"] for token in choice.get("token_ids") or []]
                if new:
                    yield new


async def _ask(
    session: aiohttp.ClientSession,
    url: str,
    model: str,
    request: Request,
    start: float,
    on_tokens: Callable[[int], object],
) -> Answer:
    await asyncio.sleep(max(0.0, start + request.at - time.monotonic()))
    answer = Answer(time.monotonic() - start, [], [])
    api = url + path_of(request)
    async for new in stream(session, api, body_of(model, request)):
        answer.times.extend([time.monotonic() - start] * len(new))
        answer.tokens.extend(new)
        on_tokens(len(new))
    if len(answer.tokens) != request.tokens:
        raise AdrenalineError(f"{api} sent {len(answer.tokens)} tokens instead of {request.tokens}")
    return answer


async def _ask_all(
    url: str, model: str, requests: Sequence[Request], on_tokens: Callable[[int], object], silence_s: float | None
) -> list[Answer]:
    async with open_session(silence_s) as session:
        start = time.monotonic()
        return await asyncio.gather(*(_ask(session, url, model, request, start, on_tokens) for request in requests))


def send(
    url: str,
    model: str,
    requests: Sequence[Request],
    on_tokens: Callable[[int], object] = lambda count: None,
    silence_s: float | None = None,
) -> list[Answer]:
    """Send each request when it is due, and return the answers in the order of the requests.

    `on_tokens` is called with the number of tokens whenever some came. `silence_s` is as in `open_session`.

    Raises AdrenalineError when the server at `url` does not answer, answers with an error, or sends more or fewer
    tokens than a request asks for.
    """
    try:
        return asyncio.run(_ask_all(url, model, requests, on_tokens, silence_s))
    except (aiohttp.ClientError, TimeoutError) as error:
        raise AdrenalineError(f"{url} does not answer: {error or type(error).__name__}") from None
