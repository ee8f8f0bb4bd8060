"""An executor in a process of its own, which does what a test tells it, and what both ends of a test compute."""

from __future__ import annotations

import io
import multiprocessing
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from vllm_adrenaline.native import cuda
from vllm_adrenaline.native.cuda_channel import ChannelKernels
from vllm_adrenaline.system import device_memory
from vllm_adrenaline.system.device_memory import DeviceMemory, Handle
from vllm_adrenaline.transport.cuda_ipc import CudaExecutorChannel, Health
from vllm_adrenaline.transport.shape import Shape


def mixed(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """Return, or write, an output [T, Hq, D] in which each bit of q, k and v counts: their exclusive or."""
    tokens, kv_heads, head = k.shape
    grouped = q.view(torch.int16).view(tokens, kv_heads, -1, head)
    each = grouped ^ k.view(torch.int16)[:, :, None]
    if out is None:
        out = torch.empty_like(q)
    torch.bitwise_xor(each, v.view(torch.int16)[:, :, None], out=out.view(torch.int16).view(grouped.shape))
    return out


def repeat(work: Callable[[], None], times: int, captured: bool) -> None:
    """Launch `work` some times, or capture it once and replay it."""
    if not captured:
        for _ in range(times):
            work()
        return
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    for _ in range(times):
        graph.replay()
    torch.cuda.synchronize()


def packed(tensors: dict[str, torch.Tensor]) -> bytes:
    """Return tensors as bytes."""
    file = io.BytesIO()
    torch.save({name: x.cpu() for name, x in tensors.items()}, file)
    return file.getvalue()


class Executor:
    """The executor's end of a channel."""

    def __init__(self, library: Path) -> None:
        self._library = library
        self._kernels = ChannelKernels(library)

    def attach(self, shape: Shape, epoch: int, theirs: DeviceMemory, timeout_s: float) -> DeviceMemory:
        """Make a channel to a decode worker's inbox. Return ours."""
        self.channel = CudaExecutorChannel(self._kernels, shape, epoch, theirs, timeout_s)
        tensors = self.channel.tensors
        mixed(*(tensors[name] for name in "qkv"))  # CUDA loads these kernels now, and not beside one that waits
        torch.cuda.synchronize()
        return self.channel.inbox.memory

    def attach_by_handle(self, shape: Shape, epoch: int, theirs: Handle, timeout_s: float) -> Handle:
        """The same, for a decode worker in another process."""
        return device_memory.export(self.attach(shape, epoch, device_memory.open_handle(theirs), timeout_s))

    def detach(self) -> None:
        """Close the decode worker's inbox, then free ours, which it has closed."""
        self.channel.disconnect()
        del self.channel

    def step(self, layers: int) -> None:
        """Launch a step whose layers are mixed."""
        self.channel.begin()
        for layer in range(layers):
            self.channel.await_layer(layer)
            mixed(**self.channel.tensors)
            self.channel.publish(layer)

    def answer(self, steps: int, layers: int, captured: bool) -> Health:
        """Serve steps that are mixed."""
        repeat(lambda: self.step(layers), steps, captured)
        return self.channel.health()

    def attend(self, cache: Handle, sizes: tuple[int, ...], step: bytes, scale: float, captured: bool) -> Health:
        """Serve one step of one layer over an exported KV cache: keys and values [2, blocks, block size, Hk, D]."""
        library = cuda.CudaLibrary(self._library)
        whole = device_memory.open_handle(cache).tensor().view(torch.bfloat16)
        keys, values = whole[: torch.Size(sizes).numel()].view(sizes).unbind()
        plan = {name: x.cuda() for name, x in torch.load(io.BytesIO(step)).items()}
        tensors = plan | {name: x[: len(plan["slot_mapping"])] for name, x in self.channel.tensors.items()}
        kind = cuda.kind_of(tensors["q"], keys)
        resources = library.prepare(kind)
        blocks = library.blocks(resources, 1.0)
        work = library.workspace(kind, blocks, len(plan["seq_lens"]), "cuda")
        call = cuda.call_of(tensors, cuda.Layer(keys, values, scale), work, resources.stages)

        def launch() -> None:
            stream = torch.cuda.current_stream().cuda_stream
            library.plan(call, stream)
            self.channel.begin()
            self.channel.await_layer(0, work.first_tile)
            library.attend(call, kind, blocks, stream)
            self.channel.publish(0)

        repeat(launch, 1, captured)
        return self.channel.health()

    def announce_as(self, epoch: int) -> None:
        """Announce a layer in another life's name."""
        self.channel._end.epoch = epoch
        self.channel.begin()
        self.channel.publish(0)
        torch.cuda.synchronize()

    def announce_layer(self, layer: int) -> None:
        """Announce a layer of the first step that nobody asked for."""
        self.channel.begin()
        self.channel.publish(layer)
        torch.cuda.synchronize()

    def close(self) -> None:
        """Say that nothing comes any more."""
        self.channel.close()
        torch.cuda.synchronize()


def serve(pipe: Connection, library: Path) -> None:
    """Do what comes through the pipe, until it is closed."""
    executor = Executor(library)
    pipe.send((0, True, None))
    while True:
        try:
            number, name, arguments = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send((number, True, getattr(executor, name)(*arguments)))
        except Exception:
            pipe.send((number, False, traceback.format_exc()))


class Peer:
    """The other process, as the test sees it."""

    def __init__(self, library: Path) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(theirs, library), daemon=True)
        self.process.start()
        theirs.close()
        self._number = 0
        self.answer()

    def tell(self, name: str, *arguments: Any) -> None:
        """Have it do something. `answer` must be called before the next."""
        self._number += 1
        self._pipe.send((self._number, name, arguments))

    def answer(self) -> Any:
        """Return what came of it. Answers to a test that failed before are passed over."""
        number = -1
        while number < self._number:
            assert self._pipe.poll(60), "the other process does not answer"
            number, is_right, result = self._pipe.recv()
        assert is_right, result
        return result

    def ask(self, name: str, *arguments: Any) -> Any:
        """Have it do something, and wait for that."""
        self.tell(name, *arguments)
        return self.answer()

    def end(self) -> None:
        """End it."""
        self._pipe.close()
        self.process.join(10)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()
