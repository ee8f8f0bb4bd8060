"""Which engine a request goes to. Pure: what is known goes in, an order of engines comes out.

* Engines of a kind are compared by outstanding tokens: those of the requests that they have. Of two random ones the
  less busy one is taken. To look at all would send every request of a moment to the same engine.
* A prefill engine that has seen a prompt's beginning need not compute it again, so the beginning's tokens count in its
  favour: it gets the prompt unless it is busier by more than it saves.
* A decode engine that has no room for a request, neither in its own memory nor with executors, comes after one that
  has: there it would wait, or push another one out.
* Requests of one session go to one engine, as long as that is there.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b

BYTES_PER_TOKEN = 4
"""Bytes of a prompt's JSON for a token: about right for English text, and for ids of tokens."""
SHORTEST, LONGEST = 256, 64 << 10
"""Bytes of the shortest and the longest beginning that is remembered."""
REMEMBERED = 1 << 16
"""Beginnings that are remembered, the last ones used: some 15 MiB at most."""

Digest = bytes
Beginnings = Sequence[tuple[int, Digest]]
"""Beginnings of one prompt: their sizes in bytes, and what stands for their content. The longest comes last."""


@dataclass(frozen=True)
class Candidate:
    """An engine that could take a request. `key` is the same as long as it is the same engine.

    `outstanding`: tokens of the requests that it has. `available`: it could be reached when it was last asked. `room`:
    tokens of KV that it could still have, as it said last; None: it did not say.
    """

    key: str
    outstanding: int = 0
    available: bool = True
    room: int | None = None

    def holds(self, tokens: int) -> bool:
        """Say whether it has room for so many. One without any request of ours has: what it said last is old."""
        return self.room is None or not self.outstanding or tokens <= self.room


def order(
    candidates: Sequence[Candidate],
    draw: Callable[[int], int],
    cached: Mapping[str, int] | None = None,
    session: str | None = None,
    tokens: int = 0,
) -> list[int]:
    """Return the indexes of the candidates in the order in which they should be asked.

    `draw(n)` returns a random number from 0 to n - 1. `cached` are the tokens of the prompt that engines have computed
    before, by key. `session`: requests with the same one begin with the same engine. `tokens`: of the request.
    Unavailable engines come last.
    """
    cached = cached or {}

    def cost(index: int) -> tuple[bool, int]:
        each = candidates[index]
        return not each.holds(tokens), each.outstanding - cached.get(each.key, 0)

    def stays(index: int) -> bytes:
        return blake2b(f"{session}\0{candidates[index].key}".encode(errors="replace"), digest_size=8).digest()

    there = [index for index, each in enumerate(candidates) if each.available]
    away = [index for index, each in enumerate(candidates) if not each.available]
    if session is not None:
        # Rendezvous hashing: when engines come or go, only the sessions of those move.
        return sorted(there, key=stays) + sorted(away, key=stays)
    first: list[int] = []
    if there:
        fit = [index for index in there if candidates[index].holds(tokens)] or there
        one = draw(len(fit))
        other = (one + 1 + draw(len(fit) - 1)) % len(fit) if len(fit) > 1 else one
        drawn = (fit[one], fit[other])
        known = [index for index in there if candidates[index].key in cached]
        first = [min((*drawn, *known), key=cost)]
    return first + sorted((index for index in there if index not in first), key=cost) + away


def beginnings(parts: Iterable[bytes | memoryview]) -> Beginnings:
    """Return the beginnings of a prompt that is made of these parts: each twice as long as the one before."""
    found: list[tuple[int, Digest]] = []
    digest, done, wanted = blake2b(digest_size=16), 0, SHORTEST
    for part in parts:
        rest = memoryview(part)
        while len(rest) and wanted <= LONGEST:
            taken, rest = rest[: wanted - done], rest[wanted - done :]
            digest.update(taken)
            done += len(taken)
            if done == wanted:
                found.append((done, digest.digest()))
                wanted *= 2
    return found


class Memory:
    """The beginnings of prompts that engines have computed, each with the engine that did so last."""

    def __init__(self, most: int = REMEMBERED) -> None:
        self._most = most
        self._engines: OrderedDict[Digest, str] = OrderedDict()

    def remember(self, prompt: Beginnings, key: str) -> None:
        """Note that an engine has computed a prompt."""
        for _, digest in prompt:
            self._engines[digest] = key
            self._engines.move_to_end(digest)
        while len(self._engines) > self._most:
            self._engines.popitem(last=False)

    def cached(self, prompt: Beginnings) -> dict[str, int]:
        """Return how many tokens of a prompt engines have computed before, by key."""
        found: dict[str, int] = {}
        for size, digest in prompt:
            if (key := self._engines.get(digest)) is not None:
                found[key] = size // BYTES_PER_TOKEN
        return found
