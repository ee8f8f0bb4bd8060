"""A decode worker's link to an executor on a GPU, as far as that shows without one: CUDA's part is played here."""

from __future__ import annotations

import contextlib
import threading
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.unit.test_control import IDENTITY
from tests.unit.test_link import SHAPE
from vllm_adrenaline.decode import link
from vllm_adrenaline.decode.link import Link
from vllm_adrenaline.placement import breaker
from vllm_adrenaline.transport import gpu
from vllm_adrenaline.transport.cuda_ipc import Inbox, answered_sizes
from vllm_adrenaline.transport.gpu import GpuDecodeChannel, GpuSteps, Tokens

DEVICE = 3


class Cuda:
    """What is asked of torch.cuda, in order."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.asked: list[Any] = []
        stream = SimpleNamespace(synchronize=lambda: self.asked.append("synchronize"))
        fakes = {
            "current_device": lambda: DEVICE,
            "device": lambda _: contextlib.nullcontext(),
            "current_stream": lambda: stream,
            "Stream": lambda: "a new stream",
            "set_device": self.asked.append,
            "set_stream": self.asked.append,
        }
        for name, fake in fakes.items():
            patch.setattr(torch.cuda, name, fake)


class Layers:
    """The end through which layers go."""

    def __init__(self, asked: list[Any]) -> None:
        self._asked = asked

    def connect(self, memory: Any, timeout_s: float) -> None:
        pass

    def close(self) -> None:
        self._asked.append("close")


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Cuda:
    made = Cuda(monkeypatch)
    monkeypatch.setattr(gpu, "CudaDecodeChannel", lambda *_: Layers(made.asked))
    monkeypatch.setattr(gpu.device_memory, "open_handle", lambda _: None)
    return made


def test_a_channel_that_was_never_connected_is_left_without_a_launch(cuda: Cuda) -> None:
    channel = GpuDecodeChannel(SHAPE, None)  # type: ignore[arg-type]
    channel.leave()
    assert cuda.asked == []
    channel.connect(None)  # type: ignore[arg-type]
    channel.leave()
    assert cuda.asked == ["close", "synchronize"], "another thread, on another stream, closes the memory after that"


def test_an_executor_is_attached_anew_on_the_workers_gpu_and_off_the_stream_of_its_steps(
    cuda: Cuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(link, "RETRY_S", 0.01)
    monkeypatch.setattr(breaker, "MIN_PAUSE_S", 0.01)
    kernels: Any = SimpleNamespace()
    lost, attached = Link("p", IDENTITY, "d", 0, ["a"], SHAPE, 1.0, kernels=kernels), threading.Event()
    monkeypatch.setattr(lost, "attach", attached.set)
    lost.fail()
    assert attached.wait(5)
    assert cuda.asked == [DEVICE, "a new stream"]


def test_rows_of_an_executor_that_is_not_there_become_zero_without_a_look_at_the_device() -> None:
    tokens: Any = object.__new__(Tokens)  # on `meta` there are no values: whoever reads one raises
    tokens._here, tokens._turn = torch.empty(8, dtype=torch.int64, device="meta"), 0
    tokens._pinned = [torch.empty(8, dtype=torch.int64) for _ in range(2)]
    tokens._copied = [SimpleNamespace(synchronize=lambda: None, record=lambda: None) for _ in range(2)]
    tokens.set([1, 4, 5])
    assert (len(tokens.view), len(tokens.real)) == (4, 3), "padding is no row of the batch"
    steps = GpuSteps(SHAPE, 1)
    steps._absent = {0: tokens}
    assert steps.receive(0, torch.empty(6, 2, 32, device="meta")) == 0


@pytest.mark.parametrize(("offset", "size", "reason"), [(8, 1 << 20, "on a page"), (0, 1 << 12, "too few")])
def test_memory_that_is_no_inbox_is_refused_before_a_kernel_stores_there(offset: int, size: int, reason: str) -> None:
    memory: Any = SimpleNamespace(address=(1 << 30) + offset, size=size)
    with pytest.raises(ValueError, match=reason):
        Inbox(memory, answered_sizes(SHAPE), SHAPE.dtype)
