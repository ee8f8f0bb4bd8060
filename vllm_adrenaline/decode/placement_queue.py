"""The placement queue: pending requests, whose prompt is with a prefill engine and that are not placed yet.

They are decided about when they could run (placement/admission.py), not when they arrive: until there is room for them,
the load that decides is another one.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from vllm_adrenaline.placement.policy import Placement
from vllm_adrenaline.system.arithmetic import cdiv

if TYPE_CHECKING:
    from vllm_adrenaline.decode.admission import EngineAdmission
    from vllm_adrenaline.decode.request import RemoteRequest
    from vllm_adrenaline.placement.batch import Batch
    from vllm_adrenaline.placement.pools import Pools


class PlacementQueue:
    """The pending requests, in the order in which their claims were granted."""

    def __init__(self, admission: EngineAdmission, block_size: int) -> None:
        self._admission, self._block_size = admission, block_size
        self._pending: dict[str, RemoteRequest] = {}
        self._told: dict[str, int] = {}

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._pending

    def __bool__(self) -> bool:
        return bool(self._pending)

    @property
    def is_stuck(self) -> bool:
        """Whether some of them wait because there is no room for them."""
        return any(pending.waited for pending in self._pending.values())

    def add(self, pending: RemoteRequest) -> None:
        """A request's prompt is ours.

        The prefill engine is to know how many blocks of its prompts wait. With a fixed ratio it need not: who is to be
        local waits, but who is to be offloaded would not, and must not be kept from being computed.
        """
        self._pending[pending.name] = pending
        if self._admission.ratio is None:
            blocks = self._told[pending.name] = cdiv(pending.request.num_tokens - pending.unfinished, self._block_size)
            pending.pool.client.waiting += blocks

    def drop(self, request_id: str) -> None:
        """It goes on, or ended, if it was here."""
        pending = self._pending.pop(request_id, None)
        if pending is not None and (told := self._told.pop(request_id, 0)):
            pending.pool.client.waiting -= told
            pending.pool.client.beat()  # not a quarter of a second later: prompts may wait for this

    def admit(self, pools: Pools, batch: Batch) -> Iterator[tuple[RemoteRequest, bool]]:
        """Decide about requests that could run now; yield those whose KV stays where it is, and whether it is mapped.

        They have left the queue.

        What may go on locally has its `decision` set, and does so when vLLM gives it memory.
        """
        for pending, decision in self._admission.admit(self._pending.values(), pools, batch):
            if decision.placement in (Placement.OFFLOADED, Placement.MAPPED):
                self.drop(pending.name)
                yield pending, decision.placement is Placement.MAPPED
