"""The interfaces of the data plane: the two ends of a channel, and all channels of a decode worker in a step.

A channel is in shared memory (shm.py), or goes to another host (collective.py). A step may have both (steps.py).
Between GPUs it goes through their memory (gpu.py).

A step has one `begin`, with the plans of all executors. A layer has one `send` and one `receive`, however many
executors there are. None of them raises because of an executor: one that is late or has ended is a bit of the result.
"""

from collections.abc import Callable, Mapping
from typing import Any, Protocol, TypeVar

import torch


class DecodeChannel(Protocol):
    """The decode worker's end of the channel to one executor."""

    @property
    def counters(self) -> tuple[int, int, int]:
        """What the executor says that it attended: rows x layers, layers, and nanoseconds spent on them."""

    @property
    def is_closed(self) -> bool:
        """Whether the executor has closed the channel: it serves the channel no more, and writes nothing for it."""

    def leave(self) -> None:
        """Ask nothing any more, so that the executor closes the channel. What it does at present, it may still do."""

    def close(self) -> None:
        """Let go of the memory. Never fails; may be called twice."""


class ExecutorChannel(Protocol):
    """The executor's end of the channel to one decode worker."""

    def next_step(self) -> tuple[int, int, dict[str, torch.Tensor]] | None:
        """Sleep until a step's plan comes; return its number, rows and tensors. None: the channel has ended."""

    def stop(self) -> None:
        """End the waits of this end, from any thread."""

    def close(self) -> None:
        """Serve the decode worker no more. Only the thread that serves it may say so."""


class LayerChannel(ExecutorChannel, Protocol):
    """One whose layers the executor's host waits for. On a GPU kernels do (gpu.py)."""

    @property
    def next_layer(self) -> Callable[[], int | None]:
        """Gives back the output of the layer before, waits for the next, and returns its number. None: no more."""


Channel = TypeVar("Channel", bound=DecodeChannel, contravariant=True)


class StepTransport(Protocol[Channel]):
    """All channels of a decode worker, as one step after the other uses them."""

    def begin(self, split: Any, channels: Mapping[int, Channel | None], budget_s: tuple[float, float]) -> None:
        """Begin a step: publish each executor's part of the batch, and wake the executor.

        Args:
            split: the split batch, SplitRows.handle.
            channels: by executor, for all executors of the split. None for one that is not there: its rows become zero.
            budget_s: how long each executor is waited for in all layers of the step together, in seconds: until one
                on this host is given up that does not work, and until any is.
        """

    def send(self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> None:
        """Send the offloaded rows of query [T, Hq, D], key and value [T, Hk, D] to their executors. Waits for none."""

    def receive(self, layer: int, output: torch.Tensor) -> int:
        """Wait for the layer's attention output and write it into the offloaded rows of `output` [T, Hq, D].

        Returns:
            The executors that failed in this layer, as bits. Their rows are zero, in this layer and the rest of the
            step.
        """

    def end(self) -> int:
        """End the step, once all that was launched for it is done; return the executors of which `receive` did not know
        yet that they had failed, as bits. May be called again: then there are none."""

    @property
    def times_ns(self) -> tuple[int, int]:
        """Nanoseconds since the start: between send and receive (local attention), and of waiting in receive."""
