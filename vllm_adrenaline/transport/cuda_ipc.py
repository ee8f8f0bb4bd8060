"""The CUDA IPC transport: a layer goes from GPU memory to GPU memory of one host, and no host takes part in it.

Each side allocates an inbox, which the other one opens (system/device_memory.py): a page with an announcement, then
rows, as in shared memory (csrc/shm/layout.h). What is stored and waited for is in csrc/cuda/channel.h. Every method
that names a layer is one launch, or two, on the current stream, and may be captured in a CUDA graph.

A step's plan does not go this way: the executor's host has to check it (gpu.py). Nothing here needs more than torch.
"""

from __future__ import annotations

import ctypes
from typing import NamedTuple

import torch

from vllm_adrenaline.native.cuda_channel import (
    ChannelEnd,
    ChannelKernels,
    ChannelMessage,
    ChannelState,
    ChannelStatus,
    ChannelWork,
    message_of,
)
from vllm_adrenaline.system import device_memory
from vllm_adrenaline.system.arithmetic import cdiv
from vllm_adrenaline.system.device_memory import DeviceMemory
from vllm_adrenaline.transport.shape import Shape
from vllm_adrenaline.transport.stamp import step_of

PAGE = 4096
BLOCKS = 64
"""Most blocks of a launch that copies rows: enough for the bandwidth of a link, and few beside local attention."""
MOST_KEPT = 1 << 16
"""Descriptions of launches that are kept, of some 300 bytes: of 64 layers, both ways, at 512 places."""
NO_WORK = ChannelWork()
Sizes = dict[str, tuple[int, int, int]]


def sent_sizes(shape: Shape) -> Sizes:
    """Return the sizes of what a decode worker sends, by name: [T, heads, head size]."""
    tokens, head = shape.max_tokens, shape.head_size
    heads = {"q": shape.num_heads, "k": shape.num_kv_heads, "v": shape.num_kv_heads}
    return {name: (tokens, count, head) for name, count in heads.items()}


def answered_sizes(shape: Shape) -> Sizes:
    """Return the sizes of what an executor answers, by name."""
    return {"out": (shape.max_tokens, shape.num_heads, shape.head_size)}


def spans_of(sizes: Sizes, dtype: torch.dtype) -> tuple[dict[str, slice], int]:
    """Return where each part of an inbox is, in bytes, each on pages of its own; and the bytes of them all."""
    spans, end = {}, PAGE
    for name, (tokens, heads, head) in sizes.items():
        count = tokens * heads * head * dtype.itemsize
        spans[name] = slice(end, end + count)
        end += cdiv(count, PAGE) * PAGE
    return spans, end


class Inbox:
    """Memory that one process reads and another one writes.

    Attributes:
        memory: all of it.
        announcement: the address of the announcement, 8 bytes.
        rows: tensors by name.
    """

    def __init__(self, memory: DeviceMemory, sizes: Sizes, dtype: torch.dtype) -> None:
        """Lay the parts out. Raises ValueError if the memory is too small for them, or begins on no page."""
        self.memory, self.announcement = memory, memory.address
        spans, _ = spans_of(sizes, dtype)
        if memory.address % PAGE:  # the other process says where it is, and a kernel that stores there would fail
            raise ValueError("an inbox does not begin on a page")
        if any(span.stop > memory.size for span in spans.values()):
            raise ValueError(f"an inbox has {memory.size} bytes, too few for its rows")
        whole = memory.tensor()
        self.rows = {name: whole[span].view(dtype).view(sizes[name]) for name, span in spans.items()}

    @classmethod
    def allocate(cls, sizes: Sizes, dtype: torch.dtype) -> Inbox:
        """Return a new inbox. Raises AdrenalineError if there is no memory."""
        _, total = spans_of(sizes, dtype)
        return cls(device_memory.allocate(total), sizes, dtype)


