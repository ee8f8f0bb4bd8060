"""Requests whose prompt is with a prefill engine and that are not placed yet: decided about when they could run.

Not when they arrive: until there is room for them, the load that decides is another one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from vllm_adrenaline.placement.policy import Observed, Placement

if TYPE_CHECKING:
    from vllm.v1.request import Request

    from vllm_adrenaline.decode.blocks import RemotePool
    from vllm_adrenaline.decode.placer import Batch, Placer
    from vllm_adrenaline.decode.request import RemoteRequest

SEEN = 64
"""How many waiting requests are looked at in a step."""


class PlacementQueue:
    """See the module. In the order in which their claims were granted."""

    def __init__(self, placer: Placer, block_size: int) -> None:
        self._placer, self._block_size = placer, block_size
        self._undecided: dict[str, RemoteRequest] = {}

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._undecided

    def __bool__(self) -> bool:
        return bool(self._undecided)

    def add(self, waiting: RemoteRequest) -> None:
        """A request's prompt is ours."""
        self._undecided[waiting.name] = waiting
        self._tell(waiting.pool, self._blocks(waiting.request))

    def drop(self, request_id: str) -> None:
        """It goes on, or ended, if it was here."""
        undecided = self._undecided.pop(request_id, None)
        if undecided is not None:
            self._tell(undecided.pool, -self._blocks(undecided.request))

    def count_local(self, waiting: RemoteRequest) -> None:
        """It has local memory: count the decision that let it go on so."""
        if waiting.decision is not None and self._placer.ratio is None:
            self._placer.committed(waiting.decision)

    def place(
        self, observe: Callable[[int], Observed], batch: Batch, free: int, max_rows: int
    ) -> Iterator[RemoteRequest]:
        """Decide, first come first served, about requests that could run now; yield those that are to be offloaded.

        `observe`: the present state, given the free local blocks. `batch` grows with what is decided. What may go on
        locally may do so in this step; if vLLM does not get to it, it is decided anew in the next (not with a fixed
        ratio: that decides once). Behind a request that waits nobody else gets local memory, nor its executor's.
        """
        blocked, by_load = False, self._placer.ratio is None
        full: set[int] = set()
        for name, undecided in list(self._undecided.items())[:SEEN]:
            request, pool = undecided.request, undecided.pool
            if by_load:
                undecided.decision = None
            if undecided.decision is not None or (by_load and batch.rows >= max_rows):
                continue
            if pool.executor in full:
                continue
            decision = self._placer.place(observe(free), request, pool.executor)
            if decision.placement is Placement.OFFLOADED:
                self._placer.committed(decision)
                self._placer.add(batch, request, pool.executor)
                self.drop(name)
                yield undecided
            elif decision.placement is Placement.WAIT or blocked:
                blocked = True
                if decision.placement is Placement.WAIT:
                    full.add(pool.executor)
                    if not undecided.waited:
                        undecided.waited = True
                        self._placer.waited(decision)
            else:
                undecided.decision = decision
                if not by_load:
                    self._placer.committed(decision)
                self._placer.add(batch, request, None)
                free -= self._blocks(request)

    def _blocks(self, request: Request) -> int:
        return -(-request.num_tokens // self._block_size)

    def _tell(self, pool: RemotePool, blocks: int) -> None:
        """Let the prefill engine know how many blocks of its prompts wait. With a fixed ratio it need not: who is to
        be local waits, but who is to be offloaded would not, and must not be kept from being computed."""
        if self._placer.ratio is None:
            pool.client.waiting += blocks
            if blocks < 0:
                pool.client.beat()  # not a quarter of a second later: prompts may wait for this
