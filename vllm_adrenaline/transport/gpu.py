"""The channel of a decode worker and an executor on GPUs of one host: plans in shared memory, layers in the GPUs' own.

A plan goes from host to host as it does on CPU (shm.py), for the executor has to check it. q, k, v and outputs go from
GPU memory to GPU memory (cuda_ipc.py): the decode worker only launches, and learns at the end of a step what failed.
"""

from __future__ import annotations

import time
from collections.abc import Mapping

import torch

from vllm_adrenaline.native.cuda_channel import ChannelKernels, ChannelStatus
from vllm_adrenaline.native.library import library
from vllm_adrenaline.system import device_memory
from vllm_adrenaline.system.arithmetic import bucket
from vllm_adrenaline.system.device_handle import Handle
from vllm_adrenaline.transport.cuda_ipc import CudaDecodeChannel, CudaExecutorChannel
from vllm_adrenaline.transport.shape import Shape
from vllm_adrenaline.transport.shm import ShmDecodeChannel, ShmExecutorChannel, ShmSteps

POLL_S = 20e-6
"""How often is looked whether an executor has taken the plan before."""


def current_device() -> int:
    """Return the number of the GPU that this thread uses."""
    return torch.cuda.current_device()


def use_apart(device: int) -> None:
    """Have this thread use a GPU, by a stream of its own: what it waits for there holds no step up.

    A thread begins with the first GPU, which may be another worker's, and with the stream that steps may be on.
    """
    torch.cuda.set_device(device)
    torch.cuda.set_stream(torch.cuda.Stream())  # type: ignore[no-untyped-call]


class GpuDecodeChannel(ShmDecodeChannel):
    """The decode worker's end of a channel, on the current GPU.

    Attributes:
        layers: the end through which layers go.
    """

    def __init__(self, shape: Shape, kernels: ChannelKernels) -> None:
        """Make the memory of both ways. Raises AdrenalineError if there is none."""
        super().__init__(shape)
        try:
            self.layers = CudaDecodeChannel(kernels, shape, self.epoch)
        except BaseException:
            super().close()
            raise
        self._device, self._is_connected = torch.cuda.current_device(), False

    @property
    def inbox(self) -> Handle:
        """Where the executor is to store outputs."""
        return device_memory.export(self.layers.inbox.memory)

    def connect(self, theirs: Handle) -> None:
        """Take the executor's inbox. Raises AdrenalineError if it cannot be opened, ValueError if it is too small."""
        self.layers.connect(device_memory.open_handle(theirs), 0)
        self._is_connected = True

    def takes_plan(self, deadline: float) -> bool:
        """Wait until `deadline` (seconds, monotonic) for the executor to take the plan before; say whether it has."""
        while not self.end.is_taken():
            if self.is_closed or time.monotonic() > deadline:
                return False
            time.sleep(POLL_S)
        return True

    def leave(self) -> None:
        super().leave()
        if not self._is_connected:  # there is nowhere to say it, and nobody who waits for it
            return
        with torch.cuda.device(self._device):
            self.layers.close()  # a wait that the executor is in ends
            # What was launched stores into memory that another thread, on another stream, may close next.
            torch.cuda.current_stream().synchronize()

    def close(self) -> None:
        with torch.cuda.device(self._device):
            self.layers.disconnect()
        super().close()


class GpuExecutorChannel:
    """The executor's end of a channel: an ExecutorChannel. Kernels wait for its layers (attention/gpu_steps.py).

    Attributes:
        plans, layers: the ends through which plans and layers go.
        next_step: as of ShmExecutorChannel.
        inbox: where the decode worker is to store q, k and v.
    """

    def __init__(
        self,
        fd: int,
        shape: Shape,
        epoch: int,
        theirs: Handle,
        num_layers: int,
        timeout_s: float,
        kernels: ChannelKernels,
    ) -> None:
        """Take the memory of both ways; arguments as of ShmExecutorChannel, and the decode worker's inbox.

        Raises:
            AdrenalineError: some memory cannot be had, or is not what it should be.
            RuntimeError: it is no channel of this version.
            ValueError: the decode worker's inbox is too small.
        """
        self.plans = ShmExecutorChannel(fd, shape, epoch, True, num_layers, timeout_s, pinned=True)
        self.layers = CudaExecutorChannel(kernels, shape, epoch, device_memory.open_handle(theirs), timeout_s)
        self.next_step = self.plans.next_step
        self.inbox = device_memory.export(self.layers.inbox.memory)
        self._aside = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        self._device = torch.cuda.current_device()

    def stop(self) -> None:
        """End the waits of this end, from any thread."""
        self.plans.stop()
        with torch.cuda.device(self._device):
            self.layers.interrupt(self._aside)

    def close(self) -> None:
        """Serve the decode worker no more, once what was launched on the current stream is done."""
        self.layers.disconnect()
        self.plans.close()


