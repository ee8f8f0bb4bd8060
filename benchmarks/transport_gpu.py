"""The CUDA IPC transport on a GPU: a layer's round trip, from the decode worker's q, k and v to its output.

    python tools/build_cuda.py library LIBRARY
    python benchmarks/transport_gpu.py LIBRARY [--mps] [--quick] [--json FILE]

Both ends replay CUDA graphs of all layers of a step. The executor answers at once, or attends first (the fused kernel,
on a share of the multiprocessors). The ends are two streams of one process, then two processes. Two processes share a
GPU by turns of some milliseconds unless MPS is on, and then the figure is that of the turns. --mps starts an MPS daemon
of its own, for both; it sets nothing on the GPU.
"""

from __future__ import annotations

import multiprocessing
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import gpu_timing
import mps
import report
import torch

from vllm_adrenaline.native import cuda
from vllm_adrenaline.native.cuda_channel import ChannelKernels
from vllm_adrenaline.system import device_memory
from vllm_adrenaline.system.device_memory import DeviceMemory
from vllm_adrenaline.transport.cuda_ipc import CudaDecodeChannel, CudaExecutorChannel
from vllm_adrenaline.transport.shape import Shape

LAYERS, FEW_LAYERS = 32, 8
"""Of a step; few where processes take turns."""
BLOCK, CONTEXT, CACHES = 16, 1024, 4
SHAPE = Shape(128, 128, CONTEXT // BLOCK, 32, 8, 128, torch.bfloat16)
ROWS, FEW_ROWS = (1, 4, 16, 64, 128), (1, 16, 128)
SHARE = 0.25
"""Of the multiprocessors, for which the grid of attention is sized."""
EPOCH, WAIT, WARM = 1, 20.0, 2
"""A channel's life; seconds that an end waits for the other at most; steps before the first that is timed."""


def times_of(graph: torch.cuda.CUDAGraph, layers: int, repeats: int) -> list[float]:
    """Return how long replays take, in microseconds a layer."""
    return [1e6 * each / layers for each in gpu_timing.times(graph.replay, repeats)]


class Attention:
    """A step of `rows` rows of CONTEXT tokens over caches of its own."""

    def __init__(self, library: cuda.CudaLibrary, rows: int, tensors: dict[str, torch.Tensor]) -> None:
        table = torch.randperm(rows * SHAPE.max_blocks, device="cuda").int().view(rows, -1)
        step = {name: x[:rows] for name, x in tensors.items()} | {
            "query_start_loc": torch.arange(rows + 1, device="cuda", dtype=torch.int32),
            "seq_lens": torch.full((rows,), CONTEXT, device="cuda", dtype=torch.int32),
            "block_table": table,
            "slot_mapping": table[:, -1].long() * BLOCK + BLOCK - 1,
        }
        sizes = (2, rows * SHAPE.max_blocks, BLOCK, SHAPE.num_kv_heads, SHAPE.head_size)
        caches = [torch.randn(sizes, device="cuda", dtype=SHAPE.dtype) for _ in range(CACHES)]
        self._library, self._kind = library, cuda.kind_of(step["q"], caches[0])
        resources = library.prepare(self._kind)
        self._blocks = library.blocks(resources, SHARE)
        self.work = library.workspace(self._kind, self._blocks, rows, "cuda")
        layers = [cuda.Layer(cache[0], cache[1], SHAPE.head_size**-0.5) for cache in caches]
        self._calls = [cuda.call_of(step, layer, self.work, resources.stages) for layer in layers]
        self._kept = step, caches

    def plan(self) -> None:
        self._library.plan(self._calls[0], torch.cuda.current_stream().cuda_stream)

    def layer(self, number: int) -> None:
        stream = torch.cuda.current_stream().cuda_stream
        self._library.attend(self._calls[number % CACHES], self._kind, self._blocks, stream)

    def alone(self) -> float:
        """Return microseconds of a layer that waits for nobody."""

        def step() -> None:
            self.plan()
            for number in range(LAYERS):
                self.layer(number)

        return report.median(times_of(gpu_timing.captured(step), LAYERS, WARM + 5)[WARM:])


@dataclass(frozen=True)
class Load:
    """What is measured: rows of a step, whether they are attended, layers and repeats."""

    rows: int
    attends: bool
    layers: int
    repeats: int


class Executor:
    """The executor's end, whose steps are a graph."""

    def __init__(self, path: Path, theirs: DeviceMemory, load: Load) -> None:
        self.channel = channel = CudaExecutorChannel(ChannelKernels(path), SHAPE, EPOCH, theirs, WAIT)
        for tensor in channel.inbox.rows.values():
            tensor.normal_()
        attention = Attention(cuda.CudaLibrary(path), load.rows, channel.tensors) if load.attends else None
        self.alone = attention.alone() if attention else 0.0

        def step() -> None:
            if attention:
                attention.plan()
            channel.begin()
            for layer in range(load.layers):
                channel.await_layer(layer, attention.work.first_tile if attention else None)
                if attention:
                    attention.layer(layer)
                channel.publish(layer)

        self.graph = gpu_timing.captured(step)
        self._kept = attention


class Decode:
    """The decode worker's end, whose steps are a graph. Its batch has twice as many rows as are sent."""

    def __init__(self, path: Path) -> None:
        self.channel = CudaDecodeChannel(ChannelKernels(path), SHAPE, EPOCH)

    def times(self, load: Load, ready: Callable[[], None]) -> list[float]:
        """Return how long steps take, in microseconds a layer. Calls `ready` when the executor may begin."""
        heads = (SHAPE.num_heads, SHAPE.num_kv_heads, SHAPE.num_kv_heads, SHAPE.num_heads)
        sizes = [(2 * load.rows, count, SHAPE.head_size) for count in heads]
        q, k, v, out = (torch.randn(size, device="cuda", dtype=SHAPE.dtype) for size in sizes)
        tokens = torch.randperm(2 * load.rows, device="cuda")[: load.rows]

        def step() -> None:
            self.channel.begin()
            for layer in range(load.layers):
                self.channel.send(layer, q, k, v, tokens, load.rows)
                self.channel.receive(layer, out, tokens, load.rows)

        graph = gpu_timing.captured(step)
        ready()
        times = times_of(graph, load.layers, WARM + load.repeats)[WARM:]
        check(self.channel)
        return times


def check(end: CudaDecodeChannel | CudaExecutorChannel) -> None:
    """End the program if an end failed: what it measured is worth nothing."""
    if (health := end.health()).status:
        raise SystemExit(f"a channel failed: {health}")


def on_two_streams(path: Path, load: Load) -> tuple[float, float]:
    """Return the round trip, and attention alone, in microseconds a layer."""
    decode, stream = Decode(path), torch.cuda.Stream()
    executor = Executor(path, decode.channel.inbox.memory, load)
    decode.channel.connect(executor.channel.inbox.memory, WAIT)

    def begin() -> None:
        with torch.cuda.stream(stream):
            for _ in range(WARM + load.repeats):
                executor.graph.replay()

    times = decode.times(load, begin)
    check(executor.channel)
    return report.median(times), executor.alone


def executor_main(pipe: Connection, path: Path) -> None:
    """Be the executor's process: for each load make a channel, serve its steps, and say how attention did alone."""
    torch.cuda.init()
    while (request := pipe.recv()) is not None:
        handle, load = request
        executor = Executor(path, device_memory.open_handle(handle), load)
        pipe.send((device_memory.export(executor.channel.inbox.memory), executor.alone))
        pipe.recv()
        for _ in range(WARM + load.repeats):
            executor.graph.replay()
        check(executor.channel)
        executor.channel.disconnect()
        pipe.send(None)
        pipe.recv()
        del executor


def between_processes(pipe: Connection, path: Path, load: Load) -> tuple[float, float]:
    """Return the same, with the executor in the other process."""
    decode = Decode(path)
    pipe.send((device_memory.export(decode.channel.inbox.memory), load))
    handle, alone = pipe.recv()
    decode.channel.connect(device_memory.open_handle(handle), WAIT)
    times = decode.times(load, lambda: pipe.send(None))
    pipe.recv()
    decode.channel.disconnect()
    pipe.send(None)
    return report.median(times), alone


@contextmanager
def other_process(path: Path) -> Iterator[Connection]:
    """Give a pipe to an executor's process."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=executor_main, args=(theirs, path), daemon=True)
    process.start()
    theirs.close()
    try:
        yield ours
        ours.send(None)
        process.join(10)
    finally:
        process.kill()
        process.join()


def main() -> None:
    options = mps.options_of(__file__, __doc__ or "", "under 20 seconds, with fewer rows and repeats")
    points, path, has_mps = [], options.library.resolve(), mps.is_on()
    print(f"{torch.cuda.get_device_name()}; us a layer; {'MPS' if has_mps else 'no MPS'}")
    print(f"{'ends':<12}{'rows':>6}{'round trip':>12}{'and attention':>15}{'that alone':>12}")
    with other_process(path) as pipe:
        for ends in ("streams", "processes"):
            take_turns = ends == "processes" and not has_mps
            layers, repeats = (FEW_LAYERS, 3) if take_turns else (LAYERS, 10 if options.quick else 50)
            for rows in FEW_ROWS if options.quick else ROWS:
                loads = [Load(rows, attends, layers, repeats) for attends in (False, True)]
                if ends == "streams":
                    (plain, _), (both, alone) = (on_two_streams(path, load) for load in loads)
                else:
                    (plain, _), (both, alone) = (between_processes(pipe, path, load) for load in loads)
                print(f"{ends:<12}{rows:>6}{plain:>12.2f}{both:>15.2f}{alone:>12.2f}", flush=True)
                points.append({"ends": ends, "rows": rows, "us": plain, "attended_us": both, "attention_us": alone})
    report.finish({"gpu": torch.cuda.get_device_name(), "mps": has_mps, "points": points}, options.json)


if __name__ == "__main__":
    main()
