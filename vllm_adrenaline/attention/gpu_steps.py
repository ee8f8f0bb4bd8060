"""The steps of one decode worker, attended on a GPU: a CUDA graph of all layers for each size of a plan.

The host checks a plan, has it copied to the GPU, and replays a graph. In that, kernels wait for each layer, attend it,
and announce it. Sizes are few, for plans are padded (csrc/shm/layout.h, bucket).
"""

from __future__ import annotations

import threading

import torch

from vllm_adrenaline.attention.gpu import GpuAttention
from vllm_adrenaline.native.cuda_channel import ChannelStatus
from vllm_adrenaline.system.arithmetic import bucket
from vllm_adrenaline.transport.gpu import GpuExecutorChannel
from vllm_adrenaline.transport.pair import Disconnected
from vllm_adrenaline.transport.shape import Shape
from vllm_adrenaline.transport.shm import StepTensors, plan_sizes

_CAPTURING = threading.Lock()
"""torch allows one capture at a time in a process, and decode workers are attached by a thread each."""


def _event() -> torch.cuda.Event:
    """Return an event that knows its time. A thread that waits for it sleeps: others want its core."""
    return torch.cuda.Event(enable_timing=True, blocking=True)  # type: ignore[no-untyped-call]


class GpuStepServer:
    """Serves the steps of one channel, on a stream of its own. For the thread that makes it."""

    def __init__(self, attention: GpuAttention, channel: GpuExecutorChannel, shape: Shape) -> None:
        """`shape`: of the channel. The stream becomes the current one of this thread."""
        torch.cuda.set_device(attention.layers[0].keys.device)
        # Prompts that are computed beside it can wait.
        torch.cuda.set_stream(torch.cuda.Stream(priority=-1))  # type: ignore[no-untyped-call]
        self._attention, self._channel = attention, channel
        sizes = plan_sizes(shape)
        self._plan = {name: torch.zeros(size, dtype=dtype, device="cuda") for name, (size, dtype) in sizes.items()}
        self._tensors = StepTensors(self._plan | channel.layers.tensors)
        self._work = attention.workspace(shape.max_rows)
        self._windows = [layer.window for layer in attention.layers]
        self._graphs: dict[tuple[int, int], torch.cuda.CUDAGraph] = {}
        self._began, self._ended = (_event() for _ in range(2))
        torch.cuda.current_stream().synchronize()
        # Steps of one token a row come in these sizes. To capture them now costs no step anything.
        most = min(shape.max_rows, shape.max_tokens)
        for size in sorted({bucket(rows, most) for rows in range(1, most + 1)}):
            self._graph(size, size)

    def serve(self, number: int, step: dict[str, torch.Tensor]) -> None:
        """Attend a step whose plan was checked.

        Args:
            number: of the step.
            step: query_start_loc, seq_lens, block_table and slot_mapping, on the host.

        Raises:
            Disconnected: the decode worker did not send all layers, or has left the step.
        """
        rows, tokens = len(step["seq_lens"]), len(step["slot_mapping"])
        view = self._tensors.view(rows, tokens)
        for name in self._plan:
            view[name].copy_(step[name], non_blocking=True)
        graph = self._graph(rows, tokens)
        self._began.record()
        graph.replay()
        self._ended.record()
        self._ended.synchronize()
        layers = self._channel.layers
        if layers.seen.status is not ChannelStatus.READY:
            raise Disconnected(f"a layer of step {number} did not come ({layers.seen.status.name.lower()})")
        took_ns = int(1e6 * self._began.elapsed_time(self._ended))
        self._channel.plans.count_step(max(0, took_ns - layers.step_ns[1]))

    def close(self) -> None:
        """Let go of the decode worker's memory, once what was launched is done."""
        torch.cuda.current_stream().synchronize()
        self._graphs.clear()
        del self._tensors

    def _graph(self, rows: int, tokens: int) -> torch.cuda.CUDAGraph:
        """Return the graph of a step of this size, with padding."""
        if (rows, tokens) not in self._graphs:
            self._graphs[rows, tokens] = self._capture(self._tensors.view(rows, tokens))
        return self._graphs[rows, tokens]

    def _capture(self, view: dict[str, torch.Tensor]) -> torch.cuda.CUDAGraph:
        layers, attention, work = self._channel.layers, self._attention, self._work
        calls = attention.calls(view, work)
        first_tile = work.first_tile[: len(view["seq_lens"]) + 1]
        stream = torch.cuda.current_stream().cuda_stream
        graph = torch.cuda.CUDAGraph()
        with _CAPTURING:
            # Not torch.cuda.graph(): that waits for the whole device, and so for decode workers that others serve.
            graph.capture_begin(capture_error_mode="thread_local")
            try:
                layers.begin()
                window = -1
                for index, call in enumerate(calls):
                    if self._windows[index] != window:  # the division of the work depends on it
                        window = self._windows[index]
                        attention.plan(call, stream)
                    layers.await_layer(index, first_tile)
                    attention.attend(call, stream)
                    layers.publish(index)
                layers.look()
            finally:
                graph.capture_end()
        return graph
