"""A copy on the host of the block tables of vLLM's model runner V2, which has them on the GPU alone.

Checked against vllm/v1/worker/gpu/block_table.py of 0.32 and 0.33: read, not run.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from vllm.v1.worker.gpu.block_table import BlockTables


class BlockTablesOnHost:
    """The block tables of a runner's first group of layers, on the host from when this is made.

    Attributes:
        ids: int32 [requests, W], by the runner's index of a request (RequestState.req_id_to_index). Behind the blocks
            that a request has are zeros.
    """

    def __init__(self, tables: BlockTables) -> None:
        self.ids = torch.zeros(tables.block_tables[0].gpu.shape, dtype=torch.int32)
        ids, num_blocks, append = self.ids.numpy(), tables.num_blocks.np, tables.append_block_ids

        def append_block_ids(req_index: int, new_block_ids: tuple[list[int], ...], overwrite: bool) -> None:
            append(req_index, new_block_ids, overwrite)  # it raises if there is no room
            if overwrite:
                ids[req_index] = 0
            end = int(num_blocks[0, req_index])
            ids[req_index, end - len(new_block_ids[0]) : end] = new_block_ids[0]

        vars(tables)["append_block_ids"] = append_block_ids
