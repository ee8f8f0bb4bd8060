"""The KV space: block ids that say which block it is, *and* in which pool. Pure arithmetic.

The pool is in the high bits of a block id, and the block's index in that pool in the low ones. Pool 0 is the decode
engine's own memory. The memory of prefill engine e has two pools, for there are two ways to attend it: a block of pool
e + 1 is *remote*, and executor e attends it. A block of pool e + MAPPED is *mapped*, and the decode engine attends it
itself, in the memory of the prefill engine, which it has mapped.

No process has to know how many blocks another one has, and a prefill engine that comes back with another size changes
no id of anybody else. Ids fit into int32, as block tables want.
"""

from typing import Final

INDEX_BITS: Final = 24
"""Bits of a block id below its pool."""
LOCAL: Final = 0
"""The pool of the decode engine's own blocks."""
MAX_BLOCKS: Final = 1 << INDEX_BITS
"""Blocks that a pool may have, and the smallest id of a block that is not local."""
MAX_EXECUTORS: Final = 63
"""Prefill engines, with their executors, that a decode engine may have."""
MAPPED: Final = MAX_EXECUTORS + 1
"""The first mapped pool, that of prefill engine 0."""
NUM_POOLS: Final = MAPPED + MAX_EXECUTORS
"""Pools that there may be."""


def pool_of(block_id: int) -> int:
    """Return the pool of a block."""
    return block_id >> INDEX_BITS


def index_of(block_id: int) -> int:
    """Return the block's index in the KV cache of its pool."""
    return block_id & (MAX_BLOCKS - 1)


def remote_pool(executor: int) -> int:
    """Return the pool of the blocks that an executor attends."""
    return executor + 1


def mapped_pool(executor: int) -> int:
    """Return the pool of the same blocks when the decode engine attends them."""
    return executor + MAPPED


def remote_id(executor: int, index: int) -> int:
    """Return the id of block `index` that executor `executor` attends. Raises ValueError for what cannot be."""
    _check(executor, index)
    return remote_pool(executor) << INDEX_BITS | index


def mapped_id(executor: int, index: int) -> int:
    """Return the id of the same block when the decode engine attends it. Raises ValueError for what cannot be."""
    _check(executor, index)
    return mapped_pool(executor) << INDEX_BITS | index


def _check(executor: int, index: int) -> None:
    if not (0 <= executor < MAX_EXECUTORS and 0 <= index < MAX_BLOCKS):
        raise ValueError(f"block {index} of executor {executor} is outside the KV space")
