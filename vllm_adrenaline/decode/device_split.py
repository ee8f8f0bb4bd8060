"""The split of a batch on a GPU: the host splits what it knows of the batch, and the device masks its own for it.

The host knows each row's blocks and lengths before the device does, and nothing is ever read back. So a step may be
split while those before are still running.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch

from vllm_adrenaline.decode.remote_attention import RemoteAttention, StepPlan
from vllm_adrenaline.kv import space
from vllm_adrenaline.transport.split import split_rows

if TYPE_CHECKING:
    from vllm.v1.attention.backend import CommonAttentionMetadata
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    from vllm_adrenaline.compat.block_tables import BlockTablesOnHost


class HostTables(Protocol):
    """The block tables of a model runner, on the host."""

    def block_table(self, common: CommonAttentionMetadata) -> torch.Tensor:
        """Return the ids of a batch's blocks, int32 [R, W]: of its requests, without those that pad it."""

    def row(self, common: CommonAttentionMetadata, index: int) -> int:
        """Return the row of the batch in which the request is that the runner has at `index`."""


class BatchTables:
    """Those of model runner V1, which keeps its requests in the order of the batch."""

    def __init__(self, runner: GPUModelRunner) -> None:
        self._runner = runner

    def block_table(self, common: CommonAttentionMetadata) -> torch.Tensor:
        batch = self._runner.input_batch
        table: torch.Tensor = batch.block_table[0].get_cpu_tensor()[: batch.num_reqs]
        return table

    def row(self, common: CommonAttentionMetadata, index: int) -> int:
        return index


class RequestTables:
    """Those of model runner V2, which gives each request an index for as long as it runs."""

    def __init__(self, tables: BlockTablesOnHost) -> None:
        self._ids = tables.ids

    def block_table(self, common: CommonAttentionMetadata) -> torch.Tensor:
        return self._ids[torch.from_numpy(common.req_idx)]

    def row(self, common: CommonAttentionMetadata, index: int) -> int:
        return int(np.flatnonzero(common.req_idx == index)[0])


class MaskedBatch:
    """What the stock kernel may see of a batch, at addresses that stay the same.

    Masked rows have block 0 alone, and a sequence as long as their query. Masked tokens have no slot.
    """

    def __init__(self, max_rows: int, max_tokens: int, width: int, device: torch.device) -> None:
        """`max_rows`, `max_tokens`: of a batch, with padding. `width`: of its block table."""
        self._table = torch.zeros((max_rows, width), dtype=torch.int32, device=device)
        self._lens = torch.zeros(max_rows, dtype=torch.int32, device=device)
        self._masks = torch.zeros(max_rows + max_tokens, dtype=torch.bool, device=device)
        self._rows, self._tokens = self._masks[:max_rows], self._masks[max_rows:]

    def send(self, rows: torch.Tensor, tokens: torch.Tensor) -> None:
        """Send the masks of a step to the device: bool [R] and bool [T], on the host. Waits for nothing."""
        begin = len(self._rows)
        # Memory of torch's cache of pinned blocks: it is given to nobody else before the copy is done.
        masks = torch.zeros(begin + len(tokens), dtype=torch.bool, pin_memory=self._masks.is_cuda)
        masks[: len(rows)] = rows
        masks[begin:] = tokens
        self._masks[: len(masks)].copy_(masks, non_blocking=True)

    def mask_slots(self, slot_mapping: torch.Tensor, num_tokens: int) -> None:
        """Take the slots of masked tokens away, in place. `slot_mapping`: int64 [num_tokens or more]."""
        slot_mapping[:num_tokens].masked_fill_(self._tokens[:num_tokens], -1)

    def mask_rows(self, common: CommonAttentionMetadata) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the block table int32 [R, W] and the lengths int32 [R] without the masked rows.

        The batch may be padded with rows behind those that `send` told of.
        """
        masked = self._rows[: common.num_reqs]
        table, lens = self._table[: common.num_reqs], self._lens[: common.num_reqs]
        table.copy_(common.block_table_tensor[: common.num_reqs])
        table.masked_fill_(masked.unsqueeze(1), 0)
        starts = common.query_start_loc[: common.num_reqs + 1]
        torch.where(masked, starts[1:] - starts[:-1], common.seq_lens[: common.num_reqs], out=lens)
        return table, lens


class DeviceRemoteAttention(RemoteAttention):
    """The remote attention of a decode worker on a GPU. It maps no memory: rows of mapped pools are lost."""

    def __init__(self, *args: Any, tables: HostTables, masked: MaskedBatch, **kwargs: Any) -> None:
        """`tables`: of the model runner. `masked`: large enough for its batches. The rest as of RemoteAttention."""
        super().__init__(*args, **kwargs)
        self._tables, self._masked = tables, masked

    def split(self, common: CommonAttentionMetadata) -> tuple[CommonAttentionMetadata, StepPlan | None]:
        table = self._tables.block_table(common)
        rows = len(table)
        received = [self._tables.row(common, self._row_of[name]) for name in self._received]
        first = table[:, 0].clone()
        remote = first >= space.MAX_BLOCKS
        are_local = not bool(remote.any())
        if are_local and not received:
            return common, None
        starts = common.query_start_loc_cpu[: rows + 1]
        # Lengths are exact here: only drafts make them a bound.
        bound = common.seq_lens_cpu_upper_bound
        slots = torch.zeros(int(starts[rows]), dtype=torch.int64)
        split = split_rows(table, starts, bound[:rows], slots, received, self._block_size, self._bases)
        self._masked.send(remote, slots < 0)
        # The slot mapping is changed in place: the same memory is what vLLM hands to every layer's cache update.
        self._masked.mask_slots(common.slot_mapping, len(slots))
        if are_local:
            return common, None
        masked_table, masked_lens = self._masked.mask_rows(common)
        bound = bound.clone()
        bound[:rows] = split.local_seq_lens
        # max_seq_len stays the bound that it is: what is launched for it must do for the longest row at any time.
        local = common.replace(
            block_table_tensor=masked_table,
            seq_lens=masked_lens,
            seq_lens_cpu_upper_bound=bound,
            _num_computed_tokens_cache=None,
        )
        return local, self._begin(split, first)
