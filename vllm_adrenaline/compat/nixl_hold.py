"""A way to end NIXL's own hold on finished prompts, from within the engine that holds them.

NIXL holds a finished prompt's blocks until somebody has read them or its lease runs out. A prompt that a decode engine
has claimed is held by its claim, and one that was dropped is wanted by nobody. No message and no handshake is needed.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm.distributed.kv_transfer.kv_connector.v1.nixl.base_worker import NixlBaseConnectorWorker


def end_hold(worker: NixlBaseConnectorWorker, request_ids: Iterable[str]) -> set[str]:
    """End the hold of NIXL's worker on these prompts. Return those that it held; to vLLM they count as sent."""
    ended = set()
    for request_id in request_ids:
        if worker._reqs_to_send.pop(request_id, None) is not None:
            worker._reqs_to_process.discard(request_id)
            ended.add(request_id)
    return ended
