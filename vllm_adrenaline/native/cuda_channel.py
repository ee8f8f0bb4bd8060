"""Calls of the kernels of a channel (csrc/cuda/channel.h): their arguments as C structures, and their launches.

The same structures serve the emulator of tests/unit.
"""

from __future__ import annotations

import ctypes
import enum
from ctypes import POINTER, c_int, c_int32, c_int64, c_uint32, c_uint64, c_void_p
from pathlib import Path

import torch

from vllm_adrenaline.native.cuda_binding import CudaBinding, Signatures

MOST_PARTS = 3


class ChannelStatus(enum.IntEnum):
    """How an end of a channel is, as in csrc/cuda/channel.h. All but READY stay until the channel's life ends."""

    READY = 0
    LATE = 1
    CLOSED = 2
    STALE = 3
    AHEAD = 4


class ChannelState(ctypes.Structure):
    """What an end knows of its life, and nanoseconds of its step: between sends and waits, and in waits."""

    _fields_ = [
        *((name, c_uint64) for name in ("step", "failed_at")),
        *((name, c_int64) for name in ("budget_ns", "sent_at", "local_ns", "waited_ns")),
        *((name, c_uint32) for name in ("status", "arrived")),
    ]


class ChannelEnd(ctypes.Structure):
    """One end: addresses of announcements and state, the epoch, and how long a step that it begins may wait."""

    _fields_ = [
        *((name, c_void_p) for name in ("announced", "awaited", "state")),
        ("epoch", c_uint64),
        ("budget_ns", c_int64),
    ]


class ChannelRows(ctypes.Structure):
    """Rows of a tensor, and of an inbox."""

    _fields_ = [("tensor", c_void_p), ("inbox", c_void_p), ("stride", c_int64), ("pieces", c_int32)]


class ChannelMessage(ctypes.Structure):
    """A layer's rows, to be sent or taken."""

    _fields_ = [
        ("end", ChannelEnd),
        ("parts", ChannelRows * MOST_PARTS),
        ("tokens", c_void_p),
        ("rows", c_int32),
        ("layer", c_int32),
    ]


class ChannelWork(ctypes.Structure):
    """Work that an end which failed must not do."""

    _fields_ = [("first_tile", c_void_p), ("count", c_int32)]


def message_of(
    end: ChannelEnd,
    layer: int,
    parts: list[tuple[torch.Tensor, int]],
    tokens: torch.Tensor | None,
    rows: int,
    room: int,
) -> ChannelMessage:
    """Return the arguments of a send or a take. The caller keeps all tensors alive.

    Args:
        end: the end that sends or takes.
        layer: its number.
        parts: up to three tensors [any, heads, head size], each with the address of its rows in an inbox.
        tokens: int64 [rows]: the row of each tensor that row i of the inbox belongs to, -1 for none; None: row i.
        rows: of the inbox that are meant.
        room: rows that the inbox has.

    Raises:
        ValueError: the kernels cannot read tensors like these.
    """
    if not 0 < rows <= room or len(parts) > MOST_PARTS:
        raise ValueError(f"{rows} rows of {len(parts)} tensors; there is room for {room} rows of {MOST_PARTS}")
    if tokens is not None and (tokens.dtype != torch.int64 or tokens.shape != (rows,) or tokens.stride(0) != 1):
        raise ValueError("tokens are not one int64 for each row")
    described = []
    for tensor, inbox in parts:
        row = tensor.shape[1] * tensor.shape[2] * tensor.itemsize
        stride = tensor.stride(0) * tensor.itemsize
        if tensor.stride(2) != 1 or tensor.stride(1) != tensor.shape[2]:
            raise ValueError("the heads of a token are not contiguous")
        if tokens is None and tensor.shape[0] < rows:
            raise ValueError(f"{rows} rows of a tensor that has {tensor.shape[0]}")
        if any(number % 16 for number in (row, stride, tensor.data_ptr(), inbox)):
            raise ValueError("rows do not begin at multiples of 16 bytes")
        described.append(ChannelRows(tensor.data_ptr(), inbox, stride, row // 16))
    if rows * sum(part.pieces for part in described) >= 1 << 31:
        raise ValueError("a message is smaller than 32 GiB")
    made = (ChannelRows * MOST_PARTS)(*described)
    return ChannelMessage(end, made, None if tokens is None else tokens.data_ptr(), rows, layer)


class ChannelKernels(CudaBinding):
    """The kernels of a channel in the library that tools/build_cuda.py makes. Each call is one launch on a stream."""

    def __init__(self, path: Path) -> None:
        """Load the library, and have CUDA load the kernels: that may wait for the device, which may wait for a launch.

        Raises OSError if it does not load, RuntimeError if it was built of other sources or CUDA fails.
        """
        end, message, work = POINTER(ChannelEnd), POINTER(ChannelMessage), POINTER(ChannelWork)
        signatures: Signatures = {
            "adrenaline_channel_prepare": (c_int, []),
            "adrenaline_channel_begin": (c_int, [end, c_void_p]),
            "adrenaline_channel_send": (c_int, [message, c_int, c_void_p]),
            "adrenaline_channel_await": (c_int, [end, c_int, work, c_void_p]),
            "adrenaline_channel_publish": (c_int, [end, c_int, c_void_p]),
            "adrenaline_channel_take": (c_int, [message, c_int, c_void_p]),
            "adrenaline_channel_close": (c_int, [end, c_void_p]),
        }
        sizes = {"adrenaline_channel_bytes": ChannelMessage, "adrenaline_channel_state_bytes": ChannelState}
        super().__init__(path, signatures, sizes)
        self._check(self._lib.adrenaline_channel_prepare())

    def begin(self, end: ChannelEnd, stream: int) -> None:
        """Begin a step."""
        self._check(self._lib.adrenaline_channel_begin(end, stream))

    def send(self, message: ChannelMessage, blocks: int, stream: int) -> None:
        """Store rows into the other's inbox and announce them. `blocks`: the most that the launch may have."""
        self._check(self._lib.adrenaline_channel_send(message, blocks, stream))

    def await_layer(self, end: ChannelEnd, layer: int, work: ChannelWork, stream: int) -> None:
        """Wait for a layer; take the work away if it does not come."""
        self._check(self._lib.adrenaline_channel_await(end, layer, work, stream))

    def publish(self, end: ChannelEnd, layer: int, stream: int) -> None:
        """Announce what kernels before stored into the other's inbox."""
        self._check(self._lib.adrenaline_channel_publish(end, layer, stream))

    def take(self, message: ChannelMessage, blocks: int, stream: int) -> None:
        """Copy rows from our inbox; zeros if the end has failed."""
        self._check(self._lib.adrenaline_channel_take(message, blocks, stream))

    def close(self, end: ChannelEnd, stream: int) -> None:
        """Say that nothing comes any more."""
        self._check(self._lib.adrenaline_channel_close(end, stream))
