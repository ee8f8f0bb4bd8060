"""The collective transport: a decode worker and an executor that share no memory, over a process group of two."""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerProcess

import pytest
import torch

from tests.unit.test_channel import SHAPE, batch, channels, serve
from vllm_adrenaline.attention.server import check_plan
from vllm_adrenaline.control import messages
from vllm_adrenaline.errors import AdrenalineError
from vllm_adrenaline.transport import pair, steps
from vllm_adrenaline.transport.collective import CollectiveDecodeChannel, CollectiveExecutorChannel
from vllm_adrenaline.transport.pair import Disconnected, Pair
from vllm_adrenaline.transport.steps import Steps

# Executors are forked from a process that has imported torch, and has no thread yet.
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload([__name__])
LAYERS = 3
BLOCKS = 8


def executor(line: Connection, epoch: int | None, faults: dict[str, float]) -> None:
    """The executor's process. It answers q + k * v, and says which plans came; `faults` says what goes wrong where."""
    torch.set_num_threads(1)
    line.send("up")
    epoch = epoch or line.recv()
    channel = CollectiveExecutorChannel(SHAPE, "lo", epoch, LAYERS, faults.get("timeout", 5.0))
    line.send(channel.contact)
    channel.connect(line.recv())
    line.send("ready")
    step = 0
    try:
        while (found := channel.next_step()) is not None:
            step += 1
            _, rows, tensors = found
            check_plan(tensors, BLOCKS, 32)
            line.send((rows, {n: tensors[n].clone() for n in ("query_start_loc", "seq_lens", "block_table")}))
            while (layer := channel.next_layer()) is not None:
                if (step, layer) == (faults.get("step"), faults.get("layer")):
                    if "sleep" in faults:
                        time.sleep(faults["sleep"])
                    if "die" in faults:
                        os.kill(os.getpid(), signal.SIGKILL)
                    if "announce" in faults:
                        channel._announced += int(faults["announce"])
                tensors["out"].copy_(tensors["q"] + tensors["k"] * tensors["v"])
    except Exception as error:
        line.send(f"{type(error).__name__}: {error}")
    channel.close()
    line.send("closed")


class Executor:
    """An executor in a process of its own, and the decode worker's channel to it."""

    def __init__(self, epoch: int | None = None, **faults: float) -> None:
        self.line, theirs = multiprocessing.Pipe()
        self.process: ForkServerProcess = CONTEXT.Process(target=executor, args=(theirs, epoch, faults), daemon=True)
        self.process.start()
        theirs.close()
        assert self.hear() == "up"
        self.channel = CollectiveDecodeChannel(SHAPE, "lo", LAYERS)
        if epoch is None:
            self.line.send(self.channel.epoch)
        contact = self.hear()
        assert isinstance(contact, messages.Contact)
        self.line.send(self.channel.contact)
        self.channel.connect(contact)
        assert self.hear() == "ready"

    def hear(self) -> object:
        """What the executor says next."""
        assert self.line.poll(20), "the executor says nothing"
        return self.line.recv()

    def end(self) -> None:
        """End the process, whatever it does."""
        self.channel.close()
        self.process.kill()
        self.process.join()


@pytest.fixture
def ends() -> Iterator[list[Executor]]:
    """Executors that are ended after the test."""
    made: list[Executor] = []
    yield made
    for each in made:
        each.end()


class Batch:
    """A batch of 6 one-token rows of a model; the first executor has rows 4 and 1."""

    def __init__(self, executors: dict[int, list[int]] | None = None) -> None:
        self.rows = {0: [4, 1]} if executors is None else executors
        self.split = batch(self.rows).handle
        both = torch.randn(6, 4, 4)
        self.query, self.key, self.value = both[:, :2], both[:, 2:3], both[:, 3:4]
        self.output = torch.full((6, 2, 4), 7.0)

    def layer(self, transport: Steps, layer: int) -> int:
        """Run a layer; return the executors that failed."""
        transport.send(layer, self.query, self.key, self.value)
        return transport.receive(layer, self.output)

    def is_right(self) -> bool:
        """Whether the offloaded rows are what they should be, and no other row was touched."""
        mine = [row for rows in self.rows.values() for row in rows]
        others = [row for row in range(6) if row not in mine]
        right = torch.equal(self.output[mine], (self.query + self.key * self.value)[mine])
        return right and bool((self.output[others] == 7).all())


def step(transport: Steps, channel: CollectiveDecodeChannel, budget_s: tuple[float, float] = (5.0, 5.0)) -> list[int]:
    """Run a step; return which executors failed in each layer."""
    whole = Batch()
    transport.begin(whole.split, {0: channel}, budget_s)
    failed = [whole.layer(transport, layer) for layer in range(LAYERS)]
    assert any(failed) or whole.is_right()
    return failed


