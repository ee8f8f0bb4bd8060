"""The CUDA IPC transport on a GPU: two processes, whose kernels store rows into each other's memory and wait.

Without MPS the processes share the GPU by turns of some milliseconds: that is slow, and right.
docs/gpu-status.md says where these ran.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.gpu.transport_peer import Executor, Peer, mixed, packed
from tests.unit import cuda_cases
from tests.unit.cuda_cases import Case, Expected
from vllm_adrenaline.native.cuda import CudaLibrary
from vllm_adrenaline.native.cuda_channel import ChannelKernels, ChannelStatus
from vllm_adrenaline.system import device_memory
from vllm_adrenaline.transport.cuda_ipc import CudaDecodeChannel
from vllm_adrenaline.transport.shape import Shape

LAYERS, STEPS, WAIT = 3, 8, 10.0
OTHER_EPOCH = 65535
SHAPE = Shape(128, 128, 1, 16, 2, 128, torch.bfloat16)
ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(scope="module")
def kernels(library: CudaLibrary) -> ChannelKernels:
    return ChannelKernels(library.path)


@pytest.fixture(scope="module")
def peer(library: CudaLibrary) -> Iterator[Peer]:
    made = Peer(library.path)
    yield made
    made.end()


class Attach:
    """Makes decode workers' ends, and takes them down in the order that CUDA wants: closed by the other, then freed."""

    def __init__(self, kernels: ChannelKernels) -> None:
        self._kernels = kernels
        self._made: list[tuple[CudaDecodeChannel, Peer]] = []

    def __call__(self, peer: Peer, ours_s: float = WAIT, theirs_s: float = WAIT) -> CudaDecodeChannel:
        """Return an end whose executor is the other process. A layer is waited for so many seconds, on each side."""
        channel = CudaDecodeChannel(self._kernels, SHAPE, random.randrange(1, OTHER_EPOCH))
        ours = device_memory.export(channel.inbox.memory)
        handle = peer.ask("attach_by_handle", SHAPE, channel.epoch, ours, theirs_s)
        channel.connect(device_memory.open_handle(handle), ours_s)
        self._made.append((channel, peer))
        return channel

    def end(self) -> None:
        while self._made:
            channel, peer = self._made.pop()
            channel.disconnect()
            if peer.process.is_alive():
                peer.ask("detach")


@pytest.fixture
def attach(kernels: ChannelKernels) -> Iterator[Attach]:
    made = Attach(kernels)
    yield made
    made.end()


