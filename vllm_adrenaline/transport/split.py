"""A batch split by the pool of its KV: what vLLM's stock kernel may see, and the rows of every executor.

The split is one native pass a step (csrc/plan/split.h).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vllm_adrenaline.native.library import library


@dataclass(frozen=True)
class SplitRows:
    """A batch split by pool.

    Attributes:
        local_block_table, local_seq_lens: what vLLM's stock kernel may see, int32 [R, W] and int32 [R].
        executors: those that have rows in the batch.
        has_local: whether the stock kernel has rows to attend: local or mapped ones.
        num_mapped: how many rows are mapped.
        lost: rows in memory that should be mapped and is not.
        handle: the native split, for the transport.
    """

    local_block_table: torch.Tensor
    local_seq_lens: torch.Tensor
    executors: list[int]
    has_local: bool
    num_mapped: int
    lost: list[int]
    handle: library.Split

    def rows(self, executor: int) -> list[int]:
        """Return the numbers of the rows that an executor attends. It must be one of `executors`."""
        return self.handle.rows(executor)


def split_rows(
    block_table: torch.Tensor,
    query_start_loc: torch.Tensor,
    seq_lens: torch.Tensor,
    slot_mapping: torch.Tensor,
    received_rows: list[int],
    block_size: int,
    mapped_bases: list[int] | None = None,
) -> SplitRows:
    """Split a batch of R requests by the pool of their first block.

    The stock kernel sees local rows as they are, and mapped ones by the numbers that their blocks have behind the local
    ones. The rest is masked for it. Remote and lost rows get block 0, and a sequence as long as their query. Tokens of
    remote, lost and received rows lose their slot.

    Args:
        block_table: int32 [R, W], ids of the KV space.
        query_start_loc: int32 [R + 1].
        seq_lens: int32 [R], tokens.
        slot_mapping: int64 [T or more]; changed in place.
        received_rows: rows of one token whose k and v are in the cache already.
        block_size: tokens of a block.
        mapped_bases: by prefill engine, the number of its first block for the stock kernel, or library.NOT_MAPPED.
            None: nothing is mapped.

    Raises:
        ValueError, RuntimeError: the tensors are no such batch.
    """
    local_table, local_lens = block_table.new_empty(block_table.shape), seq_lens.new_empty(seq_lens.shape)
    handle, executors, has_local, num_mapped, lost = library.split(
        block_table,
        query_start_loc,
        seq_lens,
        received_rows,
        slot_mapping,
        block_size,
        mapped_bases or [],
        local_table,
        local_lens,
    )
    return SplitRows(local_table, local_lens, executors, has_local, num_mapped, lost, handle)
