"""The plan of one step for one executor: which rows it attends and where their KV is. Built once a step."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class RowsPlan:
    """Offloaded rows of one executor. R requests, T tokens; block and slot numbers are the executor's own.

    tokens: int64 [T], positions in the flat batch. query_start_loc: int32 [R + 1]. seq_lens: int32 [R].
    block_table: int32 [R, W]. slot_mapping: int64 [T], -1 where the KV cache must not be written.
    """

    tokens: torch.Tensor
    query_start_loc: torch.Tensor
    seq_lens: torch.Tensor
    block_table: torch.Tensor
    slot_mapping: torch.Tensor
