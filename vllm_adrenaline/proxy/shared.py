"""An answer that takes asking, for all who want it at the same time."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine
from typing import Any, Generic, TypeVar

Answer = TypeVar("Answer")


class Shared(Generic[Answer]):
    """Asks when somebody wants to know, once for all who want to at that time, and gives the answer for a while."""

    def __init__(self, ask: Callable[[], Coroutine[Any, Any, Answer]], kept_s: float = 0.0) -> None:
        """`kept_s`: seconds since it was asked for, during which an answer is given again."""
        self._ask, self._kept_s = ask, kept_s
        self._asking: asyncio.Task[Answer] | None = None
        self._asked_at = 0.0

    async def get(self) -> Answer:
        """Return the answer. A client that leaves ends the asking for nobody else."""
        now = time.monotonic()
        if self._asking is None or (self._asking.done() and now - self._asked_at >= self._kept_s):
            self._asked_at, self._asking = now, asyncio.create_task(self._ask())
        return await asyncio.shield(self._asking)
