"""Offloaded requests on their way to the decode engine: their KV is pulled through NIXL, as any prompt's is.

The remote blocks are kept until the pull is over, then go back through the same door as ever. Checked against
vllm/distributed/kv_transfer/kv_connector/v1/nixl/pull_scheduler.py of 0.32 (run).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vllm_adrenaline import kv_space

if TYPE_CHECKING:
    from vllm.v1.request import Request

    from vllm_adrenaline.decode.blocks import RemoteBlock, RemotePool

READ_BY_NOBODY = "HB:"
"""Sent by NIXL as the name of what was read. A claimed prompt is not NIXL's any more, so its name would be an error
there; this is a heartbeat for no request, which it takes and forgets."""


@dataclass(frozen=True)
class Moving:
    """What a moving request still holds elsewhere."""

    request: Request
    pool: RemotePool
    blocks: list[RemoteBlock]


class Moves:
    """All requests that move."""

    def __init__(self, block_size: int, tensor_parallel_size: int) -> None:
        self._block_size, self._tp = block_size, tensor_parallel_size
        self._moving: dict[str, Moving] = {}

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._moving

    @property
    def requests(self) -> list[Request]:
        """All of them."""
        return [moving.request for moving in self._moving.values()]

    def begin(self, request: Request, pool: RemotePool, blocks: list[RemoteBlock]) -> None:
        """From now on the request's KV is what NIXL is to pull: all computed tokens, in the first of `blocks`."""
        peer = pool.borrower.welcome
        assert peer is not None
        self._moving[request.request_id] = Moving(request, pool, blocks)
        used = -(-(request.num_tokens - 1) // self._block_size)
        request.kv_transfer_params = {
            "do_remote_prefill": True,
            "do_remote_decode": False,
            "remote_engine_id": peer.engine_id,
            "remote_request_id": READ_BY_NOBODY,
            "remote_host": peer.nixl_host,
            "remote_port": peer.nixl_port,
            "remote_block_ids": [[kv_space.index_of(block.block_id) for block in blocks[:used]]],
            "tp_size": self._tp,
        }

    def matched_tokens(self, request: Request, num_local: int) -> tuple[int, bool]:
        """Answer for KVConnector.get_num_new_matched_tokens: everything but the last token, which is not computed."""
        params: dict[str, Any] = request.kv_transfer_params or {}
        missing = request.num_tokens - 1 - num_local if params.get("do_remote_prefill") else 0
        return (missing, True) if missing > 0 else (0, False)

    def ended(self, request_ids: Iterable[str]) -> None:
        """These requests need their remote blocks no more: pulled, failed or finished."""
        for request_id in request_ids:
            if (moving := self._moving.pop(request_id, None)) is not None:
                moving.pool.free_blocks(moving.blocks)
