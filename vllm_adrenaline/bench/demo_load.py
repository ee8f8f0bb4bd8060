"""The demonstration's requests, and a client that sends them all at once, streams the answers and takes the times."""

from __future__ import annotations

import asyncio
import json
import random
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import aiohttp

from vllm_adrenaline.workload.text import words

POLL_S = 0.1


@dataclass(frozen=True)
class Work:
    """One request: its prompt, how many tokens to write, and by which API."""

    prompt: str
    tokens: int
    chat: bool

    def body(self, model: str) -> dict[str, Any]:
        """Return the request's body; greedy, of exact length, with token ids in the answer."""
        prompt: dict[str, Any] = {"prompt": self.prompt}
        if self.chat:
            prompt = {"messages": [{"role": "user", "content": self.prompt}]}
        return prompt | {
            "model": model,
            "max_tokens": self.tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "return_token_ids": True,
        }

    @property
    def path(self) -> str:
        """Return the endpoint."""
        return "/v1/chat/completions" if self.chat else "/v1/completions"


@dataclass(frozen=True)
class Answer:
    """The tokens of one request and when they came."""

    tokens: list[int]
    ttft: float
    tpot: float


@dataclass(frozen=True)
class Measured:
    """What one system did with all requests."""

    answers: list[Answer]
    seconds: float
    peak_usage: float


class RequestFailed(Exception):
    """A request got an error or not all of its tokens."""


def mixed_requests(count: int = 24, seed: int = 0) -> list[Work]:
    """Return requests of very different lengths, half of them chats; the same ones in every run."""
    rng = random.Random(seed)
    text = words() * 2
    requests = []
    for number in range(count):
        # 3 to 330 words are about 5 to 600 tokens; squared, so that short prompts are as usual as they are in practice.
        length = 3 + int(327 * (number / (count - 1)) ** 2)
        start = rng.randrange(len(text) // 2)
        requests.append(Work(" ".join(text[start : start + length]), rng.randint(10, 150), number % 2 == 1))
    rng.shuffle(requests)
    return requests


async def _ask(session: aiohttp.ClientSession, url: str, model: str, work: Work, count: Callable[[int], Any]) -> Answer:
    started = time.monotonic()
    first = last = started
    tokens: list[int] = []
    async with session.post(url + work.path, json=work.body(model)) as response:
        if response.status != 200:
            raise RequestFailed(f"{url}{work.path} answered {response.status}: {(await response.text())[:500]}")
        async for line in response.content:
            if not line.startswith(b"data: {"):
                continue
            event = json.loads(line[6:])
            if "error" in event:
                raise RequestFailed(f"{url}{work.path}: {event['error']}")
            new = [token for choice in event["choices"] for token in choice.get("token_ids") or []]
            if new:
                last = time.monotonic()
                first = first if tokens else last
                tokens += new
                count(len(new))
    if len(tokens) != work.tokens:
        raise RequestFailed(f"{url}{work.path} sent {len(tokens)} tokens instead of {work.tokens}")
    return Answer(tokens, first - started, (last - first) / max(1, len(tokens) - 1))


async def _poll_peak(usage: Callable[[], float], peak: list[float]) -> None:
    while True:
        peak[0] = max(peak[0], await asyncio.to_thread(usage))
        await asyncio.sleep(POLL_S)


async def _run(
    url: str, model: str, requests: Sequence[Work], usage: Callable[[], float], count: Callable[[int], Any]
) -> Measured:
    peak = [0.0]
    poll = asyncio.create_task(_poll_peak(usage, peak))
    started = time.monotonic()
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=10, sock_read=300)
    try:
        async with aiohttp.ClientSession(timeout=timeout, connector=aiohttp.TCPConnector(limit=0)) as session:
            answers = await asyncio.gather(*(_ask(session, url, model, work, count) for work in requests))
    except (aiohttp.ClientError, TimeoutError) as error:
        raise RequestFailed(f"{url}: {error or type(error).__name__}") from error
    finally:
        poll.cancel()
    return Measured(list(answers), time.monotonic() - started, peak[0])


class Counter:
    """A line that counts tokens: rewritten in a terminal, repeated every few seconds in a log."""

    def __init__(self, label: str, total: int) -> None:
        self._label, self._total, self._count = label, total, 0
        self._live = sys.stdout.isatty()
        self._started = self._shown = time.monotonic()

    def add(self, tokens: int) -> None:
        """Count tokens."""
        self._count += tokens
        now = time.monotonic()
        finished = self._count >= self._total
        if finished or now - self._shown >= (0.1 if self._live else 5):
            self._shown = now
            text = f"[adrenaline] {self._label}: {self._count} of {self._total} tokens, {now - self._started:.0f} s"
            print(
                f"\r\033[K{text}" if self._live else text, end="" if self._live and not finished else "\n", flush=True
            )


def send_all(url: str, model: str, requests: Sequence[Work], usage: Callable[[], float], label: str) -> Measured:
    """Send all requests at once, show the tokens as they come, return the answers in the order of the requests."""
    counter = Counter(label, sum(work.tokens for work in requests))
    return asyncio.run(_run(url, model, requests, usage, counter.add))
