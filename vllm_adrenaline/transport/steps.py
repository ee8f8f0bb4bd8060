"""The steps of a decode worker over all its channels, whatever their transport: a StepTransport.

Channels in shared memory cost what they cost alone. Those to other hosts are served around the same native calls: what
those have packed is sent, and what has come is put where they look for it.
"""

from __future__ import annotations

import time
from collections.abc import Mapping

import torch

from vllm_adrenaline.native.library import library
from vllm_adrenaline.transport import shm
from vllm_adrenaline.transport.collective import CollectiveDecodeChannel
from vllm_adrenaline.transport.shape import Shape
from vllm_adrenaline.transport.shm import ShmDecodeChannel

GRACE_S = 0.3
"""What is left of the budget of others when executors were lost in a step, as in csrc/shm/decode_end.h."""


class Steps:
    """The steps of a decode worker.

    Attributes:
        send, receive: those of the step that was begun last (transport/channel.py).
    """

    def __init__(self, shape: Shape) -> None:
        self._near = shm.ShmSteps(shape)
        self._far: list[CollectiveDecodeChannel] = []
        self.send, self.receive = self._near.send, self._near.receive
        self._waited_s: list[float] = []  # in this step, for each of those on other hosts
        self._hard_s = self._lost_s = 0.0
        self._sending_ns = self._waiting_ns = 0

    def begin(
        self,
        split: library.Split,
        channels: Mapping[int, ShmDecodeChannel | CollectiveDecodeChannel | None],
        budget_s: tuple[float, float],
    ) -> None:
        self._near.begin(split, channels, budget_s)
        self._far = [each for each in channels.values() if isinstance(each, CollectiveDecodeChannel)]
        if not self._far:
            # As they are, so that a layer costs no Python frame.
            self.send, self.receive = self._near.send, self._near.receive
            return
        self.send, self.receive = self._send, self._receive
        self._waited_s, self._hard_s, self._lost_s = [0.0] * len(self._far), budget_s[1], 0.0
        for channel in self._far:
            channel.begin()

    def _send(self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> None:
        self._near.send(layer, query, key, value)
        began = time.monotonic_ns()
        for channel in self._far:
            channel.send()
        self._sending_ns += time.monotonic_ns() - began

    def _receive(self, layer: int, output: torch.Tensor) -> int:
        began = time.monotonic()
        for index, channel in enumerate(self._far):
            if channel.is_failed:
                continue
            before = time.monotonic()
            budget = max(self._hard_s - self._lost_s, min(self._hard_s, GRACE_S))
            channel.receive(began + budget - self._waited_s[index])
            waited = time.monotonic() - before
            self._waited_s[index] += waited
            self._lost_s += waited if channel.is_failed else 0.0
        self._waiting_ns += int(1e9 * (time.monotonic() - began))
        return self._near.receive(layer, output)

    def end(self) -> int:
        return 0

    @property
    def times_ns(self) -> tuple[int, int]:
        """As in StepTransport. To send to other hosts and to wait for them is no local attention."""
        local, waiting = self._near.times_ns
        ours = self._sending_ns + self._waiting_ns
        return local - ours, waiting + ours
