"""The split of a batch on a GPU: the host splits what it knows of the batch, and the device masks its own for it.

The host knows each row's blocks and lengths before the device does, and nothing is ever read back. So a step may be
split while those before are still running.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch

from vllm_adrenaline.decode.masked_batch import MaskedBatch
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
        self._ids, self._batch = tables.ids, torch.empty_like(tables.ids)

    def block_table(self, common: CommonAttentionMetadata) -> torch.Tensor:
        rows = torch.from_numpy(common.req_idx)
        return torch.index_select(self._ids, 0, rows, out=self._batch[: len(rows)])

    def row(self, common: CommonAttentionMetadata, index: int) -> int:
        return int(np.flatnonzero(common.req_idx == index)[0])


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
