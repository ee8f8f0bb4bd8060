"""Timing work on a GPU: by events, and captured in a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable

import torch


def captured(work: Callable[[], object]) -> torch.cuda.CUDAGraph:
    """Return a graph of `work`."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    torch.cuda.synchronize()
    return graph


def times(work: Callable[[], object], repeats: int) -> list[float]:
    """Return how long `work` takes each time, in seconds."""
    found = []
    for _ in range(repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        work()
        end.record()
        end.synchronize()
        found.append(begin.elapsed_time(end) / 1e3)
    return found
