"""An attention executor on a GPU, as its own process, and the decode worker that it attends for: steps, growth, faults.

What a decode engine uses is used here: the link, the split of a batch, plans through shared memory, layers through GPU
memory. vLLM is not needed. docs/gpu-status.md says where these ran.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.gpu.executor_world import TIMEOUT_S, Batch, Decode, Prefill, address_in, executor_at
from vllm_adrenaline.kv.space import remote_pool
from vllm_adrenaline.native.cuda import CudaLibrary
from vllm_adrenaline.native.cuda_library import PATH
from vllm_adrenaline.prefill.executor_pool import ExecutorProcess
from vllm_adrenaline.transport.shape import Shape

SHAPE = Shape(64, 128, 96, 16, 2, 128, torch.bfloat16)
LAYERS, BLOCKS = 4, 2000
LENS = [700, 1, 65, 64, 1400, 17, 333]


@pytest.fixture(scope="module", autouse=True)
def _library(library: CudaLibrary) -> Iterator[None]:
    """Executors and decode workers use the library that the tests have built."""
    before = os.environ.get(PATH)
    os.environ[PATH] = str(library.path)
    yield
    if before is None:
        del os.environ[PATH]


@pytest.fixture(scope="module")
def prefill() -> Prefill:
    return Prefill(SHAPE, LAYERS, BLOCKS)


@pytest.fixture
def address(tmp_path: Path) -> str:
    return address_in(tmp_path)


@pytest.fixture
def executor(address: str, prefill: Prefill) -> Iterator[ExecutorProcess]:
    with executor_at(address, prefill) as process:
        yield process


def served(decode: Decode, batch: Batch) -> None:
    """Have a step served, and compare its outputs with what they must be."""
    outs = decode.step(batch)
    report = decode.remote.take_report()
    assert report is not None
    assert not report.failed
    batch.hold(outs)


def eventually_attached(decode: Decode, seconds: float = 20.0) -> None:
    until = time.monotonic() + seconds
    while decode.link.channel is None:
        assert time.monotonic() < until, "the executor is not used again"
        time.sleep(0.05)


def test_sequences_grow_step_by_step_in_the_prefill_engines_memory(
    executor: ExecutorProcess, address: str, prefill: Prefill
) -> None:
    decode = Decode(address, prefill)
    batch = Batch(prefill, [*LENS], local=frozenset({2}))
    for _ in range(40):
        served(decode, batch)
        batch.grow()
    assert decode.remote.take_counts() == {
        "remote_attention_rows": 40 * (len(LENS) - 1) * LAYERS,
        "mapped_attention_rows": 0,
    }
    decode.remote.close()


def test_steps_of_any_size_are_served_and_local_rows_are_left_alone(
    executor: ExecutorProcess, address: str, prefill: Prefill
) -> None:
    decode = Decode(address, prefill)
    for rows, queries in ((1, 1), (64, 1), (33, 1), (3, 5), (40, 3)):
        batch = Batch(prefill, [20 + 7 * row for row in range(rows)], frozenset({rows // 2} - {0}), queries)
        outs = decode.step(batch)
        drawn = [layer[3] for layer in batch.layers]
        assert all(out is given for out, given in zip(outs, drawn, strict=True))
        report = decode.remote.take_report()
        assert report is not None
        assert not report.failed
        batch.hold(outs)
    decode.remote.close()


def test_layers_of_a_decode_worker_may_be_captured(executor: ExecutorProcess, address: str, prefill: Prefill) -> None:
    """The step is begun by the host; layers are replayed, with other bits and longer sequences each time."""
    decode = Decode(address, prefill)
    batch = Batch(prefill, [*LENS])
    batch.draw()
    fixed = batch.layers
    plan = decode.begin(batch)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for layer, (q, k, v, out) in enumerate(fixed):
            plan.send(layer, q, k, v)
            plan.receive(layer, out)
    for step in range(10):
        if step:
            batch.grow()
            for layer in fixed:
                for x in layer:
                    x.normal_()
            decode.begin(batch)
        graph.replay()
        report = decode.remote.take_report()
        assert report is not None
        assert not report.failed
        batch.hold([layer[3] for layer in fixed])
    decode.remote.close()


def test_two_decode_workers_are_attended_for_at_once(executor: ExecutorProcess, address: str, prefill: Prefill) -> None:
    first, second = Decode(address, prefill, "a"), Decode(address, prefill, "b")
    streams = [torch.cuda.Stream() for _ in range(2)]
    batches = [Batch(prefill, LENS, blocks=range(1000)), Batch(prefill, [900, 3], blocks=range(1000, BLOCKS))]
    for batch in batches:
        batch.draw()
    torch.cuda.synchronize()
    for _ in range(5):
        outs = []
        for decode, batch, stream in zip((first, second), batches, streams, strict=True):
            with torch.cuda.stream(stream):
                plan = decode.begin(batch)
                for layer, (q, k, v, out) in enumerate(batch.layers):
                    plan.send(layer, q, k, v)
                    plan.receive(layer, out)
                outs.append([layer[3] for layer in batch.layers])
        for decode, batch, stream, out in zip((first, second), batches, streams, outs, strict=True):
            with torch.cuda.stream(stream):
                report = decode.remote.take_report()
                assert report is not None
                assert not report.failed
                batch.hold(out)
            batch.grow()
    first.remote.close()
    served(second, batches[1])
    second.remote.close()


def test_an_executor_within_a_share_of_the_gpu_attends_the_same(address: str, prefill: Prefill) -> None:
    with executor_at(address, prefill, share=0.2):
        decode = Decode(address, prefill)
        served(decode, Batch(prefill, LENS))
        decode.remote.close()


def failed_step(decode: Decode, batch: Batch) -> float:
    """Have a step fail; return how long it took. Its rows are zero, and the report names the executor."""
    began = time.monotonic()
    outs = decode.step(batch)
    report = decode.remote.take_report()
    took = time.monotonic() - began
    assert report is not None
    assert report.failed == {remote_pool(0)}
    assert not outs[-1].any()
    return took


def test_an_executor_that_is_killed_costs_one_bounded_step_and_another_is_used(address: str, prefill: Prefill) -> None:
    batch = Batch(prefill, LENS)
    with executor_at(address, prefill) as process:
        decode = Decode(address, prefill)
        served(decode, batch)
        process.kill()
        assert failed_step(decode, batch) < TIMEOUT_S + 0.5
        assert failed_step(decode, batch) < 0.1, "it is not waited for again"
    with executor_at(address, prefill):
        eventually_attached(decode)
        served(decode, batch)
        decode.remote.close()


def test_an_executor_that_is_stopped_is_given_up_in_time_and_used_again(
    executor: ExecutorProcess, address: str, prefill: Prefill
) -> None:
    decode, batch = Decode(address, prefill), Batch(prefill, LENS)
    served(decode, batch)
    os.kill(executor.pid, signal.SIGSTOP)
    try:
        assert failed_step(decode, batch) < TIMEOUT_S + 0.5
        assert decode.link.channel is None
    finally:
        os.kill(executor.pid, signal.SIGCONT)
    eventually_attached(decode)
    served(decode, batch)
    decode.remote.close()


def test_a_decode_worker_that_leaves_a_step_is_let_go_of_and_another_is_served(
    executor: ExecutorProcess, address: str, prefill: Prefill
) -> None:
    leaving, other, batch = Decode(address, prefill, "a"), Decode(address, prefill, "b"), Batch(prefill, LENS)
    batch.draw()
    plan = leaving.begin(batch)
    plan.send(0, *batch.layers[0][:3])
    channel = leaving.link.channel
    assert channel is not None
    torch.cuda.synchronize()
    channel.leave()
    until = time.monotonic() + 5
    while not channel.is_closed:
        assert time.monotonic() < until, "the executor does not let go"
        time.sleep(0.01)
    served(other, batch)
    other.remote.close()


def test_a_plan_that_points_outside_the_cache_is_refused_and_another_decode_worker_served(
    executor: ExecutorProcess, address: str, prefill: Prefill
) -> None:
    wrong, other = Decode(address, prefill, "a"), Decode(address, prefill, "b")
    batch = Batch(prefill, LENS)
    batch.table += BLOCKS
    assert failed_step(wrong, batch) < TIMEOUT_S + 0.5
    served(other, Batch(prefill, LENS))
    other.remote.close()
