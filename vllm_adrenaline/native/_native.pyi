# Types of the native library (csrc/bindings). tests/unit/test_native.py compares them with the library itself.
#
# R: requests, T: tokens, W: blocks in a row, Hq and Hk: query and KV heads, D: head size, B: tokens of a block. Tensors
# are on the CPU, and those of integers are contiguous. A tensor of the wrong kind raises ValueError. Arguments that do
# not fit each other raise RuntimeError.

from typing import Final, final

import torch

SOURCES: Final[str]
"""Digest of the sources that the library was built from."""
INDEX_BITS: Final[int]
"""Bits of a block id below its pool (kv/space.py)."""
MAX_EXECUTORS: Final[int]
"""Executors that a step may have."""
MAPPED: Final[int]
"""The first pool of mapped memory (kv/space.py)."""
NOT_MAPPED: Final[int]
"""What stands for the base of memory that is not mapped."""
MAX_EPOCH: Final[int]
"""The greatest number of a channel's life. The smallest is 1."""
GROUP: Final[int]
"""Block size and head size of a KVCache are multiples of it."""
GROUP_SIZES: Final[tuple[int, ...]]
"""How many query heads may share a KV head of a KVCache."""

def use_tensors(api: object, /) -> None:
    """Read tensors by `torch.Tensor.__dlpack_c_exchange_api__` from now on. Before, whatever needs a tensor raises."""

@final
class Split:
    """A batch split by pool: the rows of each executor, as `Steps.add` publishes them."""

    def rows(self, executor: int, /) -> list[int]:
        """Return the numbers of the executor's rows in the batch. RuntimeError for an executor without any."""

    def tokens(self, executor: int, /) -> list[int]:
        """Return the positions of the executor's tokens in the batch, in the order in which they are sent."""

def split(
    block_table: torch.Tensor,
    query_start_loc: torch.Tensor,
    seq_lens: torch.Tensor,
    received_rows: list[int],
    slot_mapping: torch.Tensor,
    block_size: int,
    mapped_bases: list[int],
    local_block_table: torch.Tensor,
    local_seq_lens: torch.Tensor,
    /,
) -> tuple[Split, list[int], bool, int, list[int]]:
    """Return the split of a batch, its executors, whether the stock kernel has rows to attend, how many of those are
    mapped, and the rows in memory that should be mapped and is not.

    Args:
        block_table: int32 [R, W], ids of the KV space; rows may lie further apart.
        query_start_loc: int32 [R + 1].
        seq_lens: int32 [R], tokens.
        received_rows: rows of one token whose k and v are in the cache already.
        slot_mapping: int64 [T or more]; changed in place.
        block_size: tokens of a block.
        mapped_bases: by prefill engine, the number of its first block for the stock kernel, or NOT_MAPPED.
        local_block_table, local_seq_lens: int32 [R, W] and int32 [R]; filled with what the stock kernel may see.
    """

def layout(max_rows: int, max_tokens: int, max_blocks: int, q_row: int, kv_row: int, out_row: int, /) -> dict[str, int]:
    """Return where each part of a channel begins, by name, and its size as "total". All sizes are in bytes.

    The words of the header are "plan", "sent" and "done" (int64: announcements), "counts" (three of int32: rows, padded
    rows, padded tokens) and "closed" (int32).
    """

@final
class DecodeEnd:
    """The decode worker's end of a channel."""

    def __new__(cls, memory: int, sizes: tuple[int, int, int, int, int, int], epoch: int, /) -> DecodeEnd:
        """`memory`: the address of layout(*sizes)["total"] zeroed bytes, which the caller keeps. `epoch`: its life."""

    def watch(self, folder: int, pidfd: int, shared_core: bool, /) -> None:
        """Say who answers (-1 each: it cannot be seen, is not watched), and whether others need our core."""

    def leave(self) -> None:
        """Ask nothing any more. The executor leaves the step that it may be in, and closes the channel."""

    def counters(self) -> tuple[int, int, int]:
        """Return what the executor says that it attended: rows x layers, layers, and nanoseconds spent on them."""

    def is_closed(self) -> bool:
        """Return whether the executor has said that it answers nothing any more."""

    def is_taken(self) -> bool:
        """Return whether the executor has copied the last plan. Who takes a step's output need not ask."""

