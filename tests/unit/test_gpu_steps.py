"""How an executor on a GPU captures a step, as far as that shows without one: CUDA's part is played here."""

from __future__ import annotations

import threading
import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from vllm_adrenaline.attention.gpu_steps import GpuStepServer


class Graph:
    """A graph that takes a while to capture."""

    under_way = most = 0

    def capture_begin(self, capture_error_mode: str) -> None:
        Graph.under_way += 1
        Graph.most = max(Graph.most, Graph.under_way)
        time.sleep(0.05)

    def capture_end(self) -> None:
        Graph.under_way -= 1


def test_decode_workers_that_attach_at_once_have_their_graphs_captured_one_after_the_other(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def server() -> GpuStepServer:
        made: Any = object.__new__(GpuStepServer)
        made._channel = SimpleNamespace(layers=SimpleNamespace(begin=lambda: None, look=lambda: None))
        made._attention = SimpleNamespace(calls=lambda *_: [])
        made._work = SimpleNamespace(first_tile=torch.zeros(2))
        return made  # type: ignore[no-any-return]

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=0))
    step = {"seq_lens": torch.zeros(1)}
    threads = [threading.Thread(target=server()._capture, args=(step,)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (Graph.most, Graph.under_way) == (1, 0)
