"""Decode attention by the native library (csrc/attention/decode.h): the bits of vLLM's operator, twice as fast.

It needs one core with AVX-512, and a KV cache in vLLM's "vec" layout. Whether it gives vLLM's bits is not believed but
tried, in every process that would use it. Where it does not, or where it does not apply, vLLM's operator attends.
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
"""vLLM's name of the cache layout; how many tokens, and how many dimensions, its operator takes at once."""
LENGTHS = (31744, 15872, 7680, 3584, 1536)
"""Lengths of a row (tokens) that are tried, the longest first. vLLM cuts rows that do not fit half the L2 cache, and a
cut changes the order of a sum."""

attend = library.attend
"""attend(cache of `open_cache`, q, out, block_table, seq_lens, query_start_loc): attends rows of at most one token. The
shapes are in native/_native.pyi."""


def open_cache(keys: torch.Tensor, values: torch.Tensor, num_heads: int, scale: float) -> library.KVCache:
    """Return the KV cache of a layer as `attend` takes it.

    Args:
        keys, values: [blocks, KV heads, block size, head size]; the caller keeps them alive.
        num_heads: query heads.
        scale: of the softmax.

    Raises:
        ValueError, RuntimeError: the native library cannot attend such a cache.
    """
    return library.KVCache(keys, values, num_heads, scale)


def longest_row(num_heads: int, keys: torch.Tensor, isa: str) -> int:
    """Return the longest row (tokens) for which this process may call `attend`; 0: it must not call it at all.

    The answer depends on the number of torch's threads. The first call for a kind of cache tries `attend` out, which
    takes a moment.

    Args:
        num_heads: query heads.
        keys: of the cache in question, [blocks, KV heads, block size, head size].
        isa: vLLM's name of its layout.
    """
    _, num_kv_heads, block_size, head_size = keys.shape
    group = num_heads // num_kv_heads
    if isa != ISA or group not in library.GROUP_SIZES or num_heads % num_kv_heads or torch.get_num_threads() != 1:
        return 0
    if keys.dtype not in (torch.bfloat16, torch.float32) or block_size % GROUP or head_size % GROUP:
        return 0
    return _try_out(group, head_size, block_size, keys.dtype) if library.can_attend() else 0


@functools.cache
def _try_out(group: int, head_size: int, block_size: int, dtype: torch.dtype) -> int:
    """Return the longest row (tokens) that was attended with vLLM's bits, 0 for none.

    Short rows are tried in `dtype`. Long ones are tried in float32, where every bit shows in which order sums are made.
    """
    short = [1, GROUP - 1, GROUP + 1, block_size, block_size + 1, 3 * block_size + GROUP // 2]
    if _gives_equal_bits(group, head_size, block_size, dtype, short):
        for length in LENGTHS:
            if _gives_equal_bits(group, head_size, block_size, torch.float32, [length]):
                logger.info("native decode attention for rows of up to %d tokens", length)
                return length
    logger.warning("vLLM's decode attention gives other bits than the native one: the slower one is used")
    return 0


def _gives_equal_bits(group: int, head_size: int, block_size: int, dtype: torch.dtype, lengths: list[int]) -> bool:
    """Whether both attentions give the same output for random rows of these lengths (tokens)."""
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
