"""Both ends of a channel through GPU memory, in memory of the CPU, for the kernels on the emulator."""

from __future__ import annotations

import ctypes

import torch

from vllm_adrenaline.native.cuda_channel import ChannelEnd, ChannelKernels, ChannelState, ChannelWork, message_of

OPTIONS = ["-O1", "-shared", "-fPIC"]
EPOCH, ROOM = 9, 200  # rows of which four blocks are made
SENTINEL = 77


def stamp(epoch: int, step: int, layer: int) -> int:
    """Return a stamp as csrc/stamp.h makes it."""
    return epoch << 48 | step << 12 | layer + 1


class End:
    """One end: what it awaits and the rows it receives, in memory that processes may share, and what it knows."""

    def __init__(self, heads: list[int], timeout_s: float = 5.0) -> None:
        self.inbox = torch.zeros(8 + ROOM * sum(heads) * 4, dtype=torch.int64).share_memory_()
        self.state = torch.zeros(ctypes.sizeof(ChannelState) // 8, dtype=torch.int64)
        self.heads, self._budget_ns = heads, int(timeout_s * 1e9)

    def connect(self, other: End) -> None:
        self.other = other
        addresses = other.inbox.data_ptr(), self.inbox.data_ptr(), self.state.data_ptr()
        self.end = ChannelEnd(*addresses, EPOCH, self._budget_ns)

    def rows(self) -> list[torch.Tensor]:
        """Return what is in the inbox, int16 [ROOM, heads, 16] of each part."""
        sizes = [ROOM * heads * 4 for heads in self.heads]
        parts = self.inbox[8:].split(sizes)
        return [x.view(torch.int16).view(ROOM, heads, 16) for x, heads in zip(parts, self.heads, strict=True)]

    def health(self) -> tuple[int, int, int]:
        """Return status, step, and the stamp at which the end failed."""
        found = ChannelState.from_address(self.state.data_ptr())
        assert found.arrived == 0
        return found.status, found.step, found.failed_at

    def step_ns(self) -> tuple[int, int]:
        """Return the nanoseconds of the step between sends and waits, and in waits."""
        found = ChannelState.from_address(self.state.data_ptr())
        return found.local_ns, found.waited_ns


class Pair:
    """Both ends of a channel, and the kernels."""

    def __init__(self, kernels: ChannelKernels, timeout_s: float = 5.0) -> None:
        self.kernels = kernels
        self.decode, self.executor = End([4], timeout_s), End([4, 2, 2], timeout_s)
        self.decode.connect(self.executor)
        self.executor.connect(self.decode)

    def send(
        self, layer: int, tensors: list[torch.Tensor], tokens: torch.Tensor | None, rows: int, most: int = 4
    ) -> None:
        parts = [(x, inbox.data_ptr()) for x, inbox in zip(tensors, self.executor.rows(), strict=True)]
        self.kernels.send(message_of(self.decode.end, layer, parts, tokens, rows, ROOM), most, 0)

    def take(self, layer: int, out: torch.Tensor, tokens: torch.Tensor | None, rows: int) -> None:
        part = (out, self.decode.rows()[0].data_ptr())
        self.kernels.take(message_of(self.decode.end, layer, [part], tokens, rows, ROOM), 4, 0)

    def await_layer(self, end: End, layer: int, work: torch.Tensor | None = None) -> None:
        described = ChannelWork() if work is None else ChannelWork(work.data_ptr(), len(work))
        self.kernels.await_layer(end.end, layer, described, 0)

    def inboxes(self) -> list[torch.Tensor]:
        return [*self.executor.rows(), *self.decode.rows()]

    def begin(self) -> None:
        for end in (self.decode, self.executor):
            self.kernels.begin(end.end, 0)


def some(tokens: int, heads: int, gap: int = 0) -> torch.Tensor:
    """Return int16 [tokens, heads, 16] of all kinds of bits, with a stride that is larger by `gap` heads."""
    return torch.randint(-(1 << 15), 1 << 15, (tokens, heads + gap, 16), dtype=torch.int16)[:, :heads]
