"""What a request says of where its prompt's KV is (`kv_transfer_params`), checked against our prefill engines.

Only two names and the stamp are used, if the prefill engine has signed them; a few other fields can but lead to a
refusal. Which blocks hold the prompt, and where they are read, the prefill engine says itself when it grants the claim.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import msgspec

from vllm_adrenaline.control import messages
from vllm_adrenaline.kv.stamp import Stamp

if TYPE_CHECKING:
    from vllm_adrenaline.decode.blocks import RemotePool


class Where(msgspec.Struct, frozen=True):
    """Where a prompt is said to be: the life of a prefill engine, and the prompt's name there."""

    remote_engine_id: messages.Name
    remote_request_id: messages.Name


class RemoteParams(Where, frozen=True):
    """The part of kv_transfer_params that is looked at, bounded. A client may have written it: nothing is trusted."""

    do_remote_prefill: bool
    adrenaline: Stamp
    tp_size: messages.Count = 1
    dcp_size: messages.Count = 1
    pp_size: messages.Count = 1
    do_remote_decode: bool = False


@dataclass(frozen=True)
class Found:
    """What kv_transfer_params come to.

    Attributes:
        pool: of the prefill engine that has the prompt; None when no prefill engine of ours has it.
        claim: the prompt's name there.
        refusal: why the prompt must not be used; None when it may.
        is_signed: whether the prefill engine said so. Else it may be another user's prompt, and nothing is done to it.
    """

    pool: RemotePool | None
    claim: str
    refusal: str | None
    is_signed: bool = False


def find(raw: Any, pools: Sequence[RemotePool], tensor_parallel_size: int, prompt: Sequence[int]) -> Found:
    """Return where a request's prompt is, and whether it may be used.

    Args:
        raw: the request's kv_transfer_params.
        pools: of all our prefill engines.
        tensor_parallel_size: of this engine, which the prefill engine must have, too.
        prompt: the request's token ids.
    """
    try:
        where = msgspec.convert(raw, Where)
        where.remote_request_id.encode()
    except ValueError as error:  # msgspec's, or of text that is JSON and no UTF-8: half a surrogate pair
        return Found(None, "", f"its kv_transfer_params are malformed ({error})")
    pool = next((p for p in pools if p.peer is not None and p.peer.engine_id == where.remote_engine_id), None)
    if pool is None:
        return Found(None, "", "its kv_transfer_params name no prefill engine of ours")
    try:
        params = msgspec.convert(raw, RemoteParams)
    except ValueError as error:
        return Found(pool, where.remote_request_id, f"its kv_transfer_params are malformed ({error})")
    if pool.peer is None or not params.adrenaline.is_signed(pool.peer.key, raw):
        return Found(pool, where.remote_request_id, "its kv_transfer_params are not signed by the prefill engine")
    return Found(pool, where.remote_request_id, _refusal(params, tensor_parallel_size, prompt), is_signed=True)


def _refusal(params: RemoteParams, tensor_parallel_size: int, prompt: Sequence[int]) -> str | None:
    if params.do_remote_decode:
        return "its kv_transfer_params are not those of a finished prompt"
    if (params.tp_size, params.dcp_size, params.pp_size) != (tensor_parallel_size, 1, 1):
        return "its kv_transfer_params are of a prefill engine with another parallelism"
    # Of a prompt that ended early only the beginning is there, and nobody is to take it for all of it.
    if params.adrenaline.fits(prompt, is_beginning=not params.do_remote_prefill):
        return None
    return "its kv_transfer_params are those of another prompt"
