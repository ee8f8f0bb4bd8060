"""The messages of the collective transport: parts of an end's memory, packed into one tensor that can be sent.

An end's memory is laid out like a channel in shared memory (csrc/shm/layout.h), so that native code works on it.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch

from vllm_adrenaline.native.library import library
from vllm_adrenaline.system import memory_file
from vllm_adrenaline.system.arithmetic import cdiv
from vllm_adrenaline.transport.shape import Shape
from vllm_adrenaline.transport.shm import Memory

WORD = 8
"""Bytes of an announcement, and of each counter."""
ALL_BITS = (1 << 64) - 1


def private_memory(shape: Shape) -> Memory:
    """Return memory for one end, laid out as a channel of this shape. Pages that are not used take no memory."""
    fd = memory_file.create("adrenaline-end", library.layout(*shape.sizes)["total"])
    try:
        return Memory(fd, shape)
    finally:
        os.close(fd)


class Message:
    """Parts of an end's memory as one tensor that can be sent or received, and behind them words of its own.

    Attributes:
        whole: uint8 [bytes], what is sent.
        words: int64, the words at its end. The last one is the announcement.
    """

    def __init__(self, memory: Memory, parts: Sequence[tuple[str, int]], words: int = 1) -> None:
        """`parts`: names of the layout, and the bytes of each that are sent. `words`: how many stand behind them."""
        size = WORD * cdiv(sum(count for _, count in parts), WORD)
        self.whole = torch.zeros(size + WORD * words, dtype=torch.uint8)
        self.words = self.whole[size:].view(torch.int64)
        self._announcement = self.words[-1:]
        self._parts, begin = [], 0
        for name, count in parts:
            self._parts.append((memory.array(name, (count,), torch.uint8), self.whole[begin : begin + count]))
            begin += count

    def pack(self, announcement: torch.Tensor) -> None:
        """Copy the parts into the message. `announcement`: int64 [1]."""
        for there, here in self._parts:
            here.copy_(there)
        self._announcement.copy_(announcement)

    def unpack(self) -> None:
        """Copy the parts into the memory."""
        for there, here in self._parts:
            there.copy_(here)

    @property
    def announcement(self) -> int:
        """What was announced, as 64 bits without a sign."""
        return int(self._announcement) & ALL_BITS


class Messages:
    """The messages of one step, all but its head.

    Attributes:
        plan, layer, output: the messages. Behind an output stand what the executor has attended since it attached: rows
            x layers, layers, nanoseconds.
    """

    def __init__(self, memory: Memory, shape: Shape, rows: int, tokens: int, padded_tokens: int) -> None:
        """`rows`: padded. `tokens`: those of q, k, v and output."""
        _, _, width, q_row, kv_row, out_row = shape.sizes
        plan = {"slot_mapping": 8 * padded_tokens, "query_start_loc": 4 * (rows + 1), "seq_lens": 4 * rows}
        self.plan = Message(memory, [*plan.items(), ("block_table", 4 * rows * width)])
        self.layer = Message(memory, [("q", tokens * q_row), ("k", tokens * kv_row), ("v", tokens * kv_row)])
        self.output = Message(memory, [("out", tokens * out_row)], words=4)


class StepMessages:
    """The messages of an end's steps. Those of a step are used again by the next one if that is of the same size."""

    def __init__(self, memory: Memory, shape: Shape) -> None:
        self._memory, self._shape = memory, shape
        self._size = (0, 0, 0)
        self._last: Messages

    def of_size(self, rows: int, tokens: int, padded_tokens: int) -> Messages:
        """Return the messages of a step. The arguments are those of Messages."""
        if self._size != (rows, tokens, padded_tokens):
            self._size = rows, tokens, padded_tokens
            self._last = Messages(self._memory, self._shape, *self._size)
        return self._last


HEAD_WORDS = 5
"""Of a step's head: rows, padded rows, padded tokens, tokens, and the announcement of the plan."""
