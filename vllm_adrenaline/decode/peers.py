"""What a request says of where its prompt's KV is, checked against the prefill engines we know."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import msgspec

from vllm_adrenaline.control import messages

if TYPE_CHECKING:
    from vllm_adrenaline.decode.blocks import RemotePool


class RemoteParams(msgspec.Struct, frozen=True):
    """The part of kv_transfer_params that NIXL acts on, bounded. It comes with the request: trust nothing."""

    do_remote_prefill: bool
    remote_engine_id: messages.Name
    remote_request_id: messages.Name
    remote_host: messages.Name
    remote_port: messages.Count
    remote_block_ids: Annotated[list[messages.Blocks], msgspec.Meta(min_length=1, max_length=1)]
    tp_size: messages.Count = 1
    dcp_size: messages.Count = 1
    pp_size: messages.Count = 1
    do_remote_decode: bool = False


def find_peer(
    raw: dict[str, Any], pools: Sequence[RemotePool], tensor_parallel_size: int, most_blocks: int
) -> tuple[RemotePool, str] | None:
    """Return the prefill engine that holds the prompt and the prompt's name there; None when it is none of ours."""
    try:
        params = msgspec.convert(raw, RemoteParams)
    except msgspec.ValidationError:
        return None
    sizes = (params.tp_size, params.dcp_size, params.pp_size)
    if params.do_remote_decode or not params.do_remote_prefill or sizes != (tensor_parallel_size, 1, 1):
        return None
    where = (params.remote_engine_id, params.remote_host, params.remote_port)
    blocks = params.remote_block_ids[0]
    for pool in pools:
        peer = pool.borrower.welcome
        if peer is not None and (peer.engine_id, peer.nixl_host, peer.nixl_port) == where:
            fits = len(blocks) <= most_blocks and all(index < peer.num_blocks for index in blocks)
            return (pool, params.remote_request_id) if fits else None
    return None
