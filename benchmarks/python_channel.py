"""The data plane as it was before csrc/, in pure Python: what data_plane.py compares with. Not part of the package."""

from __future__ import annotations

import math
import mmap
import os
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import torch

from vllm_adrenaline.errors import AdrenalineError
from vllm_adrenaline.system.arithmetic import cdiv
from vllm_adrenaline.transport.shape import Shape

MAGIC: Final = 0xAD2E_0001
PAGE: Final = 4096
LINE: Final = 8  # words of a 64-byte cache line
W_MAGIC, W_PLAN, W_SENT, W_DONE, W_ROWS, W_LAYERS = (i * LINE for i in range(6))
W_NUM_ROWS, W_NUM_TOKENS = 6 * LINE, 6 * LINE + 1

SPIN: Final = 500
"""Polls before sleeping: some 50 us."""
SLEEP_S: Final = 50e-6


def wait_word(
    words: memoryview, index: int, value: int, timeout_s: float, gone: Callable[[], bool] = lambda: False
) -> bool:
    """Wait until words[index] is `value`: spin, then sleep in short turns.

    Return False after `timeout_s` seconds, or when `gone` (asked while sleeping) says that the peer has ended.
    """
    for _ in range(SPIN):
        if words[index] == value:
            return True
    deadline = time.perf_counter() + timeout_s
    while words[index] != value:
        if time.perf_counter() > deadline or gone():
            return words[index] == value
        time.sleep(SLEEP_S)
    return True


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