def test_a_steps_plan_and_rows_cross_and_the_outputs_come_back(ends: list[Executor]) -> None:
    ends.append(other := Executor())
    transport = Steps(SHAPE)
    for _ in range(3):
        assert step(transport, other.channel) == [0] * LAYERS
        rows, plan = other.hear()  # type: ignore[misc]
        assert rows == 2
        assert plan["query_start_loc"].tolist() == [0, 1, 2]
        assert plan["seq_lens"].tolist() == [5, 5]
        assert plan["block_table"].tolist() == [[1, 1, 1]] * 2 or plan["block_table"][:, 0].tolist() == [1, 1]
    rows, layers, busy_ns = other.channel.counters
    assert (rows, layers) == (3 * 2 * LAYERS, 3 * LAYERS)
    assert busy_ns > 0


def test_steps_may_be_of_different_sizes(ends: list[Executor]) -> None:
    ends.append(other := Executor())
    transport = Steps(SHAPE)
    for rows in ([0], [0, 1, 2], [5, 0, 3, 2], [1]):
        whole = Batch({0: rows})
        transport.begin(whole.split, {0: other.channel}, (5.0, 5.0))
        assert [whole.layer(transport, layer) for layer in range(LAYERS)] == [0] * LAYERS
        assert whole.is_right()


def test_a_step_may_have_executors_on_this_host_and_on_others(ends: list[Executor]) -> None:
    ends += [first := Executor(), second := Executor()]
    _, near, near_end = channels(layers=LAYERS)
    transport, whole = Steps(SHAPE), Batch({0: [4], 1: [2, 5], 2: [0]})
    thread = serve(near_end, LAYERS)
    transport.begin(whole.split, {0: first.channel, 1: near, 2: second.channel}, (5.0, 5.0))
    assert [whole.layer(transport, layer) for layer in range(LAYERS)] == [0] * LAYERS
    thread.join()
    assert whole.is_right()


def test_without_executors_on_other_hosts_a_layer_is_the_native_call_itself() -> None:
    transport = Steps(SHAPE)
    _, near, near_end = channels()
    transport.begin(Batch().split, {0: near}, (5.0, 5.0))
    assert transport.send == transport._near.send
    assert transport.receive == transport._near.receive
    near_end.stop()


def test_waiting_for_another_host_is_no_local_attention(ends: list[Executor]) -> None:
    ends.append(other := Executor(step=1, layer=1, sleep=0.3))
    transport, whole = Steps(SHAPE), Batch()
    transport.begin(whole.split, {0: other.channel}, (5.0, 5.0))
    for layer in range(LAYERS):
        transport.send(layer, whole.query, whole.key, whole.value)
        time.sleep(0.02)
        transport.receive(layer, whole.output)
    local_ns, waiting_ns = transport.times_ns
    assert 0.06e9 <= local_ns < 0.2e9
    assert waiting_ns > 0.25e9


def test_an_executor_that_is_late_is_given_up_by_both_ends(ends: list[Executor]) -> None:
    ends.append(other := Executor(step=2, layer=1, sleep=1.0))
    transport = Steps(SHAPE)
    assert step(transport, other.channel) == [0] * LAYERS
    whole = Batch()
    transport.begin(whole.split, {0: other.channel}, (0.2, 0.2))
    assert whole.layer(transport, 0) == 0
    began = time.monotonic()
    assert whole.layer(transport, 1) == 1
    assert time.monotonic() - began < 0.6
    assert not whole.output[[4, 1]].any(), "its rows are zero"
    assert whole.layer(transport, 2) == 0, "reported once"
    assert not whole.output[[4, 1]].any()
    heard = [other.hear() for _ in range(4)]
    assert str(heard[2]).startswith("Disconnected"), "its late answer reached nobody"
    assert heard[3] == "closed"
    assert step(transport, other.channel) == [1, 0, 0], "the pair is over: no later step goes over it"


def test_an_executor_that_ended_is_noticed_long_before_the_timeout(ends: list[Executor]) -> None:
    ends.append(other := Executor(step=1, layer=1, die=1))
    transport = Steps(SHAPE)
    began = time.monotonic()
    assert step(transport, other.channel, (60, 60)) == [0, 1, 0]
    assert time.monotonic() - began < 5


def test_an_executor_that_ended_between_steps_costs_the_next_one_its_rows(ends: list[Executor]) -> None:
    ends.append(other := Executor())
    transport = Steps(SHAPE)
    assert step(transport, other.channel) == [0] * LAYERS
    other.process.kill()
    other.process.join()
    assert step(transport, other.channel) == [1, 0, 0]


def test_after_a_failure_a_new_group_serves(ends: list[Executor]) -> None:
    ends.append(first := Executor(step=1, layer=0, die=1))
    transport = Steps(SHAPE)
    assert step(transport, first.channel) == [1, 0, 0]
    ends.append(second := Executor())
    assert second.channel.epoch != first.channel.epoch
    assert step(transport, second.channel) == [0] * LAYERS


