"""Blocks of other engines in vLLM's own bookkeeping: blocks that know where they live, and the pools they come from.

A request's blocks are vLLM KVCacheBlocks with an id of the KV space. vLLM gives a block back to `block.pool`
(vllm/v1/core/block_pool.py, BlockPool.free_blocks), so abort, stop, preemption and error all return a remote block
through the same door as a local one. Checked with 0.32 (run) and 0.33 (read).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from vllm.v1.core.kv_cache_utils import KVCacheBlock

from vllm_adrenaline.control import messages
from vllm_adrenaline.kv import space

if TYPE_CHECKING:
    from vllm_adrenaline.control.client import PrefillClient


class RemoteBlock(KVCacheBlock):
    """A block of another engine's KV cache; `claim` names the claim it came with, None for a leased block."""

    __slots__ = ("claim",)

    def __init__(self, block_id: int, pool: Any, claim: str | None) -> None:
        super().__init__(block_id, ref_cnt=1, pool=pool)
        self.claim = claim


class RemotePool:
    """What we have of one prefill engine's KV cache: claimed prompts, leased blocks, and the free ones of those.

    It lasts one life: when the prefill engine is gone, or has taken everything back, another pool takes its place. What
    this one then still says is not sent, and what it held is nobody's business any more.
    """

    def __init__(self, executor: int, client: PrefillClient, life: int = 0) -> None:
        self.executor, self.client, self.life = executor, client, life
        self.free: list[int] = []
        self.asked = 0
        self.available = True
        self._leased: set[int] = set()
        self._claimed: Counter[str] = Counter()
        self._done: list[str] = []
        self._given_back: list[int] = []

    @property
    def peer(self) -> messages.Welcome | None:
        """What the prefill engine said of itself in this life; None while it is not there."""
        return None if not self.available else self.client.peer(self.life)

    @property
    def leased(self) -> int:
        """How many blocks are leased."""
        return len(self._leased)

    @property
    def borrowed(self) -> int:
        """How many blocks of the prefill engine we hold."""
        return self.leased + self._claimed.total()

    @property
    def unsettled(self) -> bool:
        """Whether something is still to be said or to be answered."""
        return bool(self.asked or self._done or self._given_back)

    def holds(self, now: float) -> bool:
        """Whether the prefill engine cannot have taken back anything that was read until `now` (seconds, monotonic)."""
        return self.available and self.client.holds(self.life, now)

    def adopt(self, claim: str, indices: Sequence[int], num_blocks: int) -> list[RemoteBlock]:
        """Return the blocks of a granted claim; the claim is released when the last of them is freed.

        Raises ValueError unless they are `num_blocks` different blocks that the prefill engine has and has not lent us.
        """
        self._check(indices)
        if len(indices) != num_blocks:
            raise ValueError(f"{len(indices)} blocks for a prompt that fills {num_blocks}")
        self._claimed[claim] = len(indices)
        return [RemoteBlock(space.remote_id(self.executor, i), self, claim) for i in indices]

    def add_leased(self, indices: Sequence[int]) -> None:
        """Take blocks that the prefill engine lent; raises ValueError if they cannot be lent."""
        asked, self.asked = self.asked, 0
        self._check(indices)
        if len(indices) > asked:
            raise ValueError(f"{len(indices)} blocks are lent, and {asked} were asked for")
        self._leased.update(indices)
        self.free.extend(indices)

    def _check(self, indices: Sequence[int]) -> None:
        peer = self.peer
        most = peer.num_blocks if peer is not None else space.MAX_BLOCKS
        wrong = [i for i in indices if not 0 <= i < most or i in self._leased]
        if wrong or len(set(indices)) != len(indices):
            raise ValueError(f"blocks {wrong or list(indices)} of {most}, some of them twice, outside or lent already")

    def take(self, count: int) -> list[RemoteBlock]:
        """Return `count` leased blocks; the caller has checked that there are so many."""
        indices = [self.free.pop() for _ in range(count)]
        return [RemoteBlock(space.remote_id(self.executor, i), self, None) for i in indices]

    def free_blocks(self, ordered_blocks: Iterable[KVCacheBlock]) -> None:
        """vLLM gives blocks back (BlockPool.free_blocks)."""
        if not self.available:
            return
        for block in ordered_blocks:
            assert isinstance(block, RemoteBlock)
            if block.claim is None:
                self.free.append(space.index_of(block.block_id))
                continue
            self._claimed[block.claim] -= 1
            if self._claimed[block.claim] == 0:
                del self._claimed[block.claim]
                self.release(block.claim)

    def release(self, claim: str) -> None:
        """A claim is not needed any more."""
        self._done.append(claim)

    def give_back(self, count: int) -> None:
        """Return `count` free leased blocks to the prefill engine."""
        indices = [self.free.pop() for _ in range(count)]
        self._leased.difference_update(indices)
        self._given_back += indices

    def settle(self) -> None:
        """Tell the prefill engine what it may reuse.

        Only between steps, when failures of the last one were reported: until then an executor that failed may write.
        """
        if self._done or self._given_back:
            self.post(messages.Release(self._done, self._given_back))
            self._done, self._given_back = [], []

    def post(self, message: messages.Message) -> None:
        """Say something to the prefill engine, if this life of it is still there."""
        self.client.post(self.life, message)
