"""Leases of the blocks that offloaded requests grow into: ahead of need. And who must wait when there are too few."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from vllm_adrenaline.control import messages
from vllm_adrenaline.decode.request import RemoteRequest, State
from vllm_adrenaline.placement.starvation import reserve_growth
from vllm_adrenaline.system.arithmetic import cdiv

if TYPE_CHECKING:
    from vllm.v1.request import Request

    from vllm_adrenaline.decode.blocks import RemotePool

LOOKAHEAD = 64
"""Tokens for which a request is provided in advance: a lease takes a millisecond, a token several."""


def reserve(
    known: Mapping[str, RemoteRequest], running: Sequence[Request], block_size: int
) -> tuple[list[Request], list[Request]]:
    """Divide the free leased blocks among the running requests of a step.

    Args:
        known: all requests whose prompt is with a prefill engine, by id.
        running: requests in the order in which they get blocks.
        block_size: tokens of a block.

    Returns:
        The offloaded requests that must wait for a block in this step, and those that have waited for STARVE_S. For
        all others of `running` there are enough blocks.
    """
    mine = [known[request.request_id] for request in running if request.request_id in known]
    growing = [
        (each, id(each.pool), cdiv(each.request.num_tokens_with_spec, block_size) - each.held)
        for each in mine
        if each.state is State.OFFLOADED
    ]
    waiting, leaving = reserve_growth(growing, {id(each.pool): len(each.pool.free) for each in mine}, time.monotonic())
    return [each.request for each in waiting], [each.request for each in leaving]


def adjust(known: Mapping[str, RemoteRequest], pools: Iterable[RemotePool], block_size: int) -> None:
    """Ask prefill engines for blocks that will be needed soon, and give back those that will not be.

    What is given back goes with the pools' next `settle`.

    Args:
        known, block_size: as for `reserve`.
        pools: of all prefill engines.
    """
    for pool in pools:
        mine = [each for each in known.values() if each.pool is pool and each.state is State.OFFLOADED]
        pool.client.offloads = bool(mine)
        near = [_growth(each, LOOKAHEAD, block_size) for each in mine]
        far = [_growth(each, 2 * LOOKAHEAD, block_size) for each in mine]
        change = lease_change(len(pool.free), pool.asked, near, far)
        if change > 0 and pool.peer is not None:
            pool.asked = change
            pool.post(messages.Lease(change))
        elif change < 0:
            pool.give_back(-change)


def _growth(offloaded: RemoteRequest, ahead: int, block_size: int) -> int:
    """Return how many blocks a request needs to reach `ahead` tokens further."""
    request = offloaded.request
    held = offloaded.held + len(offloaded.blocks)
    final = request.num_prompt_tokens + request.max_tokens
    return growth(request.num_tokens, final, held, block_size, ahead)


# Pure arithmetic


def growth(num_tokens: int, final_tokens: int, held: int, block_size: int, ahead: int = LOOKAHEAD) -> int:
    """Return how many more blocks a request needs to reach `ahead` tokens further, as far as it can grow.

    Args:
        num_tokens: that it has.
        final_tokens: at which it ends at the latest: its prompt, and the most output that it may have.
        held: blocks that it has.
        block_size: tokens of a block.
        ahead: in tokens.
    """
    target = min(num_tokens + ahead, max(num_tokens, final_tokens))
    return max(0, cdiv(target, block_size) - held)


def lease_change(free: int, asked: int, near: Iterable[int], far: Iterable[int]) -> int:
    """Return how many blocks to ask for (positive) or to give back (negative).

    Between the two growths nothing is done, so that a request at a block's edge does not make the lease swing.

    Args:
        free: leased blocks that no request has.
        asked: blocks that were asked for already; until they come nothing is changed.
        near, far: blocks that each request needs over one and over two lookaheads.
    """
    if asked:
        return 0
    if (missing := sum(near) - free) > 0:
        return missing
    return -max(0, free - sum(far))
