"""A step of one row through the channel to an executor, to find out whether it answers as a step needs it to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from vllm_adrenaline.kv import space
from vllm_adrenaline.transport.channel import StepTransport
from vllm_adrenaline.transport.collective import CollectiveDecodeChannel
from vllm_adrenaline.transport.gpu import GpuDecodeChannel, GpuSteps
from vllm_adrenaline.transport.shape import Shape
from vllm_adrenaline.transport.shm import ShmDecodeChannel
from vllm_adrenaline.transport.split import split_rows
from vllm_adrenaline.transport.steps import Steps


def answers(
    channel: ShmDecodeChannel | CollectiveDecodeChannel,
    shape: Shape,
    layers: Sequence[str],
    budget_s: tuple[float, float],
) -> bool:
    """Send one step of one row, and return whether the executor served it.

    The row has one token, in block 0. It is read, and what comes back is thrown away. It has no slot: nothing is
    written into a block.

    Args:
        channel: attached, and used by nobody else meanwhile.
        shape: of the channel.
        layers: of the model.
        budget_s: as in StepTransport.begin.
    """
    one = torch.ones(1, dtype=torch.int32)
    table = torch.full((1, shape.max_blocks), space.remote_id(0, 0), dtype=torch.int32)
    starts, slots = torch.tensor([0, 1], dtype=torch.int32), torch.zeros(1, dtype=torch.int64)
    split = split_rows(table, starts, one, slots, received_rows=[0], block_size=1)
    device = "cuda" if isinstance(channel, GpuDecodeChannel) else "cpu"
    query = torch.zeros(1, shape.num_heads, shape.head_size, dtype=shape.dtype, device=device)
    key = torch.zeros(1, shape.num_kv_heads, shape.head_size, dtype=shape.dtype, device=device)
    steps: StepTransport[Any] = GpuSteps(shape, len(layers)) if device == "cuda" else Steps(shape)
    steps.begin(split.handle, {0: channel}, budget_s)
    for layer in range(len(layers)):
        steps.send(layer, query, key, key)
        if steps.receive(layer, query):
            return False
    return not steps.end()
