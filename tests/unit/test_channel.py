"""The shared-memory channel and the split of a batch by place."""

from __future__ import annotations

import mmap
import multiprocessing
import os
import random
import signal
import subprocess
import threading
import time
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vllm_adrenaline.errors import AdrenalineError
from vllm_adrenaline.kv import space
from vllm_adrenaline.system import memory_file
from vllm_adrenaline.system.arithmetic import bucket
from vllm_adrenaline.transport.shape import Shape
from vllm_adrenaline.transport.shm import ShmDecodeChannel, ShmExecutorChannel, ShmSteps
from vllm_adrenaline.transport.split import SplitRows, split_rows

BLOCK = 32
SHAPE = Shape(4, 8, 3, num_heads=2, num_kv_heads=1, head_size=4, dtype=torch.float32)
SENT, DONE = 9, 16
"""Words of a channel's header (csrc/shm/layout.h)."""


def batch(remote: dict[int, list[int]], rows: int = 8) -> SplitRows:
    """A batch of one-token rows, split: executor -> its rows; the others are local."""
    table = torch.ones((rows, SHAPE.max_blocks), dtype=torch.int32)
    for executor, mine in remote.items():
        table[mine] = space.remote_id(executor, 1)
    starts, lens = torch.arange(rows + 1, dtype=torch.int32), torch.full((rows,), 5, dtype=torch.int32)
    return split_rows(table, starts, lens, torch.arange(rows), [], BLOCK)


class TimedSteps(ShmSteps):
    """Steps with a budget of waiting that is the same for all of them, whether an executor works or not."""

    def __init__(self, timeout_s: float = 30.0) -> None:
        super().__init__(SHAPE)
        self.budget_s = timeout_s, timeout_s

    def begin(self, split: Any, channels: Any, budget_s: tuple[float, float] | None = None) -> None:
        super().begin(split, channels, budget_s or self.budget_s)


def channels(
    timeout_s: float = 5.0, epoch: int | None = None, layers: int = 1, layer_timeout_s: float = 5.0
) -> tuple[TimedSteps, ShmDecodeChannel, ShmExecutorChannel]:
    """Both ends of one channel in this process."""
    decode = ShmDecodeChannel(SHAPE)
    decode.watch(-1, -1, shared_core=True)
    life = decode.epoch if epoch is None else epoch
    return TimedSteps(timeout_s), decode, ShmExecutorChannel(decode.fd, SHAPE, life, True, layers, layer_timeout_s)


def serve(executor: ShmExecutorChannel, layers: int = 1) -> threading.Thread:
    """Answer one step of `layers` with q + k * v."""

    def run() -> None:
        found = executor.next_step()
        assert found is not None
        for layer in range(layers):
            assert executor.next_layer() == layer
            found[2]["out"].copy_(found[2]["q"] + found[2]["k"] * found[2]["v"])
        assert executor.next_layer() is None

    thread = threading.Thread(target=run)
    thread.start()
    return thread


def test_rows_go_over_and_their_outputs_come_back() -> None:
    steps, decode, executor = channels(layers=3)
    # As in a model: q, k and v are views of one projection, so tokens are further apart than a row.
    both = torch.randn(6, 4, 4)
    query, key, value = both[:, :2], both[:, 2:3], both[:, 3:4]
    output = torch.zeros(6, 2, 4)
    thread = serve(executor, layers=3)
    steps.begin(batch({0: [4, 1]}).handle, {0: decode})
    for layer in range(3):
        steps.send(layer, query, key, value)
        assert steps.receive(layer, output) == 0
    thread.join()
    assert torch.equal(output[[4, 1]], (query + key * value)[[4, 1]])
    assert not output[[0, 2, 3, 5]].any()
    rows, layers, busy_ns = decode.counters
    assert (rows, layers) == (6, 3)
    assert busy_ns > 0
    assert all(spent > 0 for spent in steps.times_ns)


def test_a_plan_may_be_followed_by_another_once_it_is_taken_and_layers_that_go_another_way_are_counted() -> None:
    """As on a GPU (transport/gpu.py): plans alone go through this memory."""
    steps, decode, executor = channels(layers=3)
    assert decode.end.is_taken(), "there is none yet"
    for step in (1, 2):
        steps.begin(batch({0: [4, 1]}).handle, {0: decode})
        assert not decode.end.is_taken()
        found = executor.next_step()
        assert found is not None
        assert found[0] == step
        assert decode.end.is_taken()
        executor.count_step(1000)
        assert decode.counters == (step * 2 * 3, step * 3, step * 1000)


