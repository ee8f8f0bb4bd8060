"""Decode attention by the native library (csrc/attention/decode.h): vLLM's operator bit for bit, twice as fast.

On one core with AVX-512 and KV caches in vLLM's "vec" layout. Whether it really gives vLLM's bits is not believed but
tried, in every process that would use it; where it does not, or does not apply, vLLM's operator attends.
"""

from __future__ import annotations

import functools
import logging

import torch
from vllm.utils.math_utils import cdiv

from vllm_adrenaline.attention import operators
from vllm_adrenaline.native.library import library

logger = logging.getLogger("vllm.adrenaline")

ISA, GROUP = "vec", library.GROUP
"""vLLM's name of the layout, and how many tokens and dimensions its operator takes at once."""
LENGTHS = (31744, 15872, 7680, 3584, 1536)
"""Tokens of a row that are tried, the longest first: vLLM cuts rows that do not fit half the L2 cache, and that changes
the order of a sum."""

attend = library.attend
"""attend(cache of `open_cache`, q, out, block_table, seq_lens, query_start_loc): rows of at most one token each."""


def open_cache(keys: torch.Tensor, values: torch.Tensor, num_heads: int, scale: float) -> library.KVCache:
    """Return what `attend` takes for a layer; the caller keeps keys and values alive."""
    return library.KVCache(keys, values, num_heads, scale)


def longest_row(num_heads: int, keys: torch.Tensor, isa: str) -> int:
    """Return up to which length of its rows a step may use `attend` on a KV cache like `keys`, in this process with its
    number of threads; 0: never."""
    _, num_kv_heads, block_size, head_size = keys.shape
    group = num_heads // num_kv_heads
    if isa != ISA or group not in library.GROUP_SIZES or num_heads % num_kv_heads or torch.get_num_threads() != 1:
        return 0
    if keys.dtype not in (torch.bfloat16, torch.float32) or block_size % GROUP or head_size % GROUP:
        return 0
    return _tried(group, head_size, block_size, keys.dtype) if library.can_attend() else 0


@functools.cache
def _tried(group: int, head_size: int, block_size: int, dtype: torch.dtype) -> int:
    """Try short rows as they will be, and long ones in float32, where every bit shows in which order sums are made."""
    short = [1, GROUP - 1, GROUP + 1, block_size, block_size + 1, 3 * block_size + GROUP // 2]
    if _gives_equal_bits(group, head_size, block_size, dtype, short):
        for length in LENGTHS:
            if _gives_equal_bits(group, head_size, block_size, torch.float32, [length]):
                logger.info("native decode attention for rows of up to %d tokens", length)
                return length
    logger.warning("vLLM's decode attention gives other bits than the native one: the slower one is used")
    return 0


def _gives_equal_bits(group: int, head_size: int, block_size: int, dtype: torch.dtype, lengths: list[int]) -> bool:
    random = torch.Generator().manual_seed(len(lengths))
    width = cdiv(max(lengths), block_size)

    def some(*sizes: int) -> torch.Tensor:
        return torch.randn(*sizes, generator=random).to(dtype)

    keys, values = some(2 * width, 1, 2 * block_size, head_size).chunk(2, dim=2)
    starts, lens = torch.arange(len(lengths) + 1, dtype=torch.int32), torch.tensor(lengths, dtype=torch.int32)
    step = {
        "q": 3 * some(len(lengths), group, head_size),
        "out": some(len(lengths), group, head_size),
        "query_start_loc": starts,
        "seq_lens": lens,
        "block_table": torch.randint(2 * width, (len(lengths), width), generator=random, dtype=torch.int32),
    }
    scale = head_size**-0.5
    operators.attend(step, keys, values, scale, operators.schedule(group, keys, starts, lens, ISA, split_kv=True))
    found = torch.empty_like(step["out"])
    attend(open_cache(keys, values, group, scale), step["q"], found, step["block_table"], lens, starts)
    return torch.equal(found, step["out"])