class Health(NamedTuple):
    """How an end of a channel is.

    Attributes:
        status: READY, or why the end failed.
        step: steps that it has begun.
        failed_at: the stamp (csrc/stamp.h) of the layer that it failed in; 0 if it did not.
    """

    status: ChannelStatus
    step: int
    failed_at: int

    @property
    def failed_step(self) -> int | None:
        """The step it failed in: the output of this one, and of all later ones, is worthless. None if it did not."""
        return None if self.status is ChannelStatus.READY else step_of(self.failed_at)


class _End:
    """What both ends have: an inbox, the other's inbox, and the state of this life of the channel.

    The inbox of a life must be new, or its writer must have ended: one that lives could still write into it.

    Attributes:
        inbox: ours.
        epoch: the number of this life, 1 to 65535, the same on both ends.
    """

    def __init__(self, kernels: ChannelKernels, shape: Shape, inbox: Inbox, epoch: int) -> None:
        self.inbox, self.epoch = inbox, epoch
        self._kernels, self._shape = kernels, shape
        self._state = torch.zeros(ctypes.sizeof(ChannelState), dtype=torch.uint8, device="cuda")
        self._seen = torch.zeros(ctypes.sizeof(ChannelState), dtype=torch.uint8, pin_memory=True)
        torch.cuda.current_stream().synchronize()  # launches may go to other streams
        self._end = ChannelEnd()
        self._theirs: dict[str, torch.Tensor] = {}  # rows of the other's inbox; it is open as long as they are there

    def _connect(self, theirs: Inbox, timeout_s: float) -> None:
        self._theirs = theirs.rows
        self._end = ChannelEnd(
            theirs.announcement, self.inbox.announcement, self._state.data_ptr(), self.epoch, int(timeout_s * 1e9)
        )

    def begin(self, budget_s: float | None = None) -> None:
        """Begin a step. Both ends begin each step once.

        `budget_s`: how long its layers are waited for, all together, in seconds; None: as long as was said last.
        """
        if budget_s is not None:
            self._end.budget_ns = int(budget_s * 1e9)
        self._kernels.begin(self._end, _stream())

    def close(self) -> None:
        """Tell the other end that nothing comes any more: its waits end at once."""
        self._kernels.close(self._end, _stream())

    def interrupt(self, stream: torch.cuda.Stream) -> None:
        """End the wait that this end is in, from any thread, by a launch on another stream than it waits on."""
        ours = ChannelEnd(self._end.awaited, self._end.awaited, self._end.state, self.epoch, 0)
        self._kernels.close(ours, stream.cuda_stream)

    def disconnect(self) -> None:
        """Let go of the other's inbox, when what was launched on the current stream is done. It is the last call."""
        torch.cuda.current_stream().synchronize()
        self._theirs = {}

    def look(self) -> None:
        """Have the end's state copied to where the two properties below find it, on the current stream."""
        self._seen.copy_(self._state, non_blocking=True)

    @property
    def seen(self) -> Health:
        """How the end was at the last `look`, which must be done."""
        state = self._seen_state()
        return Health(ChannelStatus(state.status), state.step, state.failed_at)

    @property
    def step_ns(self) -> tuple[int, int]:
        """Nanoseconds of the step at the last `look`: between sends and waits, and in waits."""
        state = self._seen_state()
        return state.local_ns, state.waited_ns

    def _seen_state(self) -> ChannelState:
        return ChannelState.from_buffer_copy(bytes(self._seen.tolist()))

    def health(self) -> Health:
        """Return how the end is when what was launched on the current stream is done. Waits for that."""
        self.look()
        torch.cuda.current_stream().synchronize()
        return self.seen