class Batch:
    """A batch whose `rows` rows are attended elsewhere, and the same step for all its layers."""

    def __init__(self, channel: CudaDecodeChannel, rows: int, layers: int = LAYERS) -> None:
        self.channel, self.rows, self.layers = channel, rows, range(layers)
        size = 2 * rows + 3
        self.tokens = torch.randperm(size, device="cuda")[:rows]
        self.tokens[rows // 2] = -1 if rows > 1 else self.tokens[0]  # padding
        sizes = {"q": SHAPE.num_heads, "k": SHAPE.num_kv_heads, "v": SHAPE.num_kv_heads, "out": SHAPE.num_heads}
        # q, k and v are parts of one tensor, as in engines: rows have a stride.
        self._whole = torch.zeros(layers, size, sum(sizes.values()), SHAPE.head_size, device="cuda").bfloat16()
        parts = self._whole.split([*sizes.values()], dim=2)
        self.tensors = dict(zip(sizes, parts, strict=True))
        self.draw()

    def draw(self) -> None:
        """Draw all bits anew, those of the output, too."""
        bits = torch.randint(-(1 << 15), 1 << 15, self._whole.shape, device="cuda", dtype=torch.int16)
        self._whole.view(torch.int16).copy_(bits)

    def of(self, layer: int) -> dict[str, torch.Tensor]:
        return {name: x[layer] for name, x in self.tensors.items()}

    def step(self) -> None:
        """Launch a step."""
        self.channel.begin()
        for layer in self.layers:
            x = self.of(layer)
            self.channel.send(layer, x["q"], x["k"], x["v"], self.tokens, self.rows)
            self.channel.receive(layer, x["out"], self.tokens, self.rows)

    def expected(self) -> list[torch.Tensor]:
        """Return the bits of what the step must leave in each layer's output."""
        found, used = [], self.tokens[self.tokens >= 0]
        for layer in self.layers:
            x = self.of(layer)
            out = x["out"].clone()
            answer = mixed(*(x[name][used].contiguous() for name in "qkv"))
            out.view(torch.int16)[used] = answer.view(torch.int16)
            found.append(out.view(torch.int16))
        return found

    def hold(self, expected: list[torch.Tensor]) -> None:
        """Compare what came with what must, once all launches are done."""
        torch.cuda.synchronize()
        for layer, wanted in zip(self.layers, expected, strict=True):
            assert torch.equal(self.of(layer)["out"].contiguous().view(torch.int16), wanted), f"layer {layer}"


def run_steps(batch: Batch, captured: bool) -> None:
    """Run STEPS steps, each with other bits, and compare each."""
    launch = batch.step
    if captured:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            batch.step()
        launch = graph.replay
    for _ in range(STEPS):
        batch.draw()
        expected = batch.expected()
        launch()
        batch.hold(expected)


def seconds_of(batch: Batch) -> float:
    """Return how long a step takes."""
    torch.cuda.synchronize()
    began = time.monotonic()
    batch.step()
    torch.cuda.synchronize()
    return time.monotonic() - began


def assert_zero(batch: Batch) -> None:
    used = batch.tokens[batch.tokens >= 0]
    for layer in batch.layers:
        assert not batch.of(layer)["out"][used].view(torch.int16).any()


@pytest.mark.parametrize("captured", [False, True], ids=["launched", "replayed"])
@pytest.mark.parametrize("rows", [1, 5, 128])
def test_rows_arrive_bit_for_bit(rows: int, captured: bool, attach: Attach, peer: Peer) -> None:
    channel = attach(peer)
    peer.tell("answer", STEPS, LAYERS, captured)
    run_steps(Batch(channel, rows), captured)
    assert peer.answer() == channel.health() == (ChannelStatus.READY, STEPS, 0)


@pytest.mark.parametrize("captured", [False, True], ids=["launched", "replayed"])
def test_both_ends_may_be_streams_of_one_process(captured: bool, kernels: ChannelKernels, library: CudaLibrary) -> None:
    channel, executor, stream = CudaDecodeChannel(kernels, SHAPE, 7), Executor(library.path), torch.cuda.Stream()
    with torch.cuda.stream(stream):  # what it allocates beforehand, it need not while the other stream waits
        theirs = executor.attach(SHAPE, 7, channel.inbox.memory, WAIT)
    channel.connect(theirs, WAIT)
    batch = Batch(channel, 64)
    batch.draw()
    expected = batch.expected()
    torch.cuda.synchronize()
    launches = batch.step, lambda: executor.step(LAYERS)
    if captured:
        graphs = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        for graph, launch in zip(graphs, launches, strict=True):
            with torch.cuda.graph(graph):
                launch()
        launches = graphs[0].replay, graphs[1].replay
    launches[0]()
    with torch.cuda.stream(stream):
        launches[1]()
    batch.hold(expected)
    assert channel.health() == executor.channel.health() == (ChannelStatus.READY, 1, 0)


@pytest.mark.parametrize("captured", [False, True], ids=["launched", "replayed"])
def test_an_exported_kv_cache_is_attended_by_the_other_process(captured: bool, attach: Attach, peer: Peer) -> None:
    case = Case(rows=((3000, 1), (65, 2), (17, 1), (0, 0)), group=8, received=frozenset({2}))
    made = cuda_cases.make(case)
    expected = Expected(made)
    cache = torch.stack([made.layer.keys, made.layer.values]).cuda()
    channel = attach(peer)
    plan = {name: made.step[name] for name in ("query_start_loc", "seq_lens", "block_table", "slot_mapping")}
    peer.tell("attend", device_memory.export(cache), tuple(cache.shape), packed(plan), made.layer.scale, captured)
    q, k, v, out = (made.step[name].cuda() for name in ("q", "k", "v", "out"))
    tokens = torch.arange(len(q), device="cuda")
    tokens[made.step["query_start_loc"][-1] :] = -1  # padding
    channel.begin()
    channel.send(0, q, k, v, tokens, len(q))
    channel.receive(0, out, tokens, len(q))
    torch.cuda.synchronize()
    assert peer.answer() == channel.health() == (ChannelStatus.READY, 1, 0)
    expected.hold(out.cpu(), cache[0].cpu(), cache[1].cpu())


def test_an_executor_that_waited_in_vain_appends_nothing(attach: Attach, peer: Peer) -> None:
    made = cuda_cases.make(Case(rows=((300, 1), (17, 1))))
    cache = torch.stack([made.layer.keys, made.layer.values]).cuda()
    before = cache.clone()
    channel = attach(peer, theirs_s=0.05)
    plan = {name: made.step[name] for name in ("query_start_loc", "seq_lens", "block_table", "slot_mapping")}
    theirs = peer.ask("attend", device_memory.export(cache), tuple(cache.shape), packed(plan), made.layer.scale, True)
    assert (theirs.status, theirs.failed_step) == (ChannelStatus.LATE, 1)
    assert torch.equal(cache.view(torch.int16), before.view(torch.int16))
    # It says so to the decode worker, which does not wait for it.
    batch = Batch(channel, 5)
    assert seconds_of(batch) < WAIT / 4
    assert channel.health().status is ChannelStatus.CLOSED
    assert_zero(batch)


@pytest.mark.parametrize(
    ("word", "argument", "status"),
    [
        ("close", (), ChannelStatus.CLOSED),
        ("announce_as", (OTHER_EPOCH,), ChannelStatus.STALE),
        ("announce_layer", (1,), ChannelStatus.AHEAD),
    ],
)
def test_a_wait_ends_at_once_when_what_is_announced_is_of_no_use(
    word: str, argument: tuple[int, ...], status: ChannelStatus, attach: Attach, peer: Peer
) -> None:
    channel = attach(peer)
    peer.ask(word, *argument)
    batch = Batch(channel, 5)
    assert seconds_of(batch) < WAIT / 4
    health = channel.health()
    assert (health.status, health.failed_step) == (status, 1)
    assert_zero(batch)


def refused(settings: str) -> str:
    """Return why memory that torch allocates with these settings cannot be exported."""
    code = (
        "import torch; from vllm_adrenaline.errors import AdrenalineError; "
        "from vllm_adrenaline.system.device_memory import export\n"
        "try: print(export(torch.zeros(1 << 25, dtype=torch.int8, device='cuda')))\n"
        "except AdrenalineError as error: print(error)"
    )
    environment = {**os.environ, "PYTORCH_CUDA_ALLOC_CONF": settings, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("setting", ["expandable_segments:True", "backend:cudaMallocAsync"])
def test_memory_that_cannot_be_exported_is_refused_by_name(setting: str, library: CudaLibrary) -> None:
    said = refused(setting)
    assert "cannot be shared" in said
    assert setting.split(":")[0 if "expandable" in setting else 1] in said


# The last one: should a store into the memory of a process that has ended break this process, the tests before stand.
def test_a_peer_that_dies_costs_one_bounded_wait(attach: Attach, library: CudaLibrary) -> None:
    mortal, bound = Peer(library.path), 0.5
    channel = attach(mortal, ours_s=bound)
    batch = Batch(channel, 5)
    mortal.tell("answer", 1, LAYERS, False)
    expected = batch.expected()
    batch.step()
    batch.hold(expected)
    mortal.answer()
    mortal.process.kill()
    mortal.process.join()
    took = seconds_of(batch)
    assert bound * 0.9 < took < bound + 0.5
    assert_zero(batch)
    health = channel.health()
    assert (health.status, health.step, health.failed_step) == (ChannelStatus.LATE, 2, 2)
    # It is not waited for again in this life.
    assert seconds_of(batch) < 0.1
    assert channel.health().failed_at == health.failed_at
    # A new life, with new memory, is as good as the first.
    anew = Peer(library.path)
    channel = attach(anew)
    anew.tell("answer", STEPS, LAYERS, False)
    run_steps(Batch(channel, 5), False)
    anew.answer()
    attach.end()
    anew.end()
