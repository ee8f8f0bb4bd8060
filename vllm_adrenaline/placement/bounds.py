"""The paper's bounds on offloading (arXiv 2503.20552, section 1.5 of its notes): ratios of offloaded to local.

All of it is arithmetic over plain numbers; vllm_adrenaline/placement/policy.py puts it to use.
"""

from __future__ import annotations

import math
from typing import Literal

Rule = Literal["or", "and", "c1", "c2"]


def ob_mem(memory: float, decode_memory: float, seconds: float, decode_seconds: float) -> float:
    """Return OB_mem of one executor: its KV memory and its attention bandwidth over those of the decode engine.

    Bandwidth is given as seconds per token of context, so that ratio is the other way round. The paper adds up over
    executors; here each has its own bound, for the slowest of them is what a step waits for.
    """
    bandwidth = decode_seconds / seconds if seconds > 0 else math.inf
    return min(memory / decode_memory if decode_memory > 0 else math.inf, bandwidth)


def ob_comp(b_max: float, b_tpot: float) -> float:
    """Return OB_comp: how many rows may be offloaded for each local one, so that the GEMMs still meet the TPOT
    objective (`b_max` rows) where all-local decoding meets it with `b_tpot` rows."""
    return max(0.0, (b_max - b_tpot) / b_tpot) if b_tpot > 0 else math.inf


def c1(offloaded_tokens: float, final_tokens: float, local_tokens: float, bound: float) -> bool:
    """Say whether the new request fits even at its longest: worst case."""
    return offloaded_tokens + final_tokens <= bound * local_tokens


def c2(offloaded: tuple[float, float], new_tokens: float, local: tuple[float, float], bound: float) -> bool:
    """Say whether the new request fits at present lengths and batch sizes; `offloaded`, `local`: (rows, tokens)."""
    rows, tokens = offloaded
    local_rows, local_tokens = local
    return tokens + new_tokens <= bound * local_tokens and rows + 1 <= bound * local_rows


def within(
    rule: Rule,
    offloaded: tuple[float, float],
    new_tokens: float,
    final_tokens: float,
    local: tuple[float, float],
    bound: float,
) -> bool:
    """Say whether one more request may be offloaded under `rule`; infinite bounds always permit."""
    if math.isinf(bound):
        return True
    worst = c1(offloaded[1], final_tokens, local[1], bound)
    now = c2(offloaded, new_tokens, local, bound)
    return {"or": worst or now, "and": worst and now, "c1": worst, "c2": now}[rule]