def test_several_executors_are_all_sent_to_before_any_is_waited_for() -> None:
    steps, first, first_end = channels()
    _, second, second_end = channels()
    query, output = torch.randn(4, 2, 4), torch.zeros(4, 2, 4)
    steps.begin(batch({0: [0, 2], 1: [3]}).handle, {0: first, 1: second})
    steps.send(0, query, query[:, :1], query[:, :1])
    thread = serve(second_end)  # the second answers although the first has not been waited for
    thread.join()
    thread = serve(first_end)
    assert steps.receive(0, output) == 0
    thread.join()
    expected = query + query[:, :1] * query[:, :1]
    assert torch.equal(output[[0, 2, 3]], expected[[0, 2, 3]])
    assert not output[1].any()


def test_rows_of_an_executor_that_is_not_there_become_zero() -> None:
    steps = TimedSteps()
    output = torch.ones(3, 2, 4)
    steps.begin(batch({5: [1]}).handle, {5: None})
    steps.send(0, output, output[:, :1], output[:, :1])
    assert steps.receive(0, output) == 0, "known already: not reported again"
    assert not output[1].any()
    assert output[[0, 2]].all()


def test_a_late_executor_is_a_returned_status_and_its_late_answer_is_not_believed() -> None:
    steps, decode, executor = channels(timeout_s=0.01, layers=2, layer_timeout_s=0.01)
    ones = torch.ones(8, 2, 4)
    steps.begin(batch({3: [0]}).handle, {3: decode})
    steps.send(0, ones, ones[:, :1], ones[:, :1])
    assert steps.receive(0, ones) == 1 << 3
    assert not ones[0].any()
    steps.send(1, ones, ones[:, :1], ones[:, :1])
    assert steps.receive(1, ones) == 0, "reported once"
    assert executor.next_step() is not None
    assert executor.next_layer() == 0
    assert executor.next_layer() is None, "it announced layer 0, and layer 1 was not sent to it"
    # It was too late: the next step is on its way.
    steps.begin(batch({3: [0]}).handle, {3: decode})
    steps.send(0, ones, ones[:, :1], ones[:, :1])
    assert steps.receive(0, ones) == 1 << 3


def test_an_answer_from_another_life_of_the_channel_is_not_believed() -> None:
    steps, decode, executor = channels(timeout_s=0.05, epoch=7)
    steps.begin(batch({0: [0]}).handle, {0: decode})
    with pytest.raises(RuntimeError, match="does not fit"):
        executor.next_step()
    zeros = torch.zeros(1, 2, 4)
    steps.send(0, zeros, zeros[:, :1], zeros[:, :1])
    assert executor.next_layer() is None, "what was sent is not its own either"
    with mmap.mmap(decode.fd, 0) as memory, memoryview(memory).cast("Q") as word:
        word[DONE] = word[SENT] ^ (7 ^ decode.epoch) << 48
        assert steps.receive(0, zeros) == 1
        steps.begin(batch({0: [0]}).handle, {0: decode})
        steps.send(0, zeros, zeros[:, :1], zeros[:, :1])
        word[DONE] = word[SENT]
        assert steps.receive(0, zeros) == 0, "that is where answers are read"


def test_heads_that_are_not_contiguous_are_refused() -> None:
    steps, decode, _ = channels()
    steps.begin(batch({0: [0]}).handle, {0: decode})
    query = torch.zeros(1, 4, 2).transpose(1, 2)
    with pytest.raises(ValueError, match="contiguous"):
        steps.send(0, query, query[:, :1], query[:, :1])


