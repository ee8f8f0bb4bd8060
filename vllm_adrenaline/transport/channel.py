"""What a transport of the data plane does for the decode worker. Shared memory implements it; CUDA IPC and NCCL will.

Per step: one `begin` with the plans of all executors; per layer: one `send` and one `receive`, whatever the number of
executors. None raises because of a peer: a late or dead one is a returned bit.
"""

from collections.abc import Mapping
from typing import Any, Protocol, TypeVar

import torch


class DecodeChannel(Protocol):
    """The decode worker's end of the channel to one executor."""

    @property
    def counters(self) -> tuple[int, int, int]:
        """Rows x layers, layers, and nanoseconds spent on them, that the executor says it attended."""

    @property
    def is_closed(self) -> bool:
        """Whether the executor has closed the channel: it serves it no more, and writes nothing for it."""

    def close(self) -> None:
        """Let go of the memory; never fails."""


Channel = TypeVar("Channel", bound=DecodeChannel, contravariant=True)


class StepTransport(Protocol[Channel]):
    """All channels of a decode worker, as its steps use them."""

    def begin(self, split: Any, channels: Mapping[int, Channel | None]) -> None:
        """Start a step: publish each executor's part of the split batch (SplitRows.handle) and wake it. `channels`: of
        all executors in the split; the rows of one that is None become zero."""

    def send(self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> None:
        """Pack the plans' rows of query [T, Hq, D], key and value [T, Hk, D] for all executors; wait for none."""

    def receive(self, layer: int, output: torch.Tensor) -> int:
        """Put the layer's attention output into the plans' rows of output [T, Hq, D]; return who failed, as bits."""

    @property
    def times_ns(self) -> tuple[int, int]:
        """Nanoseconds of local attention (between send and receive), and of waiting after it, since the start."""
