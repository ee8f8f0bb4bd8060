"""How much KV memory a batch will need at most, if every request ends when it is expected to.

All running requests grow by a token a step, and one that ends frees all it has. So the most they need together is less
than the sum of what each needs at its end, and the more so the less they are in step. The idea is that of the
Past-Future scheduler (ASPLOS 2025, arXiv 2507.10150).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import msgspec
import numpy as np

MOMENTS = 32
"""At how many ends of requests the need is looked at."""
MARGIN = 1 / 16
"""Part of the memory that is not counted on: how long answers get is a guess."""


class Memory(msgspec.Struct, frozen=True):
    """KV memory of one pool: `blocks` of `block_size` tokens are what the requests there have and could get; `rows`:
    (tokens, expected growth) of each of them."""

    blocks: int
    block_size: int
    rows: Sequence[tuple[int, int]] = ()

    def fits(self, tokens: int, growth: int, own: int = 0) -> bool:
        """Say whether one more request fits until the end of all; `own`: blocks that it brings along."""
        return self.part_needed(tokens, growth, own) <= 1 - MARGIN

    def part_needed(self, tokens: int, growth: int, own: int = 0) -> float:
        """Return the part of the memory that all need at most with one more request; above 1 if there is too little."""
        needed = peak([*self.rows, (tokens, growth)], self.block_size)
        return needed / (self.blocks + own) if self.blocks + own > 0 else math.inf


def peak(rows: Sequence[tuple[int, int]], block_size: int) -> int:
    """Return the most blocks that requests of (tokens, expected growth) need at the same time, from now on."""
    if not rows:
        return 0
    tokens, growth = np.array(rows, dtype=np.int64).T
    moments = np.unique(growth)
    if len(moments) > MOMENTS:
        moments = moments[np.linspace(0, len(moments) - 1, MOMENTS).astype(np.int64)]
    blocks = -(-(tokens + moments[:, None]) // block_size)
    return int((blocks * (growth >= moments[:, None])).sum(axis=1).max())
