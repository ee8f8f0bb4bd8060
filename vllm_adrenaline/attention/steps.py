"""Serving the steps of one decode worker: what the thread of a channel does with each plan. On GPUs: gpu_steps.py."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Protocol

import torch

from vllm_adrenaline.transport.channel import LayerChannel

if TYPE_CHECKING:
    from vllm_adrenaline.attention.kernels import CpuAttention

logger = logging.getLogger("vllm.adrenaline")


class StepServer(Protocol):
    """Serves the steps of one channel, in the thread that made it."""

    def serve(self, number: int, step: dict[str, torch.Tensor]) -> None:
        """Attend step `number`, whose plan was checked. Raises Disconnected if the decode worker has left it."""

    def close(self) -> None:
        """Let go of what the channel's memory is used for."""


class CpuStepServer:
    """Attends one layer after the other, as they come."""

    def __init__(self, attention: CpuAttention, channel: LayerChannel) -> None:
        self._attention, self._channel = attention, channel

    def serve(self, number: int, step: dict[str, torch.Tensor]) -> None:
        next_layer, attention = self._channel.next_layer, self._attention
        schedule = attention.schedule(step["query_start_loc"], step["seq_lens"])
        last = -1
        while (layer := next_layer()) is not None:
            attention.layer(layer, step, schedule)
            last = layer
        if last + 1 < attention.num_layers:
            logger.warning("the decode worker left step %d before layer %d: step dropped", number, last + 1)

    def close(self) -> None:
        """Nothing: tensors over the channel's memory end with this."""
