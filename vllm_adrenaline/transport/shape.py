"""What a channel is sized for, whatever it goes through."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Shape:
    """What a channel is sized for.

    Attributes:
        max_rows, max_tokens, max_blocks: of a step: R rows, T tokens, and W blocks in a row.
        num_heads, num_kv_heads, head_size: of a worker: Hq, Hk and D.
        dtype: of q, k, v and output.
    """

    max_rows: int
    max_tokens: int
    max_blocks: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    dtype: torch.dtype

    @property
    def sizes(self) -> tuple[int, int, int, int, int, int]:
        """What csrc/shm/layout.h calls a Shape: the counts, then the bytes of a row of q, of k or v, and of output."""
        head = self.head_size * self.dtype.itemsize
        row = self.num_heads * head
        return self.max_rows, self.max_tokens, self.max_blocks, row, self.num_kv_heads * head, row
