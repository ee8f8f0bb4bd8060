# Types of the native library (csrc/bindings). tests/unit/test_native.py compares them with the library itself.
#
# R: requests, T: tokens, W: blocks in a row, Hq and Hk: query and KV heads, D: head size, B: tokens of a block. Tensors
# are on the CPU; those of integers are contiguous. A wrong tensor is a ValueError, what contradicts itself a
# RuntimeError.

from typing import Final, final

import torch

SOURCES: Final[str]
"""Digest of the sources that the library was built from."""
INDEX_BITS: Final[int]
"""Bits of a block id below its pool: kv/space.py."""
MAX_EXECUTORS: Final[int]
MAX_EPOCH: Final[int]
"""The greatest number of a channel's life; the smallest is 1."""
GROUP: Final[int]
"""Block size and head size of a KVCache are multiples of it."""
GROUP_SIZES: Final[tuple[int, ...]]
"""How many query heads may share a KV head of a KVCache."""

def use_tensors(api: object, /) -> None:
    """Read tensors by `torch.Tensor.__dlpack_c_exchange_api__` from now on. Before, whatever takes a tensor raises."""

@final
class Split:
    """The rows of a batch by executor."""

    def rows(self, executor: int, /) -> list[int]:
        """Return the executor's rows in the batch."""

def split(
    block_table: torch.Tensor,
    query_start_loc: torch.Tensor,
    seq_lens: torch.Tensor,
    received_rows: list[int],
    slot_mapping: torch.Tensor,
    block_size: int,
    local_block_table: torch.Tensor,
    local_seq_lens: torch.Tensor,
    /,
) -> tuple[Split, list[int], bool]:
    """Return the split of a batch, its executors, and whether it has local rows.

    block_table: int32 [R, W]; rows may lie further apart. query_start_loc: int32 [R + 1]. seq_lens: int32 [R].
    slot_mapping: int64 [T or more]; changed in place. local_block_table, int32 [R, W], and local_seq_lens, int32 [R],
    are filled.
    """

def layout(max_rows: int, max_tokens: int, max_blocks: int, q_row: int, kv_row: int, out_row: int, /) -> dict[str, int]:
    """Return where the parts of a channel begin, and its "total": bytes. Row sizes are bytes, too."""

@final
class DecodeEnd:
    """The decode worker's end of a channel."""

    def __new__(cls, memory: int, sizes: tuple[int, int, int, int, int, int], epoch: int, /) -> DecodeEnd:
        """`memory`: the address of layout(*sizes)["total"] zeroed bytes, which the caller keeps."""

    def watch(self, pidfd: int, timeout_ns: int, shared_core: bool, /) -> None:
        """Say whose end is awaited (-1: nobody's), how long at most, and whether others need our core."""

    def counters(self) -> tuple[int, int, int]:
        """Return rows x layers, layers, and nanoseconds spent on them, that the executor says it attended."""

    def is_closed(self) -> bool:
        """Return whether the executor answers nothing any more, and said so."""

@final
class Steps:
    """A decode worker's steps, one after the other, over all channels. Serves one thread."""

    def __new__(cls, q_row: int, kv_row: int, /) -> Steps:
        """Sizes of the rows of q, and of k or v, in bytes."""

    def clear(self) -> None:
        """Begin a step without executors."""

    def add(self, split: Split, executor: int, end: DecodeEnd | None, /) -> None:
        """Publish the executor's plan and wake it. `end`, which the caller keeps: None if it is not there; its rows
        become zero then."""

    def send(self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, /) -> None:
        """Pack the plans' rows of query [T, Hq, D], key and value [T, Hk, D], whose heads are contiguous."""

    def receive(self, layer: int, output: torch.Tensor, /) -> int:
        """Fill the plans' rows of output [T, Hq, D]; return the executors that failed in this layer, as bits."""

    def times_ns(self) -> tuple[int, int]:
        """Return nanoseconds between send and receive, and of waiting in receive, since this was made."""

@final
class ExecutorEnd:
    """The executor's end of a channel. Serves one thread; `stop` may be called from any."""

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
        """`timeout_ns`: how long it waits for a layer. The last four: addresses of what the plan of a step is copied
        to, int32 [max R + 1], [max R], [max R, max W] and int64 [max T]. The caller keeps them, and the memory."""

    def next_step(self) -> tuple[int, int, int, int] | None:
        """Sleep until there is a plan; return its number, its rows, and the padded numbers of rows and tokens. None: it
        was stopped. Raises RuntimeError for a plan that does not fit."""

    def next_layer(self) -> int | None:
        """Announce the output of the layer that was returned before, if it was not yet; wait for q, k, v of the next.

        None: it was the last one, or nothing came in time, or the decode worker left the step, or it was stopped.
        """

    def stop(self) -> None:
        """End the waits of this end."""

    def close(self) -> None:
        """Tell the decode worker that nothing is answered any more."""

def can_attend() -> bool:
    """Return whether this processor has what `attend` needs."""

@final
class KVCache:
    """The KV cache of a layer, for `attend`."""

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
    """Attend rows of at most one token: query and output [T, Hq, D], block_table int32 [R, W], seq_lens int32 [R],
    query_start_loc int32 [R + 1]. What it says of blocks and tokens is not checked here."""
