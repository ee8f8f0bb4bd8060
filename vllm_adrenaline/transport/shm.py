"""The shared-memory transport: one anonymous memory file (memfd) per decode worker and executor.

A memfd has no name: nothing is left behind, however the processes end. The peer opens it through /proc/PID/fd. What
lies in it, how it is announced and waited for: csrc/shm. Here it becomes tensors.
"""

from __future__ import annotations

import math
import mmap
import os
import secrets
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from vllm_adrenaline.native.library import library
from vllm_adrenaline.system import memory_file


@dataclass(frozen=True)
class Shape:
    """What a channel is sized for: R rows, T tokens, W blocks in a row, and the model's heads."""

    max_rows: int
    max_tokens: int
    max_blocks: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    dtype: torch.dtype

    @property
    def sizes(self) -> tuple[int, int, int, int, int, int]:
        """Return what csrc/shm/layout.h calls a Shape: counts, then bytes of a row of q, of k or v, and of output."""
        head = self.head_size * self.dtype.itemsize
        row = self.num_heads * head
        return self.max_rows, self.max_tokens, self.max_blocks, row, self.num_kv_heads * head, row


class Memory:
    """A mapped channel; `address` is where it begins."""

    def __init__(self, fd: int, shape: Shape) -> None:
        self.layout = library.layout(*shape.sizes)
        total = self.layout["total"]
        memory_file.check(fd, total, "the channel")
        self._map = mmap.mmap(fd, total)
        self.address = torch.frombuffer(self._map, dtype=torch.uint8).data_ptr()

    def array(self, part: str, sizes: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Return one part as a tensor."""
        flat = torch.frombuffer(self._map, dtype=dtype, count=math.prod(sizes), offset=self.layout[part])
        return flat.view(sizes)


class ShmDecodeChannel:
    """The decode worker's end. It makes the memory; `epoch` tells its life from any other's."""

    def __init__(self, shape: Shape) -> None:
        self.epoch = 1 + secrets.randbelow(library.MAX_EPOCH)
        self.fd = memory_file.create("adrenaline-channel", library.layout(*shape.sizes)["total"])
        try:
            self._memory = Memory(self.fd, shape)
            self.end = library.DecodeEnd(self._memory.address, shape.sizes, self.epoch)
        except BaseException:
            os.close(self.fd)
            raise

    def watch(self, pidfd: int, timeout_s: float, shared_core: bool) -> None:
        """Say whose answers are awaited, how long at most, and whether spinning would keep it from its core."""
        self.end.watch(pidfd, int(timeout_s * 1e9), shared_core)

    @property
    def counters(self) -> tuple[int, int, int]:
        return self.end.counters()

    @property
    def is_closed(self) -> bool:
        return self.end.is_closed()

    def close(self) -> None:
        """Close the file; the memory goes with the last reference to this channel."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


class ShmSteps:
    """The steps of a decode worker over all its channels: StepTransport. One native call per layer and direction."""

    def __init__(self, shape: Shape) -> None:
        self._steps = library.Steps(*shape.sizes[3:5])
        # Bound here, so that a layer costs no Python frame.
        self.send, self.receive = self._steps.send, self._steps.receive
        self._channels: list[ShmDecodeChannel | None] = []

    def begin(self, split: library.Split, channels: Mapping[int, ShmDecodeChannel | None]) -> None:
        self._steps.clear()
        self._channels = [*channels.values()]  # whose memory this step uses
        for executor, channel in channels.items():
            self._steps.add(split, executor, None if channel is None else channel.end)

    @property
    def times_ns(self) -> tuple[int, int]:
        return self._steps.times_ns()


class ShmExecutorChannel:
    """The executor's end: views of its own copy of the plan, and of the slots, taken once a step."""

    def __init__(self, fd: int, shape: Shape, epoch: int, shared_core: bool, num_layers: int, timeout_s: float) -> None:
        """`timeout_s`: how long a layer is waited for at most."""
        memory = Memory(fd, shape)
        self._memory = memory
        r, t, d = shape.max_rows, shape.max_tokens, shape.head_size
        # The native end copies each step's plan to here, so that what was checked is what kernels read.
        self._query_start_loc = torch.zeros(r + 1, dtype=torch.int32)
        self._rows = {
            "seq_lens": torch.zeros(r, dtype=torch.int32),
            "block_table": torch.zeros(r, shape.max_blocks, dtype=torch.int32),
        }
        slots = torch.zeros(t, dtype=torch.int64)
        copies = (self._query_start_loc, *self._rows.values(), slots)
        starts, lens, table, numbers = (copy.data_ptr() for copy in copies)
        timeout_ns = int(timeout_s * 1e9)
        self._end = library.ExecutorEnd(
            memory.address, shape.sizes, epoch, num_layers, timeout_ns, shared_core, starts, lens, table, numbers
        )
        # next_layer(): announce that the output of the layer before is in its slot; wait until q, k, v of the next are;
        # return its number. None: that was the last one, or the step is to be left.
        self.next_layer = self._end.next_layer
        self._tokens = {
            "slot_mapping": slots,
            "q": memory.array("q", (t, shape.num_heads, d), shape.dtype),
            "k": memory.array("k", (t, shape.num_kv_heads, d), shape.dtype),
            "v": memory.array("v", (t, shape.num_kv_heads, d), shape.dtype),
            "out": memory.array("out", (t, shape.num_heads, d), shape.dtype),
        }
        self._views: dict[tuple[int, int], dict[str, torch.Tensor]] = {}

    def next_step(self) -> tuple[int, int, dict[str, torch.Tensor]] | None:
        """Sleep until a step plan comes; return its number, how many rows it has, and its arrays with the q, k, v and
        out slots, of padded size: rows beyond have no token, tokens beyond no slot.

        None: the channel was stopped. Raises RuntimeError when the plan does not fit the channel: nothing of it may be
        believed then.
        """
        found = self._end.next_step()
        if found is None:
            return None
        step, rows, padded_rows, padded_tokens = found
        views = self._views.get((padded_rows, padded_tokens))
        return step, rows, views or self._view(padded_rows, padded_tokens)

    def _view(self, rows: int, tokens: int) -> dict[str, torch.Tensor]:
        """Sizes are few (csrc/shm/layout.h, bucket), so views are made once for each."""
        arrays = {"query_start_loc": self._query_start_loc[: rows + 1]}
        arrays |= {name: array[:rows] for name, array in self._rows.items()}
        arrays |= {name: array[:tokens] for name, array in self._tokens.items()}
        self._views[rows, tokens] = arrays
        return arrays

    def stop(self) -> None:
        """End the waits of this end, from any thread."""
        self._end.stop()

    def close(self) -> None:
        """Tell the decode worker that nothing is written for it any more. The thread that serves it says so."""
        self._end.close()
