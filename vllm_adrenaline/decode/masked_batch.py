"""The masks of a batch on a device: what vLLM's stock kernels may see of it, at addresses that stay the same."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from vllm.v1.attention.backend import CommonAttentionMetadata


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