class Tokens:
    """The positions of an executor's tokens in the batch, where kernels read them.

    Attributes:
        padded: how many there are in this step, with padding, which is -1.
        view: those, int64 [padded].
        real: those without padding.
    """

    def __init__(self, most: int) -> None:
        self._here = torch.empty(most, dtype=torch.int64, device="cuda")
        # Two, for the copy of the step before may not be done when the next one is written.
        self._pinned = [torch.empty(most, dtype=torch.int64, pin_memory=True) for _ in range(2)]
        self._copied = [torch.cuda.Event() for _ in range(2)]  # type: ignore[no-untyped-call]
        self._turn, self.padded = 0, 0
        self.view = self.real = self._here[:0]

    def set(self, tokens: list[int]) -> None:
        """Have these from now on, on the current stream."""
        self._turn = 1 - self._turn
        pinned, copied = self._pinned[self._turn], self._copied[self._turn]
        copied.synchronize()
        self.padded = bucket(len(tokens), len(pinned))
        pinned[: len(tokens)] = torch.tensor(tokens)
        pinned[len(tokens) : self.padded] = -1
        self.view, self.real = self._here[: self.padded], self._here[: len(tokens)]
        self.view.copy_(pinned[: self.padded], non_blocking=True)
        copied.record()


class GpuSteps:
    """The steps of a decode worker over channels through GPU memory: a StepTransport.

    Whether an executor failed is known when the step is over: its rows are zero then, from some layer on.
    """

    def __init__(self, shape: Shape, num_layers: int) -> None:
        """`num_layers`: of the model."""
        self._shape, self._last = shape, num_layers - 1
        self._plans = ShmSteps(shape)
        self._tokens: dict[int, Tokens] = {}  # by executor
        self._channels: dict[int, GpuDecodeChannel] = {}  # of this step
        self._absent: dict[int, Tokens] = {}  # of this step: executors that are not there
        self._failed = 0
        self._times_ns = [0, 0]
        self._is_over = True

    def begin(
        self, split: library.Split, channels: Mapping[int, GpuDecodeChannel | None], budget_s: tuple[float, float]
    ) -> None:
        self._failed, self._is_over = 0, False
        deadline = time.monotonic() + budget_s[1]
        self._channels, self._absent = {}, {}
        usable: dict[int, GpuDecodeChannel | None] = {}
        for executor, channel in channels.items():
            tokens = self._tokens.get(executor) or self._tokens.setdefault(executor, Tokens(self._shape.max_tokens))
            tokens.set(split.tokens(executor))
            if channel is not None and channel.takes_plan(deadline):
                usable[executor] = self._channels[executor] = channel
            else:
                usable[executor], self._absent[executor] = None, tokens
                self._failed |= 0 if channel is None else 1 << executor
        self._plans.begin(split, usable, budget_s)
        for channel in self._channels.values():
            channel.layers.begin(budget_s[1])

    def send(self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> None:
        for executor, channel in self._channels.items():
            tokens = self._tokens[executor]
            channel.layers.send(layer, query, key, value, tokens.view, tokens.padded)

    def receive(self, layer: int, output: torch.Tensor) -> int:
        for executor, channel in self._channels.items():
            tokens = self._tokens[executor]
            channel.layers.receive(layer, output, tokens.view, tokens.padded)
            if layer == self._last:
                channel.layers.look()
        for tokens in self._absent.values():
            output.index_fill_(0, tokens.real, 0)
        return 0

    def end(self) -> int:
        if self._is_over:
            return 0
        self._is_over = True
        torch.cuda.current_stream().synchronize()
        slowest = (0, 0)
        for executor, channel in self._channels.items():
            slowest = max(slowest, channel.layers.step_ns[::-1])
            if channel.layers.seen.status is not ChannelStatus.READY:
                self._failed |= 1 << executor
        self._times_ns[0] += slowest[1]
        self._times_ns[1] += slowest[0]
        return self._failed

    @property
    def times_ns(self) -> tuple[int, int]:
        """As in StepTransport, of each step by the executor that was waited for longest."""
        return self._times_ns[0], self._times_ns[1]
