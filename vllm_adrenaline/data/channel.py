"""What a transport of the data plane does. Shared memory implements it; CUDA IPC and NCCL will.

A channel joins one decode worker and one attention executor. Per step: one `begin` with the plan; per layer: one `send`
and one `receive`. Neither raises because of its peer: a late or dead peer is a returned False.
"""

from typing import Protocol

import torch

from vllm_adrenaline.data.plan import RowsPlan


class DecodeChannel(Protocol):
    """The decode worker's end."""

    def begin(self, plan: RowsPlan) -> None:
        """Start a step: publish the plan and wake the executor."""

    def send(self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> None:
        """Pack the plan's rows of query [T, Hq, D], key and value [T, Hk, D] for the executor."""

    def receive(self, layer: int, output: torch.Tensor) -> bool:
        """Wait for the layer's attention output and put it into the plan's rows of output [T, Hq, D]."""

    @property
    def counters(self) -> tuple[int, int]:
        """Rows x layers, and layers, that the executor says it attended since the channel was made."""

    def close(self) -> None:
        """Let go of the memory; never fails."""