def test_what_is_no_layer_no_channel_or_no_tensor_is_refused() -> None:
    steps, decode, _ = channels()
    split, x = batch({0: [0]}).handle, torch.zeros(1, 2, 4)
    steps.begin(split, {0: decode})
    for layer, error in ((4094, ValueError), (-1, OverflowError), ("0", TypeError)):
        with pytest.raises(error):
            steps.send(layer, x, x[:, :1], x[:, :1])
        with pytest.raises(error):
            steps.receive(layer, x)
    with pytest.raises(TypeError):
        steps.begin(split, {0: SimpleNamespace(end=split)})
    with pytest.raises(TypeError):
        steps.begin(decode.end, {0: decode})
    with pytest.raises(ValueError, match="heads are contiguous"):
        steps.send(0, x, x, x[:, :1])
    with pytest.raises((TypeError, RuntimeError)):
        steps.send(0, x, x[:, :1], None)
    with pytest.raises(TypeError, match="cannot create"):
        type(split)()


def test_an_executor_that_has_ended_is_noticed_long_before_the_timeout() -> None:
    steps, decode, _ = channels(timeout_s=60)
    with subprocess.Popen(["sleep", "100"]) as peer:
        pidfd = os.pidfd_open(peer.pid)
        decode.watch(-1, pidfd, shared_core=True)
        ones = torch.ones(1, 2, 4)
        steps.begin(batch({0: [0]}).handle, {0: decode})
        steps.send(0, ones, ones[:, :1], ones[:, :1])
        threading.Timer(0.1, peer.kill).start()
        started = time.monotonic()
        assert steps.receive(0, ones) == 1
        assert time.monotonic() - started < 10
        os.close(pidfd)


def test_an_idle_executor_takes_no_cpu_time_and_ends_when_it_is_stopped() -> None:
    _, _, executor = channels()
    found = []
    thread = threading.Thread(target=lambda: found.append(executor.next_step()))
    thread.start()
    time.sleep(0.05)
    stat = f"/proc/self/task/{thread.native_id}/schedstat"
    before = int(Path(stat).read_text().split()[0])
    time.sleep(0.5)
    assert int(Path(stat).read_text().split()[0]) == before
    executor.stop()
    thread.join(timeout=10)
    assert found == [None]


def test_an_executor_leaves_a_step_that_the_decode_worker_left() -> None:
    steps, decode, executor = channels(layer_timeout_s=60)
    steps.begin(batch({0: [0]}).handle, {0: decode})
    assert executor.next_step() is not None
    steps.begin(batch({0: [0, 1]}).handle, {0: decode})
    started = time.monotonic()
    assert executor.next_layer() is None
    assert time.monotonic() - started < 10
    found = executor.next_step()
    assert found is not None
    assert found[1] == 2


def test_a_plan_of_another_width_is_refused() -> None:
    steps, decode, _ = channels()
    table = torch.full((1, 2), space.remote_id(0, 1), dtype=torch.int32)
    one = torch.ones(1, dtype=torch.int32)
    split = split_rows(table, torch.tensor([0, 1], dtype=torch.int32), one, torch.zeros(1, dtype=torch.int64), [], 32)
    with pytest.raises(RuntimeError, match="as wide as"):
        steps.begin(split.handle, {0: decode})


def test_a_file_of_another_size_is_no_channel() -> None:
    fd = memory_file.create("x", 4096)
    with pytest.raises(AdrenalineError, match="bytes"):
        ShmExecutorChannel(fd, SHAPE, 1, True, 1, 5.0)
    os.close(fd)


def test_a_file_that_could_shrink_is_no_channel_and_ours_cannot() -> None:
    """A channel that shrinks while it is mapped ends the process that reads it."""
    _, decode, _ = channels()
    with pytest.raises(PermissionError):
        os.ftruncate(decode.fd, 4096)
    fd = os.memfd_create("x")
    os.ftruncate(fd, os.fstat(decode.fd).st_size)
    with pytest.raises(AdrenalineError, match="F_SEAL_SHRINK"):
        ShmExecutorChannel(fd, SHAPE, 1, True, 1, 5.0)
    os.close(fd)


def test_what_an_executor_has_checked_cannot_be_changed_by_its_peer() -> None:
    steps, decode, executor = channels()
    steps.begin(batch({0: [0, 1]}).handle, {0: decode})
    found = executor.next_step()
    assert found is not None
    plan = {name: found[2][name].clone() for name in ("query_start_loc", "seq_lens", "block_table", "slot_mapping")}
    with mmap.mmap(decode.fd, 0) as memory:  # a page of header, then a page for each of them
        memory[4096 : 5 * 4096] = b"\x7f" * (4 * 4096)
    assert {name: found[2][name].tolist() for name in plan} == {name: each.tolist() for name, each in plan.items()}