def parts(shape: Shape) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Return shape and dtype of every array in the channel, in order."""
    r, t, w, d = shape.max_rows, shape.max_tokens, shape.max_blocks, shape.head_size
    return {
        "query_start_loc": ((r + 1,), torch.int32),
        "seq_lens": ((r,), torch.int32),
        "block_table": ((r * w,), torch.int32),
        "slot_mapping": ((t,), torch.int64),
        "q": ((t, shape.num_heads, d), shape.dtype),
        "k": ((t, shape.num_kv_heads, d), shape.dtype),
        "v": ((t, shape.num_kv_heads, d), shape.dtype),
        "out": ((t, shape.num_heads, d), shape.dtype),
    }


class Memory:
    """A mapped channel: header words and one tensor per part."""

    def __init__(self, fd: int, shape: Shape, create: bool) -> None:
        if platform.machine() not in ("x86_64", "AMD64"):
            raise AdrenalineError(f"the shared-memory data plane needs x86-64; this machine is {platform.machine()}")
        offsets, end = {}, PAGE
        for name, (sizes, dtype) in parts(shape).items():
            offsets[name] = end
            end += cdiv(math.prod(sizes) * dtype.itemsize, PAGE) * PAGE
        if create:
            os.ftruncate(fd, end)
        elif os.fstat(fd).st_size != end:
            raise AdrenalineError(f"channel has {os.fstat(fd).st_size} bytes and should have {end}")
        self._map = mmap.mmap(fd, end)
        self.words = memoryview(self._map)[:PAGE].cast("Q")
        if not create and self.words[W_MAGIC] != MAGIC:
            raise AdrenalineError("this memory is no channel")
        self.words[W_MAGIC] = MAGIC
        self.arrays: dict[str, torch.Tensor] = {}
        for name, (sizes, dtype) in parts(shape).items():
            flat = torch.frombuffer(self._map, dtype=dtype, count=math.prod(sizes), offset=offsets[name])
            self.arrays[name] = flat.view(sizes)


class ShmDecodeChannel:
    """The decode worker's end. `wake` is called once a step, after the plan is in place; `gone`: the peer has ended."""

    def __init__(
        self, shape: Shape, timeout_s: float, wake: Callable[[], None], gone: Callable[[], bool] = lambda: False
    ) -> None:
        self.fd = os.memfd_create("adrenaline-channel", os.MFD_CLOEXEC)
        self._memory = Memory(self.fd, shape, create=True)
        self._words, self._arrays = self._memory.words, self._memory.arrays
        self._timeout_s, self._wake, self._gone = timeout_s, wake, gone
        self._step = 0
        self._tokens = torch.empty(0, dtype=torch.int64)
        self._q = self._k = self._v = self._out = self._tokens

    def begin(self, plan: RowsPlan) -> None:
        arrays, words = self._arrays, self._words
        rows, tokens, width = len(plan.seq_lens), len(plan.tokens), plan.block_table.shape[1]
        arrays["query_start_loc"][: rows + 1].copy_(plan.query_start_loc)
        arrays["seq_lens"][:rows].copy_(plan.seq_lens)
        arrays["block_table"][: rows * width].view(rows, width).copy_(plan.block_table)
        arrays["slot_mapping"][:tokens].copy_(plan.slot_mapping)
        self._step += 1
        words[W_NUM_ROWS], words[W_NUM_TOKENS] = rows, tokens
        words[W_PLAN] = self._step
        self._tokens = plan.tokens
        self._q, self._k = arrays["q"][:tokens], arrays["k"][:tokens]
        self._v, self._out = arrays["v"][:tokens], arrays["out"][:tokens]
        self._wake()

    def send(self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> None:
        torch.index_select(query, 0, self._tokens, out=self._q)
        torch.index_select(key, 0, self._tokens, out=self._k)
        torch.index_select(value, 0, self._tokens, out=self._v)
        self._words[W_SENT] = self._step << 16 | layer + 1

    def receive(self, layer: int, output: torch.Tensor) -> bool:
        if not wait_word(self._words, W_DONE, self._step << 16 | layer + 1, self._timeout_s, self._gone):
            return False
        output.index_copy_(0, self._tokens, self._out)
        return True

    @property
    def counters(self) -> tuple[int, int]:
        """Rows x layers, and layers, that the executor says it attended since the channel was made."""
        return self._words[W_ROWS], self._words[W_LAYERS]

    def close(self) -> None:
        """Close the file; the memory goes with the last tensor that views it."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


class ShmExecutorChannel:
    """The executor's end: views of the plan and the slots, taken once a step."""

    def __init__(self, fd: int, shape: Shape) -> None:
        self._memory = Memory(fd, shape, create=False)
        self._shape = shape
        self.words, self._arrays = self._memory.words, self._memory.arrays
        self.step = self.words[W_PLAN]

    @property
    def has_step(self) -> bool:
        """Whether a plan was published that was not taken yet."""
        return self.words[W_PLAN] != self.step

    def take_step(self) -> dict[str, torch.Tensor]:
        """Return the newest plan's arrays and the q, k, v and out slots, cut to size.

        Raises AdrenalineError when the plan does not fit the channel: nothing of it may be believed then.
        """
        self.step = self.words[W_PLAN]
        rows, tokens = self.words[W_NUM_ROWS], self.words[W_NUM_TOKENS]
        shape, arrays = self._shape, self._arrays
        if not (0 < rows <= shape.max_rows and 0 < tokens <= shape.max_tokens):
            raise AdrenalineError(f"step plan with {rows} rows and {tokens} tokens does not fit its channel")
        width = shape.max_blocks
        return {
            "query_start_loc": arrays["query_start_loc"][: rows + 1],
            "seq_lens": arrays["seq_lens"][:rows],
            "block_table": arrays["block_table"][: rows * width].view(rows, width),
            "slot_mapping": arrays["slot_mapping"][:tokens],
            **{name: arrays[name][:tokens] for name in ("q", "k", "v", "out")},
        }

    def wait_layer(self, layer: int, timeout_s: float) -> bool:
        """Wait until q, k, v of `layer` are in the slot."""
        return wait_word(self.words, W_SENT, self.step << 16 | layer + 1, timeout_s)

    def reply(self, layer: int, rows: int) -> None:
        """Announce that the output of `layer` is in the slot; count what was attended."""
        words = self.words
        words[W_ROWS] += rows
        words[W_LAYERS] += 1
        words[W_DONE] = self.step << 16 | layer + 1
