"""Starvation: which offloaded requests sit a step out because they lack a block, and which have done so for too long.

Pure: the caller says what the time is.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping
from typing import Protocol, TypeVar

STARVE_S = 1.0
"""How long a request waits for a growth block before it moves to the decode engine."""


class Growing(Protocol):
    """An offloaded request that grows.

    Attributes:
        starved_since: Since when it lacks a block (seconds); None if it lacks none.
    """

    starved_since: float | None


GrowingT = TypeVar("GrowingT", bound=Growing)
PoolT = TypeVar("PoolT", bound=Hashable)


def reserve_growth(
    requests: Iterable[tuple[GrowingT, PoolT, int]], free: Mapping[PoolT, int], now: float
) -> tuple[list[GrowingT], list[GrowingT]]:
    """Hand out free blocks to offloaded requests in their order, and note who starves.

    Args:
        requests: Each request, the pool it grows in, and how many more blocks it needs for this step.
        free: Free blocks by pool. A pool that is not in it has none.
        now: The time in seconds, by the clock of `starved_since`.

    Returns:
        The requests that must sit this step out, and those that have starved for `STARVE_S`. For all others there are
        enough blocks.
    """
    left = dict(free)
    waiting: list[GrowingT] = []
    leaving: list[GrowingT] = []
    for request, pool, needed in requests:
        if needed <= left.get(pool, 0):
            left[pool] = left.get(pool, 0) - max(0, needed)
            request.starved_since = None
            continue
        if request.starved_since is None:
            request.starved_since = now
        (leaving if now - request.starved_since >= STARVE_S else waiting).append(request)
    return waiting, leaving
