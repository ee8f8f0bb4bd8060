"""Mixed traffic: requests of known answers, some streamed, some left by their clients."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import aiohttp

from tests.engine.conftest import Client, Work

RETRYABLE = {429, 502, 503, 504}
AT_ONCE = 10
PATIENCE_S = 180.0
"""An answer that takes longer is a hang."""
PAUSE_S = 5.0
"""Between two requests of a client, on average: engines that start need some of the cores."""
RETRY_S = 0.5
"""Until a client asks again that got no answer."""
LEAVE = 0.1
"""The share of clients that leave before their answer is complete."""


class Traffic:
    """A context manager: clients that ask one request after another.

    Attributes:
        outcomes: how many requests ended how: equal, left, or "retry" and why.
        wrong: what must not be: another answer, an error that is none to try again after, a hang.
    """

    def __init__(
        self, url: str, wanted: Sequence[tuple[Work, list[int]]], note_token_s: Callable[[float], None], seed: int
    ) -> None:
        self.outcomes: Counter[str] = Counter()
        self.wrong: list[str] = []
        self._client, self._wanted, self._note, self._seed = Client(url), wanted, note_token_s, seed
        self._done = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._all()), daemon=True)

    def __enter__(self) -> Traffic:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join(2 * PATIENCE_S)
        if self._thread.is_alive():
            self.wrong.append("clients hang")

    async def _all(self) -> None:
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
            await asyncio.gather(
                *(self._one_by_one(session, random.Random(f"{self._seed} {i}")) for i in range(AT_ONCE))
            )

    async def _one_by_one(self, session: aiohttp.ClientSession, rng: random.Random) -> None:
        while not self._done.is_set():
            work, tokens = rng.choice(self._wanted)
            began = time.monotonic()
            leaves = rng.expovariate(1.0) if rng.random() < LEAVE else PATIENCE_S
            ask = self._streamed if rng.random() < 0.5 else self._whole
            try:
                got = await asyncio.wait_for(ask(session, work), leaves)
            except TimeoutError:
                if leaves == PATIENCE_S:
                    self.wrong.append(f"no answer in {PATIENCE_S:.0f} s")
                self.outcomes["left"] += 1
                continue
            except Exception as error:  # whatever it is: it must not end the other clients, and all would seem well
                self.wrong.append(f"the proxy broke off, or its answer is none: {error!r}")
                got = "broken"
            if isinstance(got, str):
                self.outcomes[f"retry: {got}"] += 1
                await asyncio.sleep(RETRY_S)
            elif got != tokens:
                self.wrong.append(f"another answer to a prompt of {len(work.prompt)} tokens: {got} and not {tokens}")
            else:
                self.outcomes["equal"] += 1
                self._note((time.monotonic() - began) / len(tokens))
            await asyncio.sleep(rng.expovariate(1 / PAUSE_S))

    async def _whole(self, session: aiohttp.ClientSession, work: Work) -> list[int] | str:
        async with session.post(f"{self._client.url}/v1/completions", json=self._client.body(work)) as response:
            answer = await response.json()
            if response.status != 200:
                return self._error(response.status, answer)
            return list(answer["choices"][0]["token_ids"])

    async def _streamed(self, session: aiohttp.ClientSession, work: Work) -> list[int] | str:
        tokens: list[int] = []
        body = self._client.body(work, stream=True)
        async with session.post(f"{self._client.url}/v1/completions", json=body) as response:
            if response.status != 200:
                return self._error(response.status, await response.json())
            async for line in response.content:
                if not line.startswith(b"data: {"):
                    continue
                piece = json.loads(line[6:])
                if "error" in piece:
                    return self._error(int(piece["error"].get("code") or 0), piece)
                tokens += [t for choice in piece["choices"] for t in choice.get("token_ids") or ()]
        return tokens

    def _error(self, status: int, answer: Any) -> str:
        if status not in RETRYABLE:
            self.wrong.append(f"status {status}: {answer}")
        with contextlib.suppress(KeyError, TypeError):
            return f"{status} {answer['error']['message'].split(' (request')[0]}"
        return str(status)