def test_executors_that_hang_together_cost_a_step_one_timeout() -> None:
    timeout = 0.3
    steps, first, _ = channels(timeout)
    others = [channels(timeout)[1] for _ in range(5)]
    ends = dict(enumerate([first, *others]))
    ones = torch.ones(8, 2, 4)
    steps.begin(batch({executor: [executor] for executor in ends}).handle, ends)
    started = time.monotonic()
    for layer in range(3):
        steps.send(layer, ones, ones[:, :1], ones[:, :1])
        assert steps.receive(layer, ones) == (0b111111 if layer == 0 else 0)
    assert timeout <= time.monotonic() - started < 2 * timeout


def test_executors_that_hang_one_after_another_do_not_cost_a_step_a_timeout_each() -> None:
    timeout = 2.0
    steps, first, _ = channels(timeout)
    _, second, served = channels(timeout)
    ones = torch.ones(8, 2, 4)
    thread = serve(served, layers=1)
    steps.begin(batch({0: [0], 1: [1]}).handle, {0: first, 1: second})
    started = time.monotonic()
    for layer, failed in ((0, 0b01), (1, 0b10), (2, 0)):
        steps.send(layer, ones, ones[:, :1], ones[:, :1])
        assert steps.receive(layer, ones) == failed
    thread.join()
    assert timeout <= time.monotonic() - started < 1.75 * timeout, "what is left of the first, or a second"


def test_a_channel_that_its_executor_closed_is_given_up_at_once() -> None:
    steps, decode, executor = channels(timeout_s=60)
    ones = torch.ones(8, 2, 4)
    steps.begin(batch({0: [0]}).handle, {0: decode})
    steps.send(0, ones, ones[:, :1], ones[:, :1])
    threading.Timer(0.1, executor.close).start()
    started = time.monotonic()
    assert steps.receive(0, ones) == 1, "it was waiting"
    steps.begin(batch({0: [0]}).handle, {0: decode})
    steps.send(0, ones, ones[:, :1], ones[:, :1])
    assert steps.receive(0, ones) == 1, "and is not waited for again"
    assert time.monotonic() - started < 10


def run_slowly(pid: int, fd: int, epoch: int, ready: Connection, busy: bool) -> None:
    """Never answer: compute for ever, or sleep for ever."""
    torch.set_num_threads(1)
    mapped = os.open(f"/proc/{pid}/fd/{fd}", os.O_RDWR)
    executor = ShmExecutorChannel(mapped, SHAPE, epoch, True, 1, 5.0)
    ready.send("up")
    assert executor.next_step() is not None
    while busy:
        pass
    time.sleep(100)


@pytest.mark.parametrize(("state", "least", "most"), [("busy", 1.0, 1.6), ("asleep", 0.2, 0.8), ("stopped", 0.2, 0.8)])
def test_a_late_executor_is_granted_more_time_only_while_it_works(state: str, least: float, most: float) -> None:
    steps, decode, _ = channels()
    here, there = forked.Pipe()
    args = (os.getpid(), decode.fd, decode.epoch, there, state != "asleep")
    peer = forked.Process(target=run_slowly, args=args, daemon=True)
    peer.start()
    assert here.recv() == "up"
    assert peer.pid is not None
    pidfd = os.pidfd_open(peer.pid)
    folder = os.open(f"/proc/{peer.pid}", os.O_RDONLY | os.O_DIRECTORY)
    decode.watch(folder, pidfd, shared_core=True)
    if state == "stopped":
        os.kill(peer.pid, signal.SIGSTOP)
    ones = torch.ones(1, 2, 4)
    steps.begin(batch({0: [0]}, rows=1).handle, {0: decode}, (0.2, 1.0))
    steps.send(0, ones, ones[:, :1], ones[:, :1])
    began = time.monotonic()
    assert steps.receive(0, ones) == 1
    assert least <= time.monotonic() - began < most
    peer.kill()
    peer.join()
    os.close(pidfd)
    os.close(folder)


