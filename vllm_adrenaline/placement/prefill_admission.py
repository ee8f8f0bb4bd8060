"""When a prefill engine lets new prompts wait, so that what decode engines hold of its memory can grow. Pure.

Prompts that pile up until there is room for them take the memory that would be that room: offloaded requests stop, and
with them the very requests that make room.
"""

from __future__ import annotations

import msgspec

MAX_BACKLOG_SHARE = 0.125
"""Share of the KV blocks that finished prompts may hold until decode engines have placed them, while anything is lent.
Enough for a decode engine to find its next requests ready, and not much of what it could offload into."""


class Blocks(msgspec.Struct, frozen=True):
    """Of a prefill engine, in blocks: `total`; `free`; `growth_reserve`, kept free for growth; `waiting`, held by
    finished prompts that decode engines have not placed. `lent`: decode engines hold some for offloaded requests.
    `offers`: finished prompts can be had, or are kept for requests of decode engines."""

    total: int
    free: int
    growth_reserve: int
    waiting: int
    lent: bool
    offers: bool


def should_defer_prefill(blocks: Blocks, needed: int) -> bool:
    """Say whether the next prompt, of `needed` blocks, is to wait. Never while nothing is lent or on offer: only then
    does its memory serve nobody else."""
    too_far = blocks.lent and blocks.waiting > 0 and blocks.waiting + needed > int(blocks.total * MAX_BACKLOG_SHARE)
    too_little = (blocks.lent or blocks.offers) and blocks.free - needed < blocks.growth_reserve
    return too_far or too_little
