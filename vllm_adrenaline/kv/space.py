"""The KV space: block ids that say which block it is, *and* in which pool. Pure arithmetic.

Pool 0 is the decode engine's own memory. Pool e + 1 is the KV cache of the prefill engine behind executor e. The pool
is in the high bits of a block id, and the block's index in that pool in the low ones. So no process has to know how
many blocks another one has, and a prefill engine that comes back with another size changes no id of anybody else. Ids
fit into int32, as block tables want.
"""

from typing import Final

INDEX_BITS: Final = 24
"""Bits of a block id below its pool."""
LOCAL: Final = 0
"""The pool of the decode engine's own blocks."""
MAX_BLOCKS: Final = 1 << INDEX_BITS
"""Blocks that a pool may have, and the smallest id of a block that is not local."""
MAX_EXECUTORS: Final = 64
"""Ids would allow 127. A step names those that failed as the bits of one word (csrc/shm/decode_end.h)."""


def pool_of(block_id: int) -> int:
    """Return the pool of a block: LOCAL, or the executor's index + 1."""
    return block_id >> INDEX_BITS


def index_of(block_id: int) -> int:
    """Return the block's index in the KV cache of its pool."""
    return block_id & (MAX_BLOCKS - 1)


def remote_id(executor: int, index: int) -> int:
    """Return the id of block `index` behind executor `executor`. Raises ValueError for what the space does not have."""
    if not (0 <= executor < MAX_EXECUTORS and 0 <= index < MAX_BLOCKS):
        raise ValueError(f"block {index} of executor {executor} is outside the KV space")
    return (executor + 1) << INDEX_BITS | index
