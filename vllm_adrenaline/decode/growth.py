"""How many leased blocks a decode engine should hold: pure arithmetic over its offloaded requests."""

from collections.abc import Iterable

LOOKAHEAD = 64
"""Tokens a request is provided for in advance: a lease takes a millisecond, a token several."""


def growth(num_tokens: int, final_tokens: int, held: int, block_size: int, ahead: int = LOOKAHEAD) -> int:
    """Return how many blocks a request of `num_tokens` that holds `held` needs to reach `ahead` tokens further.

    Never more than it can ever fill: it ends at `final_tokens` (prompt and most output).
    """
    target = min(num_tokens + ahead, max(num_tokens, final_tokens))
    return max(0, -(-target // block_size) - held)


def lease_change(free: int, asked: int, near: Iterable[int], far: Iterable[int]) -> int:
    """Return how many blocks to ask for (positive) or to give back (negative).

    `near`, `far`: growth of every request over one and over two lookaheads. Between the two nothing is done, so that
    a request at a block's edge does not make the lease swing.
    """
    if asked:
        return 0
    if (missing := sum(near) - free) > 0:
        return missing
    return -max(0, free - sum(far))