class CudaDecodeChannel(_End):
    """The decode worker's end.

    What describes a launch is kept: engines use the same memory for a layer again and again.
    """

    def __init__(self, kernels: ChannelKernels, shape: Shape, epoch: int) -> None:
        """Allocate the inbox. Raises AdrenalineError if there is no memory."""
        super().__init__(kernels, shape, Inbox.allocate(answered_sizes(shape), shape.dtype), epoch)
        self._messages: dict[tuple[int, ...], ChannelMessage] = {}

    def connect(self, theirs: DeviceMemory, timeout_s: float) -> None:
        """Take the executor's inbox. The outputs of a step are waited for so many seconds, all together."""
        self._connect(Inbox(theirs, sent_sizes(self._shape), self._shape.dtype), timeout_s)

    def send(
        self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, tokens: torch.Tensor | None, rows: int
    ) -> None:
        """Send rows of q [N, Hq, D], k and v [N, Hk, D]. `tokens`, int64 [rows], says which; -1: none. None: the first.

        Raises ValueError for tensors that the kernel cannot read.
        """
        places = q.data_ptr(), k.data_ptr(), v.data_ptr(), q.stride(0), k.stride(0), v.stride(0)
        key = layer, rows, 0 if tokens is None else tokens.data_ptr(), *places
        message = self._messages.get(key)
        if message is None:
            parts = [(x, self._theirs[name].data_ptr()) for name, x in (("q", q), ("k", k), ("v", v))]
            message = self._keep(key, message_of(self._end, layer, parts, tokens, rows, self._shape.max_tokens))
        self._kernels.send(message, BLOCKS, _stream())

    def receive(self, layer: int, out: torch.Tensor, tokens: torch.Tensor | None, rows: int) -> None:
        """Wait for the layer's output, and copy it to these rows of `out` [N, Hq, D]; zeros if the end has failed.

        Raises ValueError for a tensor that the kernel cannot write.
        """
        key = layer, rows, 0 if tokens is None else tokens.data_ptr(), out.data_ptr(), out.stride(0)
        message = self._messages.get(key)
        if message is None:
            part = (out, self.inbox.rows["out"].data_ptr())
            message = self._keep(key, message_of(self._end, layer, [part], tokens, rows, self._shape.max_tokens))
        stream = _stream()
        self._kernels.await_layer(self._end, layer, NO_WORK, stream)
        self._kernels.take(message, BLOCKS, stream)

    def _keep(self, key: tuple[int, ...], message: ChannelMessage) -> ChannelMessage:
        if len(self._messages) >= MOST_KEPT:  # whoever allocates anew each time
            self._messages.clear()
        self._messages[key] = message
        return message


class CudaExecutorChannel(_End):
    """The executor's end. Kernels attend what lies in its inbox, and write into the decode worker's.

    Attributes:
        tensors: q, k and v of the inbox, and `out` of the decode worker's, by name: [T, heads, head size].
    """

    def __init__(
        self, kernels: ChannelKernels, shape: Shape, epoch: int, theirs: DeviceMemory, timeout_s: float
    ) -> None:
        """Allocate the inbox, and take the decode worker's.

        Args:
            kernels: of the library.
            shape, epoch: as on the decode worker's end.
            theirs: the decode worker's inbox.
            timeout_s: how long the layers of a step are waited for at most, all together, in seconds.

        Raises:
            AdrenalineError: there is no memory.
            ValueError: the decode worker's memory is too small.
        """
        super().__init__(kernels, shape, Inbox.allocate(sent_sizes(shape), shape.dtype), epoch)
        self._connect(Inbox(theirs, answered_sizes(shape), shape.dtype), timeout_s)
        self.tensors = self.inbox.rows | self._theirs

    def disconnect(self) -> None:
        self.tensors = {}
        super().disconnect()

    def await_layer(self, layer: int, first_tile: torch.Tensor | None = None) -> None:
        """Wait for q, k and v of the layer. If the end fails, `first_tile`, the plan of the step, becomes empty."""
        work = NO_WORK if first_tile is None else ChannelWork(first_tile.data_ptr(), first_tile.numel())
        self._kernels.await_layer(self._end, layer, work, _stream())

    def publish(self, layer: int) -> None:
        """Announce the layer's output, which kernels before have written."""
        self._kernels.publish(self._end, layer, _stream())


def _stream() -> int:
    stream: int = torch.cuda.current_stream().cuda_stream
    return stream
