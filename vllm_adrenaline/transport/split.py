"""Split a batch by place: what vLLM's stock kernel may see, and the rows of every executor. One native pass a step."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vllm_adrenaline.native.library import library


@dataclass(frozen=True)
class SplitRows:
    """A batch split by place. `local_*` are what vLLM's stock kernel may see; `handle` is the transport's."""

    local_block_table: torch.Tensor
    local_seq_lens: torch.Tensor
    executors: list[int]
    has_local: bool
    handle: library.Split

    def rows(self, executor: int) -> list[int]:
        """Return the rows of the batch that one of `executors` attends."""
        return self.handle.rows(executor)


def split_rows(
    block_table: torch.Tensor,
    query_start_loc: torch.Tensor,
    seq_lens: torch.Tensor,
    slot_mapping: torch.Tensor,
    received_rows: list[int],
    block_size: int,
) -> SplitRows:
    """Split a batch of R requests by the place of their first block (csrc/plan/split.h).

    block_table: int32 [R, W] of KV space ids. query_start_loc: int32 [R + 1]. seq_lens: int32 [R]. slot_mapping: int64
    [T or more]. received_rows: rows whose (one) token's k and v are in the cache already. Masked for the stock kernel:
    remote rows get block 0 and a sequence as long as their query; remote and received tokens lose their slot, in place.
    Raises ValueError or RuntimeError for tensors that are no such batch.
    """
    local_table, local_lens = block_table.new_empty(block_table.shape), seq_lens.new_empty(seq_lens.shape)
    handle, executors, has_local = library.split(
        block_table, query_start_loc, seq_lens, received_rows, slot_mapping, block_size, local_table, local_lens
    )
    return SplitRows(local_table, local_lens, executors, has_local, handle)
