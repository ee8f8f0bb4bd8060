"""The lease manager of a prefill engine: which finished prompts and which free blocks decode engines have.

It does nothing but keep books over vLLM's block pool. Every claim and every lease is one reference on a block. So
whatever else holds the block (NIXL, another request, the prefix cache) is left alone. The caller holds the lock that
guards the pool.
"""

import uuid
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

GIVEN_UP_KEPT = 1024
"""Tickets kept of prompts that were given up before they ended. Most of them never end: their requests were aborted."""

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
    """A finished prompt that a decode engine may claim.

    Attributes:
        blocks: that hold its KV, in order.
        num_tokens: of the prompt.
        prompt_hash: of its tokens (kv/prompt_hash.py).
        ticket: what who asked for the prompt calls it (kv/stamp.py); empty if he has no name for it.
    """

    blocks: list[Block]
    num_tokens: int
    prompt_hash: bytes
    ticket: str = ""


@dataclass(eq=False)
class LeaseHolder:
    """What one decode engine has of ours.

    Attributes:
        last_heard: when it last said something, by the manager's clock (seconds).
        member: names what it has here, for ever: nothing else ever had or will have this name.
        claims: blocks of each prompt that it has claimed, by the prompt's name.
        leased: blocks that it has leased, by index.
    """

    last_heard: float
    member: str = field(default_factory=lambda: uuid.uuid4().hex)
    claims: dict[str, list[Block]] = field(default_factory=dict)
    leased: dict[int, Block] = field(default_factory=dict)

    @property
    def has_blocks(self) -> bool:
        """Whether it has any block of ours."""
        return bool(self.claims or self.leased)


class LeaseManager:
    """The offers, claims and leases of one prefill engine.

    Attributes:
        pool: vLLM's block pool.
        reserve: free blocks that are never leased, for the engine's own prompts.
        expiry_s: a holder that is silent for so long loses what it has (seconds).
        clock: returns the time, in seconds.
        offers: finished prompts that can be claimed, by name.
        holders: decode engines that may claim and lease, by connection.
    """

    def __init__(self, pool: Pool, reserve: int, expiry_s: float, clock: Callable[[], float]) -> None:
        self.pool = pool
        self.reserve = reserve
        self.expiry_s = expiry_s
        self.clock = clock
        self.offers: dict[str, Offer] = {}
        self._let_go: set[str] = set()
        self._given_up: dict[str, None] = {}  # tickets of prompts that may still end, oldest first
        self.holders: dict[bytes, LeaseHolder] = {}
        self._leaving: list[LeaseHolder] = []

    def offer(self, request_id: str, offer: Offer) -> None:
        """Make a finished prompt claimable. Until `withdraw` something else must keep its blocks.

        One that was given up already is dropped.
        """
        self.offers[request_id] = offer
        if offer.ticket in self._given_up:
            self.drop([request_id])

    def give_up(self, ticket: str) -> None:
        """Drop the prompt with this ticket as soon as it is on offer."""
        named = [name for name, offer in self.offers.items() if offer.ticket == ticket]
        self.drop(named)
        if not named:
            self._given_up[ticket] = None
            if len(self._given_up) > GIVEN_UP_KEPT:
                del self._given_up[next(iter(self._given_up))]

    def withdraw(self, request_ids: Iterable[str]) -> None:
        """Grant no new claims of these prompts: their blocks are about to be let go. Claims that were granted stay."""
        for request_id in request_ids:
            self.offers.pop(request_id, None)
            self._let_go.discard(request_id)

    def drop(self, request_ids: Iterable[str]) -> None:
        """Give up prompts that nobody will claim: what holds them for a reader may let go. Claimed ones stay."""
        for request_id in request_ids:
            if self.offers.pop(request_id, None) is not None:
                self._let_go.add(request_id)

    def take_let_go(self) -> frozenset[str]:
        """Return the prompts claimed or dropped since the last call. What else holds them for a reader may let go."""
        let_go, self._let_go = frozenset(self._let_go), set()
        return let_go

    def join(self, holder: bytes) -> str:
        """Let a decode engine claim and lease from now on; return what it is as a holder (LeaseHolder.member)."""
        return self.holders.setdefault(holder, LeaseHolder(self.clock())).member

    def is_member(self, member: str) -> bool:
        """Whether a decode engine has this name now, and has not left."""
        return any(known.member == member for known in self.holders.values())

    def note_sign_of_life(self, holder: bytes) -> bool:
        """Note that a holder said something. Return False for one that we do not know, or not any more."""
        known = self.holders.get(holder)
        if known is None:
            return False
        known.last_heard = self.clock()
        return True

    def claim(self, holder: bytes, request_id: str) -> Offer | None:
        """Keep an offered prompt for `holder` and return it; None when it is not on offer, or not any more.

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
        """Lend up to `want` free blocks, and none of the reserve; return their indices."""
        known = self.holders.get(holder)
        if known is None:
            return []
        granted = max(0, min(want, self.pool.get_num_free_blocks() - self.reserve))
        blocks = self.pool.get_new_blocks(granted) if granted else []
        known.leased.update((block.block_id, block) for block in blocks)
        return [block.block_id for block in blocks]

    def release(self, holder: bytes, request_ids: Iterable[str], blocks: Iterable[int]) -> None:
        """Take back claims and leased blocks. What `holder` does not have is ignored, for it may have expired."""
        known = self.holders.get(holder)
        if known is None:
            return
        for request_id in request_ids:
            # Tail first, so that the head of a prompt stays longest in the prefix cache, as vLLM frees.
            self.pool.free_blocks(reversed(known.claims.pop(request_id, [])))
        self.pool.free_blocks([block for index in blocks if (block := known.leased.pop(index, None)) is not None])

    def silent(self) -> list[bytes]:
        """Return the holders that have been silent for longer than `expiry_s`."""
        deadline = self.clock() - self.expiry_s
        return [name for name, known in self.holders.items() if known.last_heard < deadline]

    def leave(self, holder: bytes) -> LeaseHolder | None:
        """Forget a holder. Return what it has, which stays lent until `evict`; None if it has nothing."""
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
        """How many claims and how many leased blocks decode engines have, those that left included."""
        known = [*self.holders.values(), *self._leaving]
        return sum(len(b.claims) for b in known), sum(len(b.leased) for b in known)
