"""The prefill engine's books of what it lends: finished prompts and free blocks, to whom, until when.

Pure bookkeeping over vLLM's block pool: every claim and every lease is one reference on a block, so that whatever else
holds the block (NIXL's own retention, another request, the prefix cache) is left alone. The caller holds the lock that
guards the pool.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

Block = Any
"""A KVCacheBlock of vLLM; only `block_id` is read here."""


class Pool(Protocol):
    """The part of vLLM's BlockPool that is used (vllm/v1/core/block_pool.py, 0.32 and 0.33)."""

    blocks: Sequence[Block]

    def get_num_free_blocks(self) -> int: ...
    def get_new_blocks(self, num_blocks: int) -> list[Block]: ...
    def touch(self, blocks: Sequence[Block]) -> None: ...
    def free_blocks(self, ordered_blocks: Iterable[Block]) -> None: ...


@dataclass(frozen=True)
class Offer:
    """A finished prompt that a decode engine may claim: its blocks in order, how many tokens it has, and their hash."""

    blocks: list[Block]
    num_tokens: int
    prompt_hash: bytes


@dataclass(eq=False)
class LeaseHolder:
    """What one decode engine has of ours, and when we last heard of it (seconds)."""

    last_heard: float
    claims: dict[str, list[Block]] = field(default_factory=dict)
    leased: dict[int, Block] = field(default_factory=dict)

    @property
    def has_blocks(self) -> bool:
        """Whether it has any block of ours."""
        return bool(self.claims or self.leased)


class LeaseManager:
    """Offers, claims and leases of one prefill engine. `reserve`: free blocks never leased, for its own prompts."""

    def __init__(self, pool: Pool, reserve: int, expiry_s: float, clock: Callable[[], float]) -> None:
        self.pool = pool
        self.reserve = reserve
        self.expiry_s = expiry_s
        self.clock = clock
        self.offers: dict[str, Offer] = {}
        self._let_go: set[str] = set()
        self.holders: dict[bytes, LeaseHolder] = {}
        self._leaving: list[LeaseHolder] = []

    def offer(self, request_id: str, offer: Offer) -> None:
        """Make a finished prompt claimable; something else keeps its blocks until `withdraw`."""
        self.offers[request_id] = offer

    def withdraw(self, request_ids: Iterable[str]) -> None:
        """These prompts' blocks are about to be let go: no new claims. Claims that were granted stay."""
        for request_id in request_ids:
            self.offers.pop(request_id, None)
            self._let_go.discard(request_id)

    def drop(self, request_ids: Iterable[str]) -> None:
        """Nobody will claim these prompts: what holds them for a reader may let go. Claimed ones are not touched."""
        for request_id in request_ids:
            if self.offers.pop(request_id, None) is not None:
                self._let_go.add(request_id)

    def take_let_go(self) -> frozenset[str]:
        """Return the prompts claimed or dropped since the last call: what else held them for a reader may let go."""
        let_go, self._let_go = frozenset(self._let_go), set()
        return let_go

    def join(self, holder: bytes) -> None:
        """A decode engine says hello."""
        self.holders.setdefault(holder, LeaseHolder(self.clock()))

    def note_sign_of_life(self, holder: bytes) -> bool:
        """Note a sign of life; return False for one that we do not know (any more)."""
        known = self.holders.get(holder)
        if known is None:
            return False
        known.last_heard = self.clock()
        return True

    def claim(self, holder: bytes, request_id: str) -> Offer | None:
        """Keep an offered prompt for `holder`; return it, or None when it is not on offer (any more).

        An offer can be claimed once: a second claim of the same prompt is a mistake or an attack.
        """
        known, offer = self.holders.get(holder), self.offers.get(request_id)
        if known is None or offer is None:
            return None
        del self.offers[request_id]
        self._let_go.add(request_id)
        self.pool.touch(offer.blocks)
        known.claims[request_id] = offer.blocks
        return offer

    def lease(self, holder: bytes, want: int) -> list[int]:
        """Lend up to `want` free blocks; return their indices. Never digs into the reserve."""
        known = self.holders.get(holder)
        if known is None:
            return []
        granted = max(0, min(want, self.pool.get_num_free_blocks() - self.reserve))
        blocks = self.pool.get_new_blocks(granted) if granted else []
        known.leased.update((block.block_id, block) for block in blocks)
        return [block.block_id for block in blocks]

    def release(self, holder: bytes, request_ids: Iterable[str], blocks: Iterable[int]) -> None:
        """Take back claims and leased blocks. What `holder` does not have is ignored: it may have expired."""
        known = self.holders.get(holder)
        if known is None:
            return
        for request_id in request_ids:
            # Tail first, so that the head of a prompt stays longest in the prefix cache, as vLLM frees.
            self.pool.free_blocks(reversed(known.claims.pop(request_id, [])))
        self.pool.free_blocks([block for index in blocks if (block := known.leased.pop(index, None)) is not None])

    def silent(self) -> list[bytes]:
        """Return the holders that were silent for `expiry_s`."""
        deadline = self.clock() - self.expiry_s
        return [name for name, known in self.holders.items() if known.last_heard < deadline]

    def leave(self, holder: bytes) -> LeaseHolder | None:
        """Forget a holder. Return what it has, which stays out until `evict`; None: nothing."""
        known = self.holders.pop(holder, None)
        if known is None or not known.has_blocks:
            return None
        self._leaving.append(known)
        return known

    def evict(self, left: LeaseHolder) -> None:
        """Take back what a holder that left has. The caller has made sure that nobody attends for it any more."""
        self._leaving.remove(left)
        for blocks in left.claims.values():
            self.pool.free_blocks(reversed(blocks))
        self.pool.free_blocks(list(left.leased.values()))

    @property
    def lent(self) -> tuple[int, int]:
        """Return how many claims and how many leased blocks are out."""
        known = [*self.holders.values(), *self._leaving]
        return sum(len(b.claims) for b in known), sum(len(b.leased) for b in known)
