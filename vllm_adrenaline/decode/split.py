"""Split a batch by place: what vLLM's stock kernel may see, and a plan of rows for every executor. Pure arithmetic."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from vllm_adrenaline import kv_space
from vllm_adrenaline.data.plan import RowsPlan


@dataclass(frozen=True)
class SplitRows:
    """A batch split by place. `local_*` are what vLLM's stock kernel may see; `remote` maps executor to its rows."""

    local_block_table: torch.Tensor
    local_seq_lens: torch.Tensor
    masked_tokens: torch.Tensor
    remote: dict[int, RowsPlan]
    remote_rows: dict[int, np.ndarray]
    has_local: bool


def split_rows(
    block_table: torch.Tensor,
    query_start_loc: torch.Tensor,
    seq_lens: torch.Tensor,
    received_rows: list[int],
    block_size: int,
) -> SplitRows:
    """Split a batch of R requests by the place of their first block.

    block_table: int32 [R, W] of KV space ids. query_start_loc: int32 [R + 1]. seq_lens: int32 [R]. received_rows:
    rows whose (one) token's k and v are in the cache already. Masked for the stock kernel: remote rows get block 0 and
    a sequence as long as their query, remote and received tokens lose their slot.
    """
    table, starts, lens = block_table.numpy(), query_start_loc.numpy(), seq_lens.numpy()
    places = table[:, 0] >> kv_space.INDEX_BITS
    query_lens = np.diff(starts)
    keep = np.zeros(int(starts[-1]), dtype=bool)
    keep[starts[received_rows]] = True
    masked = keep.copy()
    remote, remote_rows = {}, {}
    for place in sorted(set(places.tolist()) - {kv_space.LOCAL}):
        rows = np.flatnonzero(places == place)
        counts = query_lens[rows]
        row_of_token = np.repeat(rows, counts)
        begins = np.concatenate(([0], np.cumsum(counts)))
        within = np.arange(begins[-1]) - np.repeat(begins[:-1], counts)
        tokens = starts[row_of_token] + within
        positions = (lens - query_lens)[row_of_token] + within
        blocks = table[row_of_token, positions // block_size] & (kv_space.MAX_BLOCKS - 1)
        slots = blocks.astype(np.int64) * block_size + positions % block_size
        slots[keep[tokens]] = -1
        masked[tokens] = True
        executor = place - 1
        remote_rows[executor] = rows
        remote[executor] = RowsPlan(
            tokens=torch.from_numpy(tokens.astype(np.int64)),
            query_start_loc=torch.from_numpy(begins.astype(np.int32)),
            seq_lens=torch.from_numpy(lens[rows]),
            block_table=torch.from_numpy(table[rows] & (kv_space.MAX_BLOCKS - 1)),
            slot_mapping=torch.from_numpy(slots),
        )
    elsewhere = places != kv_space.LOCAL
    local_table, local_lens = table.copy(), lens.copy()
    local_table[elsewhere] = 0
    local_lens[elsewhere] = query_lens[elsewhere]
    return SplitRows(
        local_block_table=torch.from_numpy(local_table),
        local_seq_lens=torch.from_numpy(local_lens),
        masked_tokens=torch.from_numpy(np.flatnonzero(masked)),
        remote=remote,
        remote_rows=remote_rows,
        has_local=not elsewhere.all(),
    )