def test_many_slow_layers_exhaust_the_budget_of_a_step_as_one_stuck_layer_does() -> None:
    steps, decode, executor = channels(timeout_s=0.3, layers=12)
    ones = torch.ones(1, 2, 4)

    def run() -> None:
        assert executor.next_step() is not None
        while executor.next_layer() is not None:
            time.sleep(0.05)

    thread = threading.Thread(target=run)
    thread.start()
    steps.begin(batch({0: [0]}, rows=1).handle, {0: decode})
    failed, began = [], time.monotonic()
    for layer in range(12):
        steps.send(layer, ones, ones[:, :1], ones[:, :1])
        failed.append(steps.receive(layer, ones))
    assert sum(failed) == 1
    assert 2 <= failed.index(1) <= 6
    assert time.monotonic() - began < 0.6
    decode.leave()
    thread.join(timeout=10)
    assert not thread.is_alive(), "it learns that it is left, in the middle of a step"


def test_what_the_decode_worker_computes_takes_nothing_of_the_budget() -> None:
    steps, decode, executor = channels(timeout_s=0.2, layers=3)
    ones = torch.ones(1, 2, 4)
    thread = serve(executor, layers=3)
    steps.begin(batch({0: [0]}, rows=1).handle, {0: decode})
    for layer in range(3):
        time.sleep(0.15)
        steps.send(layer, ones, ones[:, :1], ones[:, :1])
        time.sleep(0.15)
        assert steps.receive(layer, ones) == 0
    thread.join()


def test_an_executor_that_is_left_between_steps_ends_its_channel() -> None:
    _, decode, executor = channels()
    found = []
    thread = threading.Thread(target=lambda: found.append(executor.next_step()))
    thread.start()
    decode.leave()
    thread.join(timeout=10)
    assert found == [None]


def test_thousands_of_channels_leave_nothing_behind() -> None:
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1])

    def cycle(count: int) -> None:
        for _ in range(count):
            steps, decode, executor = channels()
            steps.begin(batch({0: [0]}).handle, {0: decode})
            assert executor.next_step() is not None
            decode.close()

    cycle(500)
    before = len(os.listdir("/proc/self/fd")), len(Path("/proc/self/maps").read_text().splitlines()), resident()
    cycle(3000)
    assert len(os.listdir("/proc/self/fd")) <= before[0]
    assert len(Path("/proc/self/maps").read_text().splitlines()) <= before[1] + 5
    assert resident() <= before[2] + 150, "pages: a channel has 9"


# Processes that will be killed are forked from one that has imported torch, for the import takes seconds.
forked = multiprocessing.get_context("forkserver")
forked.set_forkserver_preload([__name__])


def run_executor(decode_pid: int, fd: int, epoch: int, up: Connection) -> None:
    """Answer steps of a decode worker in this process until it is killed."""
    channel = ShmExecutorChannel(os.open(f"/proc/{decode_pid}/fd/{fd}", os.O_RDWR), SHAPE, epoch, True, 4, 1)
    up.send("up")
    while (found := channel.next_step()) is not None:
        step = found[2]
        while channel.next_layer() is not None:
            step["out"].copy_(step["q"])


def test_an_executor_killed_at_any_point_leaves_the_decode_worker_alive_and_no_wrong_row() -> None:
    """Killed at random moments of steps: every layer yields the right rows or is reported as failed."""
    rng = random.Random(5)
    seen = set()
    for _ in range(6):
        steps, decode, _ = channels(timeout_s=30)
        here, there = forked.Pipe()
        peer = forked.Process(target=run_executor, args=(os.getpid(), decode.fd, decode.epoch, there), daemon=True)
        peer.start()
        assert here.recv() == "up"
        assert peer.pid is not None
        pidfd = os.pidfd_open(peer.pid)
        decode.watch(-1, pidfd, shared_core=True)
        threading.Timer(rng.uniform(0.0, 0.2), peer.kill).start()
        failed = 0
        while not failed:
            steps.begin(batch({0: [1]}).handle, {0: decode})
            for layer in range(4):
                query, output = torch.randn(2, 2, 4), torch.ones(2, 2, 4)
                steps.send(layer, query, query[:, :1], query[:, :1])
                failed |= (now := steps.receive(layer, output))
                expected = torch.zeros(2, 4) if failed else query[1]
                assert torch.equal(output[1], expected)
                if now:
                    seen.add(layer)
        os.close(pidfd)
        peer.join()
        decode.close()
    assert seen, "no kill hit a step: the test says nothing"


