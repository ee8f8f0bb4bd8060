"""The shared-memory transport: one anonymous memory file (memfd) for each pair of decode worker and executor.

A memfd has no name, so nothing is left behind, however the processes end. It is passed to the executor
(system/descriptors.py).
What lies in it, and how that is announced and waited for, is in csrc/shm. Here it becomes tensors.
"""

from __future__ import annotations

import math
import mmap
import os
import secrets
from collections.abc import Mapping
from typing import Protocol

import torch

from vllm_adrenaline.native.library import library
from vllm_adrenaline.system import memory_file
from vllm_adrenaline.transport.shape import Shape


class Memory:
    """A channel's memory file, mapped into this process.

    Attributes:
        layout: where its parts begin, by name, and its size as "total"; all in bytes.
        address: where it begins in this process.
    """

    def __init__(self, fd: int, shape: Shape) -> None:
        """Map the file, whose size must be right and fixed. Raises AdrenalineError otherwise."""
        self.layout = library.layout(*shape.sizes)
        total = self.layout["total"]
        memory_file.check(fd, total, "the channel")
        self._map = mmap.mmap(fd, total)
        self.address = torch.frombuffer(self._map, dtype=torch.uint8).data_ptr()

    def array(self, part: str, sizes: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Return the part of this name as a tensor of these sizes."""
        flat = torch.frombuffer(self._map, dtype=dtype, count=math.prod(sizes), offset=self.layout[part])
        return flat.view(sizes)


def draw_epoch() -> int:
    """Return a number for a channel's life, 1 to MAX_EPOCH: it tells its announcements from any other's."""
    return 1 + secrets.randbelow(library.MAX_EPOCH)


class ShmDecodeChannel:
    """The decode worker's end of a channel. It makes the memory.

    Attributes:
        epoch: the number of this channel's life, drawn at random.
        fd: the memory file; -1 once it is closed.
        end: the native end.
    """

    def __init__(self, shape: Shape) -> None:
        self.epoch = draw_epoch()
        self.fd = memory_file.create("adrenaline-channel", library.layout(*shape.sizes)["total"])
        try:
            self._memory = Memory(self.fd, shape)
            self.end = library.DecodeEnd(self._memory.address, shape.sizes, self.epoch)
        except BaseException:
            os.close(self.fd)
            raise

    def watch(self, folder: int, pidfd: int, shared_core: bool) -> None:
        """Say who answers. To be called before the first step.

        Args:
            folder: of the executor in /proc, so that a late one may be seen to work; -1: it is not seen, and taken not
                to.
            pidfd: of the executor, so that its end ends every wait; -1: it is not watched.
            shared_core: whether the executor may run on our core, which spinning would keep from it.
        """
        self.end.watch(folder, pidfd, shared_core)

    @property
    def counters(self) -> tuple[int, int, int]:
        return self.end.counters()

    @property
    def is_closed(self) -> bool:
        return self.end.is_closed()

    def leave(self) -> None:
        self.end.leave()

    def close(self) -> None:
        """Close the file. The memory goes with the last reference to this channel."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


class HasEnd(Protocol):
    """A channel of a decode worker: `end` is its native end."""

    @property
    def end(self) -> library.DecodeEnd: ...


class ShmSteps:
    """The steps of a decode worker over all its channels: a StepTransport. A layer is one native call each way."""

    def __init__(self, shape: Shape) -> None:
        self._steps = library.Steps(*shape.sizes[3:5])
        # Bound here, so that a layer costs no Python frame.
        self.send, self.receive = self._steps.send, self._steps.receive
        self._channels: list[HasEnd | None] = []

    def begin(self, split: library.Split, channels: Mapping[int, HasEnd | None], budget_s: tuple[float, float]) -> None:
        soft_s, hard_s = budget_s
        self._steps.begin(int(soft_s * 1e9), int(hard_s * 1e9))
        self._channels = [*channels.values()]  # whose memory this step uses
        for executor, channel in channels.items():
            self._steps.add(split, executor, None if channel is None else channel.end)

    def end(self) -> int:
        return 0

    @property
    def times_ns(self) -> tuple[int, int]:
        return self._steps.times_ns()


def tokens_of(memory: Memory, shape: Shape) -> dict[str, torch.Tensor]:
    """Return the slots q, k, v and out of a channel, by name: [T, heads, head size]."""
    heads = {"q": shape.num_heads, "k": shape.num_kv_heads, "v": shape.num_kv_heads, "out": shape.num_heads}
    return {n: memory.array(n, (shape.max_tokens, h, shape.head_size), shape.dtype) for n, h in heads.items()}


def plan_sizes(shape: Shape) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Return the sizes and types of the tensors of a step's plan at their largest, by name."""
    return {
        "query_start_loc": ((shape.max_rows + 1,), torch.int32),
        "seq_lens": ((shape.max_rows,), torch.int32),
        "block_table": ((shape.max_rows, shape.max_blocks), torch.int32),
        "slot_mapping": ((shape.max_tokens,), torch.int64),
    }


class StepTensors:
    """What an executor attends a step with, as tensors by name: those of the plan, and the slots q, k, v and out."""

    def __init__(self, whole: Mapping[str, torch.Tensor]) -> None:
        """`whole`: the tensors at their largest."""
        self._whole = whole
        self._views: dict[tuple[int, int], dict[str, torch.Tensor]] = {}

    @classmethod
    def of(cls, memory: Memory, shape: Shape) -> StepTensors:
        """Return those in memory that nobody else writes."""
        plan = {name: memory.array(name, size, dtype) for name, (size, dtype) in plan_sizes(shape).items()}
        return cls(plan | tokens_of(memory, shape))

    def view(self, rows: int, tokens: int) -> dict[str, torch.Tensor]:
        """Return the tensors of a padded size, which are kept. Sizes are few (csrc/shm/layout.h, bucket)."""
        if (rows, tokens) not in self._views:
            sizes = {"query_start_loc": rows + 1, "seq_lens": rows, "block_table": rows}
            self._views[rows, tokens] = {n: array[: sizes.get(n, tokens)] for n, array in self._whole.items()}
        return self._views[rows, tokens]


class ShmExecutorChannel:
    """The executor's end of a channel, as tensors: its own copy of the step's plan, and the slots of q, k, v and out.

    Attributes:
        next_layer: announces that the output of the layer before is in its slot, waits until q, k, v of the next are,
            and returns its number. None: that was the last one, or the step is to be left.
        count_step: counts a step whose layers go another way, by the nanoseconds that it took.
    """

    def __init__(
        self,
        fd: int,
        shape: Shape,
        epoch: int,
        shared_core: bool,
        num_layers: int,
        timeout_s: float,
        pinned: bool = False,
    ) -> None:
        """Map the channel.

        Args:
            fd: the memory file, which the caller may close afterwards.
            shape, epoch: as on the decode worker's end.
            shared_core: whether others may want our core, from which spinning would keep them.
            num_layers: of the model.
            timeout_s: how long a layer is waited for at most, in seconds.
            pinned: whether a GPU is to copy the plans from here.

        Raises:
            AdrenalineError: the file has another size, or can shrink.
            RuntimeError: it is no channel of this version.
        """
        memory = Memory(fd, shape)
        self._memory = memory
        # The native end copies each step's plan to here, so that what was checked is what kernels read.
        sizes = plan_sizes(shape)
        copies = {name: torch.zeros(size, dtype=dtype, pin_memory=pinned) for name, (size, dtype) in sizes.items()}
        self._tensors = StepTensors(copies | tokens_of(memory, shape))
        starts, lens, table, numbers = (copy.data_ptr() for copy in copies.values())
        timeout_ns = int(timeout_s * 1e9)
        self._end = library.ExecutorEnd(
            memory.address, shape.sizes, epoch, num_layers, timeout_ns, shared_core, starts, lens, table, numbers
        )
        # Bound here, so that a layer costs no Python frame.
        self.next_layer = self._end.next_layer
        self.count_step = self._end.count_step

    def next_step(self) -> tuple[int, int, dict[str, torch.Tensor]] | None:
        """Sleep until a step's plan comes.

        Returns:
            The step's number, its rows, and its tensors by name: those of the plan, and the slots q, k, v and out. They
            are padded: rows beyond the step's have no token, tokens beyond have no slot. None: the channel was stopped.

        Raises:
            RuntimeError: the plan does not fit the channel. Nothing of it may be believed then.
        """
        found = self._end.next_step()
        if found is None:
            return None
        step, rows, padded_rows, padded_tokens = found
        return step, rows, self._tensors.view(padded_rows, padded_tokens)

    def stop(self) -> None:
        """End the waits of this end, from any thread."""
        self._end.stop()

    def close(self) -> None:
        """Tell the decode worker that nothing is written for it any more. Only the thread that serves it may say so."""
        self._end.close()