@final
class Steps:
    """A decode worker's steps, one after the other, over all its channels. For one thread."""

    def __new__(cls, q_row: int, kv_row: int, /) -> Steps:
        """Sizes of the rows of q, and of k or v, in bytes."""

    def begin(self, soft_ns: int, hard_ns: int, /) -> None:
        """Begin a step without executors.

        Each of those that are added is waited for `soft_ns`, all layers of the step together, and then up to `hard_ns`
        as long as it works: one of its threads runs, wants to run, or waits for a disk or for memory.
        """

    def add(self, split: Split, executor: int, end: DecodeEnd | None, /) -> None:
        """Publish an executor's plan and wake the executor.

        `end` is its channel, which the caller keeps; None for one that is not there, whose rows become zero.
        """

    def send(self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, /) -> None:
        """Send the executors' rows of query [T, Hq, D], key and value [T, Hk, D], whose heads are contiguous."""

    def receive(self, layer: int, output: torch.Tensor, /) -> int:
        """Fill the executors' rows of output [T, Hq, D]; return the executors that failed in this layer, as bits."""

    def times_ns(self) -> tuple[int, int]:
        """Return the nanoseconds between send and receive, and those of waiting in receive, since this was made."""

@final
class ExecutorEnd:
    """The executor's end of a channel. For one thread, except for `stop`."""

    def __new__(
        cls,
        memory: int,
        sizes: tuple[int, int, int, int, int, int],
        epoch: int,
        layers: int,
        timeout_ns: int,
        shared_core: bool,
        query_start_loc: int,
        seq_lens: int,
        block_table: int,
        slot_mapping: int,
        /,
    ) -> ExecutorEnd:
        """`timeout_ns`: how long it waits for a layer at most.

        The last four are the addresses to which a step's plan is copied: int32 [max R + 1], int32 [max R],
        int32 [max R, max W] and int64 [max T]. The caller keeps them, and the channel's memory.
        """

    def next_step(self) -> tuple[int, int, int, int] | None:
        """Sleep until there is a plan; return its number, its rows, and its rows and tokens with padding.

        None: it was stopped. Raises RuntimeError for a plan that does not fit the channel.
        """

    def next_layer(self) -> int | None:
        """Announce the output of the layer returned before, if there is one; wait for the next layer, and return it.

        None: that was the last one, or nothing came in time, or the decode worker left the step, or it was stopped.
        """

    def count_step(self, busy_ns: int, /) -> None:
        """Count the step that `next_step` returned, whose layers went another way, and how long it took."""

    def stop(self) -> None:
        """End the waits of this end. Any thread may call it."""

    def close(self) -> None:
        """Tell the decode worker that nothing is answered any more."""

def can_attend() -> bool:
    """Return whether this processor has what `attend` needs."""

@final
class KVCache:
    """The KV cache of a layer, as `attend` takes it."""

    def __new__(cls, keys: torch.Tensor, values: torch.Tensor, num_heads: int, scale: float, /) -> KVCache:
        """`keys`, `values`: [blocks, Hk, B, D] of bfloat16 or float32 in vLLM's "vec" layout; the caller keeps them
        alive. `num_heads`: query heads. `scale`: of the softmax."""

def attend(
    cache: KVCache,
    query: torch.Tensor,
    output: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    query_start_loc: torch.Tensor,
    /,
) -> None:
    """Attend rows of at most one token each.

    Whether blocks and tokens are inside the cache and the tensors is not checked.

    Args:
        cache: of the layer.
        query, output: [T, Hq, D], in the dtype of the cache.
        block_table: int32 [R, W].
        seq_lens: int32 [R], tokens.
        query_start_loc: int32 [R + 1].
    """
