"""The KV space: one integer says which block it is *and* where that block lives. Pure arithmetic.

Place 0 is the decode engine's own memory; place e + 1 is the KV cache of the prefill engine behind executor e. The
place sits in the high bits of a block id, so no process has to know how many blocks another one has, and a prefill
engine that comes back with another size changes no id of anybody else. Ids stay inside int32, as block tables want.
"""

from typing import Final

INDEX_BITS: Final = 24
LOCAL: Final = 0
MAX_BLOCKS: Final = 1 << INDEX_BITS
MAX_EXECUTORS: Final = 64
"""Ids would allow 127; a step names those that failed as the bits of one word (csrc/shm/decode_end.h)."""


def pool_of(block_id: int) -> int:
    """Return the place of a block: LOCAL, or executor index + 1."""
    return block_id >> INDEX_BITS


def index_of(block_id: int) -> int:
    """Return the block's index in the KV cache of its place."""
    return block_id & (MAX_BLOCKS - 1)


def remote_id(executor: int, index: int) -> int:
    """Return the id of block `index` behind executor `executor`; raises ValueError outside the space."""
    if not (0 <= executor < MAX_EXECUTORS and 0 <= index < MAX_BLOCKS):
        raise ValueError(f"block {index} of executor {executor} is outside the KV space")
    return (executor + 1) << INDEX_BITS | index
