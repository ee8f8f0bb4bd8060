"""Remote blocks in vLLM's own bookkeeping, and the pools that they come from.

An offloaded request's blocks are vLLM's KVCacheBlocks with ids of the KV space. vLLM gives a block back to `block.pool`
(vllm/v1/core/block_pool.py, BlockPool.free_blocks). So abort, stop, preemption and error all return a remote block in
the same way as a local one. Checked with 0.32 (run) and 0.33 (read).
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
    """A block of a prefill engine's KV cache.

    Attributes:
        claim: the name of the claim with which it came; None for a leased block.
    """

    __slots__ = ("claim",)

    def __init__(self, block_id: int, pool: Any, claim: str | None) -> None:
        super().__init__(block_id, ref_cnt=1, pool=pool)
        self.claim = claim


class RemotePool:
    """What we have of one prefill engine's KV cache: claimed prompts, and leased blocks.

    A pool lasts one life of the prefill engine (control/client.py). When that is gone, or has taken everything back,
    another pool replaces this one. What this one posts then is not sent.

    Attributes:
        executor: the number of the prefill engine, in the order of `--adrenaline-peers`.
        client: the line to it.
        life: which life of it.
        free: leased blocks that no request has, by index.
        asked: how many blocks were asked for in a lease that is not answered yet.
        available: False once the life is over. Mapped requests go on using what they have of it: it is still there.
        member: what we are as a holder there (messages.Welcome); empty before a claim was granted.
        unmapped_until: until when nothing new is to be mapped, for it could not be (seconds, monotonic).
        is_written: whether an executor that failed may still write into blocks of ours. Until it has let go, leased
            blocks that come free are given to nobody, nor are those that were free, and none is given back.
    """

    def __init__(self, executor: int, client: PrefillClient, life: int = 0) -> None:
        self.executor, self.client, self.life = executor, client, life
        self.free: list[int] = []
        self.asked = 0
        self.available = True
        self.member = ""
        self.unmapped_until = 0.0
        self.is_written = False
        self._kept: list[int] = []  # leased blocks that no request has, and an executor may write
        self._leased: set[int] = set()
        self._claimed: Counter[str] = Counter()
        self._done: list[str] = []
        self._given_back: list[int] = []

    @property
    def peer(self) -> messages.Welcome | None:
        """What the prefill engine said of itself in this life; None before that and when the life is over."""
        return None if not self.available else self.client.peer(self.life)

    @property
    def leased(self) -> int:
        """How many blocks are leased, those that requests have and free ones."""
        return len(self._leased)

    @property
    def borrowed(self) -> int:
        """How many blocks of the prefill engine we hold: leased ones, and those of claims."""
        return self.leased + self._claimed.total()

    @property
    def unsettled(self) -> bool:
        """Whether a lease is not answered yet, or blocks and claims are still to be given back."""
        return bool(self.asked or self._done or self._given_back)

    def holds(self, now: float) -> bool:
        """Whether the prefill engine cannot have taken anything back before `now` (seconds, monotonic)."""
        return self.available and self.client.holds(self.life, now)

    def adopt(self, claim: str, indices: Sequence[int], num_blocks: int) -> list[RemoteBlock]:
        """Return the blocks of a granted claim. The claim is released when the last of them is freed.

        Args:
            claim: its name.
            indices: of the blocks, as the prefill engine says.
            num_blocks: how many blocks the prompt fills.

        Raises:
            ValueError: they are not `num_blocks` different blocks that the prefill engine has and has not lent us.
        """
        self._check(indices)
        if len(indices) != num_blocks:
            raise ValueError(f"{len(indices)} blocks for a prompt that fills {num_blocks}")
        self._claimed[claim] = len(indices)
        self.member = self.peer.member if self.peer is not None else self.member
        return [RemoteBlock(space.remote_id(self.executor, i), self, claim) for i in indices]

    def keep_from_use(self, is_written: bool) -> None:
        """Note whether an executor that failed may still write into blocks of ours."""
        if is_written == self.is_written:
            return
        self.is_written = is_written
        if is_written:
            self.free, self._kept = [], self.free
        else:
            self.free, self._kept = self.free + self._kept, []

    def add_leased(self, indices: Sequence[int]) -> None:
        """Take the answer to a lease: indices of blocks. Raises ValueError if they cannot be lent, or are too many."""
        asked, self.asked = self.asked, 0
        self._check(indices)
        if len(indices) > asked:
            raise ValueError(f"{len(indices)} blocks are lent, and {asked} were asked for")
        self._leased.update(indices)
        self.free.extend(indices)

    def _check(self, indices: Sequence[int]) -> None:
        """Raise ValueError unless these are different blocks that the prefill engine has and has not lent us."""
        peer = self.peer
        most = peer.num_blocks if peer is not None else space.MAX_BLOCKS
        wrong = [i for i in indices if not 0 <= i < most or i in self._leased]
        if wrong or len(set(indices)) != len(indices):
            raise ValueError(f"blocks {wrong or list(indices)} of {most}, some of them twice, outside or lent already")

    def take(self, count: int) -> list[RemoteBlock]:
        """Return `count` free leased blocks for a request. The caller has checked that there are so many."""
        indices = [self.free.pop() for _ in range(count)]
        return [RemoteBlock(space.remote_id(self.executor, i), self, None) for i in indices]

    def free_blocks(self, ordered_blocks: Iterable[KVCacheBlock]) -> None:
        """Take back blocks that a request does not need any more, as vLLM's BlockPool.free_blocks does."""
        for block in ordered_blocks:
            assert isinstance(block, RemoteBlock)
            if block.claim is None:
                unused = self._kept if self.is_written else self.free
                unused.append(space.index_of(block.block_id))
                continue
            self._claimed[block.claim] -= 1
            if self._claimed[block.claim] == 0:
                del self._claimed[block.claim]
                self.release(block.claim)

    def release(self, claim: str) -> None:
        """Release a claim, with the next `settle`."""
        self._done.append(claim)

    def give_back(self, count: int) -> None:
        """Give `count` free leased blocks back to the prefill engine, with the next `settle`."""
        indices = [self.free.pop() for _ in range(count)]
        self._leased.difference_update(indices)
        self._given_back += indices

    def settle(self) -> None:
        """Tell the prefill engine which blocks it may reuse.

        To be called only between steps, when the failures of the last one were reported. Until then an executor that
        failed may write. Nothing is told while one does.
        """
        if (self._done or self._given_back) and not self.is_written:
            self.post(messages.Release(self._done, self._given_back))
            self._done, self._given_back = [], []

    def post(self, message: messages.Message) -> None:
        """Send a message to the prefill engine, if this life of it is not over by then."""
        self.client.post(self.life, message)