def run_decode(executor: Connection) -> None:
    """Send steps to an executor from this process until it is killed."""
    channel, steps = ShmDecodeChannel(SHAPE), TimedSteps()
    channel.watch(-1, -1, True)
    executor.send((channel.fd, channel.epoch))
    executor.recv()  # it is there
    x = torch.zeros(8, 2, 4)
    split = batch({0: [1]})
    while True:
        steps.begin(split.handle, {0: channel})
        for layer in range(4):
            steps.send(layer, x, x[:, :1], x[:, :1])
            assert steps.receive(layer, x) == 0


def test_a_decode_worker_killed_at_any_point_leaves_the_executor_alive() -> None:
    for seconds in (0.0, 0.05, 0.1):
        here, there = forked.Pipe()
        peer = forked.Process(target=run_decode, args=(there,), daemon=True)
        peer.start()
        fd, epoch = here.recv()
        mapped = os.open(f"/proc/{peer.pid}/fd/{fd}", os.O_RDWR)
        executor = ShmExecutorChannel(mapped, SHAPE, epoch, True, 4, 0.2)
        os.close(mapped)
        here.send("here")
        layers: list[int] = []

        def run(executor: ShmExecutorChannel = executor, layers: list[int] = layers) -> None:
            while executor.next_step() is not None:
                while (layer := executor.next_layer()) is not None:
                    layers.append(layer)

        thread = threading.Thread(target=run)
        thread.start()
        while not layers:
            time.sleep(0.001)
        time.sleep(seconds)
        peer.kill()
        peer.join()
        time.sleep(0.05)
        assert thread.is_alive(), "it waits for the next step, or for the layer until its timeout"
        executor.stop()
        thread.join(timeout=10)
        assert not thread.is_alive()


MAPPED_BASES = [1000, -1, 3000]
"""Of three prefill engines; the memory of the second one is not mapped."""
places = st.sampled_from([0, 1, 2, space.MAPPED, space.MAPPED + 1, space.MAPPED + 2, space.MAPPED + 3])
rows = st.lists(st.tuples(places, st.integers(1, 5), st.integers(0, 90)), min_size=1, max_size=8)


def sent(split: SplitRows, executor: int) -> tuple[int, dict[str, torch.Tensor]]:
    """What an executor gets to see of a split: how many rows, and the arrays."""
    shape = replace(SHAPE, max_rows=8, max_tokens=64, max_blocks=4)
    decode = ShmDecodeChannel(shape)
    end = ShmExecutorChannel(decode.fd, shape, decode.epoch, True, 1, 5.0)
    ShmSteps(shape).begin(split.handle, {executor: decode}, (5.0, 5.0))
    found = end.next_step()
    decode.close()
    assert found is not None
    return found[1], found[2]