def test_an_executor_of_another_life_refuses_the_plan(ends: list[Executor]) -> None:
    ends.append(other := Executor(epoch=7))
    assert step(Steps(SHAPE), other.channel) == [1, 0, 0]
    assert other.hear() == "AdrenalineError: step plan does not fit its channel"


@pytest.mark.parametrize("more", [1, -1, 1 << 12, 1 << 48], ids=["layer", "layer before", "step", "life"])
def test_an_answer_to_another_layer_step_or_life_is_not_believed(ends: list[Executor], more: int) -> None:
    ends.append(other := Executor(step=1, layer=1, announce=more))
    assert step(Steps(SHAPE), other.channel) == [0, 1, 0]


def test_a_plan_beyond_the_kv_cache_is_refused_by_the_executors_own_check(ends: list[Executor]) -> None:
    ends.append(other := Executor())
    channel = other.channel
    begin, table = channel.begin, channel._memory.array("block_table", (6,), torch.int32)

    def corrupted() -> None:
        table.fill_(BLOCKS)
        begin()

    channel.begin = corrupted  # type: ignore[method-assign]
    assert step(Steps(SHAPE), channel) == [1, 0, 0]
    assert other.hear() == "AdrenalineError: step plan points outside the KV cache"


def test_a_step_that_was_left_ends_the_channel_at_the_next_one(ends: list[Executor]) -> None:
    ends.append(other := Executor())
    transport, whole = Steps(SHAPE), Batch()
    transport.begin(whole.split, {0: other.channel}, (5.0, 5.0))
    assert whole.layer(transport, 0) == 0
    assert step(transport, other.channel) == [1, 0, 0]


def test_executors_that_hang_together_cost_a_step_their_timeout_once(
    ends: list[Executor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(steps, "GRACE_S", 0.05)
    ends += [Executor(step=1, layer=1, sleep=3.0) for _ in range(2)]
    transport, whole = Steps(SHAPE), Batch({0: [4], 1: [1]})
    transport.begin(whole.split, {n: each.channel for n, each in enumerate(ends)}, (0.5, 0.5))
    assert whole.layer(transport, 0) == 0
    began = time.monotonic()
    assert whole.layer(transport, 1) == 3
    assert time.monotonic() - began < 0.9


# The process group itself


def pairs() -> tuple[Pair, Pair]:
    """Both ends of a process group, in this process."""
    first, second = Pair(0, "lo"), Pair(1, "lo")
    thread = threading.Thread(target=second.connect, args=(first.contact,))
    thread.start()
    first.connect(second.contact)
    thread.join()
    return first, second


def test_a_wait_without_end_is_ended_by_an_abort_of_either_end() -> None:
    for aborted in (0, 1):
        ends = pairs()
        expected = ends[1].expect(torch.zeros(8, dtype=torch.uint8))
        ended = threading.Event()

        def wait(expected: object = expected, ended: threading.Event = ended) -> None:
            with pytest.raises(Disconnected):
                Pair.receive(expected)
            ended.set()

        threading.Thread(target=wait, daemon=True).start()
        time.sleep(0.1)
        assert not ended.is_set()
        ends[aborted].abort()
        assert ended.wait(5)
        for each in ends:
            each.close()


def test_a_peer_that_never_connects_is_waited_for_only_so_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pair, "CONNECT_S", 0.5)
    first, second = Pair(0, "lo"), Pair(1, "lo")
    second.close()
    second._maker.join()
    began = time.monotonic()
    with pytest.raises(Disconnected):
        first.connect(second.contact)
    assert time.monotonic() - began < 3
    first.close()


def test_a_peer_that_says_nothing_of_itself_is_waited_for_only_so_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pair, "CONNECT_S", 0.5)
    first = Pair(0, "lo")
    with pytest.raises(Disconnected, match="did not say where it is"):
        first.connect(messages.Contact("127.0.0.1", 1, {}))
    first.close()


def test_it_listens_at_the_named_interface_only() -> None:
    first = Pair(0, "lo")
    with socket.socket() as probe:
        probe.connect(("127.0.0.1", first.contact.port))
    assert first.contact.host == "127.0.0.1"
    first.close()
    with pytest.raises(AdrenalineError, match="no interface nothing0"):
        Pair(0, "nothing0")


def test_nothing_is_left_behind() -> None:
    def count() -> tuple[int, int]:
        return len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))

    for each in pairs():
        each.close()
    gc.collect()  # what earlier tests left to be collected would go in the middle of this one
    before = count()
    for _ in range(5):
        for each in pairs():
            each.close()
    assert count() == before


def test_connections_notice_a_host_that_fell_silent() -> None:
    ends = pairs()
    for end in ends:
        assert end._socket is not None
        assert end._socket.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
        assert end._socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 5000
        end.close()