@given(rows, st.data())
def test_a_split_batch_masks_remote_rows_and_loses_no_token(
    spec: list[tuple[int, int, int]], data: st.DataObject
) -> None:
    width = 4
    queries = [query for _, query, _ in spec]
    lens = [query + past for _, query, past in spec]
    blocks = st.integers(1, 50)
    table = torch.tensor(
        [[place << space.INDEX_BITS | data.draw(blocks) for _ in range(width)] for place, _, _ in spec],
        dtype=torch.int32,
    )
    # As vLLM's: a view of a wider tensor, and a slot mapping longer than the batch.
    table = torch.cat([table, torch.full_like(table, 77)], dim=1)[:, :width]
    starts = torch.tensor([0, *torch.tensor(queries).cumsum(0).tolist()], dtype=torch.int32)
    slots = torch.arange(1000, 1000 + sum(queries) + 5)
    single = [row for row, query in enumerate(queries) if query == 1]
    received = data.draw(st.lists(st.sampled_from(single), unique=True)) if single else []
    split = split_rows(table, starts, torch.tensor(lens, dtype=torch.int32), slots, received, BLOCK, MAPPED_BASES)
    base_of = {space.MAPPED + engine: base for engine, base in enumerate(MAPPED_BASES) if base >= 0}
    assert split.executors == sorted({place - 1 for place, _, _ in spec if 0 < place < space.MAPPED})
    assert split.has_local == any(place == 0 or place in base_of for place, _, _ in spec)
    assert split.num_mapped == sum(place in base_of for place, _, _ in spec)
    assert split.lost == [
        row for row, (place, _, _) in enumerate(spec) if place >= space.MAPPED and place not in base_of
    ]
    views = {executor: (split.rows(executor), *sent(split, executor)) for executor in split.executors}
    masked, moved = [], set()
    for row, (place, query, past) in enumerate(spec):
        tokens = range(int(starts[row]), int(starts[row + 1]))
        if place == 0:
            assert torch.equal(split.local_block_table[row], table[row])
            assert split.local_seq_lens[row] == lens[row]
            masked += list(tokens) if row in received else []
            continue
        if place in base_of:
            wanted = [base_of[place] + space.index_of(each) for each in table[row].tolist()]
            assert split.local_block_table[row].tolist() == wanted
            assert split.local_seq_lens[row] == lens[row]
            for offset, token in enumerate(tokens):
                position = past + offset
                slot = wanted[position // BLOCK] * BLOCK + position % BLOCK
                assert slots[token] == (-1 if row in received else slot)
            masked += list(tokens) if row in received else []
            moved |= {*tokens}
            continue
        masked += tokens
        assert not split.local_block_table[row].any()
        assert split.local_seq_lens[row] == query
        if place >= space.MAPPED:
            continue
        mine, count, plan = views[place - 1]
        assert count == len(mine)
        where = mine.index(row)
        assert plan["seq_lens"][where] == lens[row]
        assert torch.equal(plan["block_table"][where], table[row] & (space.MAX_BLOCKS - 1))
        begin, end = plan["query_start_loc"][where : where + 2].tolist()
        assert end - begin == query
        for offset, slot in enumerate(plan["slot_mapping"][begin:end].tolist()):
            position = past + offset
            block = space.index_of(int(table[row, position // BLOCK]))
            assert slot == (-1 if row in received else block * BLOCK + position % BLOCK)
    assert [slot for slot in range(sum(queries)) if slots[slot] == -1] == masked
    assert all(slots[i] == 1000 + i for i in range(len(slots)) if i not in masked and i not in moved)
    for mine, count, plan in views.values():
        total = sum(queries[row] for row in mine)
        assert (plan["query_start_loc"][count:] == total).all()
        assert not plan["seq_lens"][count:].any()
        assert (plan["slot_mapping"][total:] == -1).all()


def test_a_batch_that_contradicts_itself_is_refused() -> None:
    one, starts = torch.ones(1, dtype=torch.int32), torch.tensor([0, 1], dtype=torch.int32)
    table, slots = torch.ones((1, 2), dtype=torch.int32), torch.zeros(1, dtype=torch.int64)
    with pytest.raises(RuntimeError, match="longer than its block table"):
        split_rows(table, starts, one * (2 * BLOCK + 1), slots, [], BLOCK)
    with pytest.raises(RuntimeError, match="no tokens"):
        split_rows(table, starts * 0, one, slots, [], BLOCK)
    with pytest.raises(RuntimeError, match="no such row"):
        split_rows(table, starts, one, slots, [1], BLOCK)
    with pytest.raises(ValueError, match="int32"):
        split_rows(table.long(), starts, one, slots, [], BLOCK)
    with pytest.raises(ValueError, match="contiguous"):
        split_rows(torch.ones((2, 1), dtype=torch.int32).expand(2, 2).T.T[:1].expand(1, 2), starts, one, slots, [], 32)


def test_plans_are_padded_to_the_sizes_that_python_counts_with() -> None:
    steps, decode, executor = channels()
    for rows in range(1, SHAPE.max_rows + 1):
        steps.begin(batch({0: [*range(rows)]}).handle, {0: decode})
        found = executor.next_step()
        assert found is not None
        lens, slots = len(found[2]["seq_lens"]), len(found[2]["slot_mapping"])
        assert (lens, slots) == (bucket(rows, SHAPE.max_rows), bucket(rows, SHAPE.max_tokens))
