"""The attention executor's door, and the prefill engine's hold on its executors: who is let in, who is let go of."""

from __future__ import annotations

import errno
import os
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import zmq

from tests.unit.test_control import IDENTITY, NESTED, eventually
from vllm_adrenaline.attention.kernels import CpuAttention
from vllm_adrenaline.attention.server import ChannelThread, Server
from vllm_adrenaline.attention.spec import ExecutorSpec
from vllm_adrenaline.attention.steps import CpuStepServer
from vllm_adrenaline.control import addresses, messages, sockets
from vllm_adrenaline.control.kv_export import KVExport, LayerSpec
from vllm_adrenaline.decode import link as link_module
from vllm_adrenaline.decode.link import Link, Unfit
from vllm_adrenaline.errors import AdrenalineError
from vllm_adrenaline.kv.space import remote_id
from vllm_adrenaline.placement import breaker
from vllm_adrenaline.prefill import executor_pool
from vllm_adrenaline.system import descriptors, memory_file
from vllm_adrenaline.system.ports import reserve_ports
from vllm_adrenaline.transport.collective import CollectiveDecodeChannel
from vllm_adrenaline.transport.shape import Shape
from vllm_adrenaline.transport.shm import ShmDecodeChannel, ShmSteps
from vllm_adrenaline.transport.split import split_rows
from vllm_adrenaline.transport.steps import Steps

BLOCKS, BLOCK, LAYERS = 4, 32, 2
SHAPE = Shape(4, 4, 2, num_heads=2, num_kv_heads=2, head_size=32, dtype=torch.float32)


def deposit(address: str, file: int, pid: int | None = None) -> bytes:
    """Return the token under which the process `pid`, else this one, passes a channel's file to an executor."""
    pidfd = os.pidfd_open(pid or os.getpid())
    token, theirs = descriptors.exchange(addresses.for_descriptors(address), [pidfd, file])
    descriptors.close([pidfd, *theirs])
    return token


class Decode:
    """A worker of a decode engine, attached to the executor at `address`; `process` is one of its own that can end."""

    def __init__(self, address: str, engine: str, in_process: bool = True) -> None:
        self.channel, self.steps = ShmDecodeChannel(SHAPE), ShmSteps(SHAPE)
        identity, channel = IDENTITY, self.channel
        self.process = None if in_process else subprocess.Popen(["sleep", "100"])
        memory = messages.MemoryFile(deposit(address, channel.fd, self.process and self.process.pid), [0])
        sizes = (SHAPE.max_rows, SHAPE.max_tokens, SHAPE.max_blocks)
        hello = messages.Attach(identity, engine, 0, memory, channel.epoch, *sizes)
        answer = sockets.ask_once(address, hello, 5)
        assert isinstance(answer, messages.Attached), answer
        channel.watch(-1, -1, shared_core=True)

    def begin(self, block: int = 1) -> None:
        """Begin a step of one row of 5 tokens in `block`."""
        table = torch.full((1, 2), remote_id(0, block), dtype=torch.int32)
        starts, lens = torch.tensor([0, 1], dtype=torch.int32), torch.tensor([5], dtype=torch.int32)
        split = split_rows(table, starts, lens, torch.zeros(1, dtype=torch.int64), [], BLOCK)
        self.steps.begin(split.handle, {0: self.channel}, (5.0, 5.0))

    def send(self, index: int) -> None:
        """Send a layer."""
        self.steps.send(index, *[torch.ones(1, 2, 32)] * 3)

    def layer(self, index: int) -> bool:
        """Say whether the executor answers a layer."""
        self.send(index)
        return self.steps.receive(index, torch.ones(1, 2, 32)) == 0

    def end(self) -> None:
        """End the process."""
        assert self.process is not None
        self.process.kill()
        self.process.wait()

    def step(self) -> bool:
        """Say whether the executor answers a whole step."""
        self.begin()
        return all(self.layer(index) for index in range(LAYERS))


@contextmanager
def executor_at(address: str, interface: str = "") -> Iterator[str]:
    """An executor that serves until the context ends, other hosts over this interface."""
    layer_bytes = 4 * BLOCKS * 2 * 2 * BLOCK * 32
    fd = memory_file.create("kv", LAYERS * layer_bytes)
    layers = [LayerSpec(str(index), index * layer_bytes, 1.0) for index in range(LAYERS)]
    strides = [2 * 2 * BLOCK * 32, 2 * BLOCK * 32, 32, 1]
    kv = KVExport(LAYERS * layer_bytes, [BLOCKS, 2, 2 * BLOCK, 32], strides, "float32", "vec", 2, layers, [0], 1)
    server = Server(ExecutorSpec(0, address, IDENTITY, kv, fd, [0], 1, 5.0, interface=interface))
    threading.Thread(target=server.serve, daemon=True).start()
    yield address


@pytest.fixture
def address(tmp_path: Path) -> Iterator[str]:
    """Where an executor listens that serves for the time of a test."""
    with executor_at(f"ipc://{tmp_path}/e") as found:
        yield found


@pytest.fixture
def networked(tmp_path: Path) -> Iterator[str]:
    """Where an executor listens that serves other hosts, too."""
    with executor_at(f"ipc://{tmp_path}/e", "lo") as found:
        yield found


def test_one_decode_engine_is_let_go_of_and_another_served_as_before(address: str) -> None:
    first, second, other = Decode(address, "a"), Decode(address, "a"), Decode(address, "b")
    assert first.step()
    first.begin()  # it is in the middle of a step
    assert first.layer(0)
    assert sockets.ask_once(address, messages.Revoke("a"), 5) == messages.Revoked("a")
    began = time.monotonic()
    assert not first.layer(1)
    assert not second.step()
    assert time.monotonic() - began < 2, "it learns that at once"
    assert other.step()
    assert Decode(address, "a").step(), "it may come back"


def test_a_step_that_cannot_be_served_costs_its_own_decode_engine_its_channel(address: str) -> None:
    wrong, other = Decode(address, "a"), Decode(address, "b")
    wrong.begin(block=BLOCKS)  # beyond the KV cache
    began = time.monotonic()
    assert not wrong.layer(0)
    assert time.monotonic() - began < 2
    assert wrong.channel.is_closed, "nothing is written for it any more, so the executor need not be killed"
    assert other.step()


def test_an_executor_that_cannot_let_go_of_a_decode_engine_ends(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def close(_: Any) -> None:
        raise RuntimeError("an illegal memory access was encountered")

    ended: list[int] = []
    monkeypatch.setattr(os, "_exit", ended.append)
    monkeypatch.setattr(CpuStepServer, "close", close)
    Decode(address, "a").channel.leave()
    eventually(lambda: ended == [1])


class Kernel:
    """Attention that does not come back before it `may_go`."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.entered, self.may_go = threading.Event(), threading.Event()
        attend = CpuAttention.layer

        def layer(*args: Any) -> None:
            self.entered.set()
            assert self.may_go.wait(20)
            attend(*args)

        patch.setattr(CpuAttention, "layer", layer)


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Iterator[Kernel]:
    made = Kernel(monkeypatch)
    yield made
    made.may_go.set()


@pytest.mark.parametrize("ends", [False, True])
def test_who_is_attended_for_is_let_go_of_only_when_the_kernel_has_come_back(
    address: str, kernel: Kernel, ends: bool
) -> None:
    decode = Decode(address, "a", in_process=not ends)
    decode.begin()
    decode.send(0)
    assert kernel.entered.wait(5)
    if ends:
        decode.end()
        for _ in range(2):  # by now the executor has noticed
            assert sockets.ask_once(address, messages.Revoke("nobody"), 5) == messages.Revoked("nobody")
    asking = sockets.connect(address)
    asking.send(messages.encode(messages.Revoke("a")))
    assert not asking.poll(300), "it still writes into blocks that would be free"
    assert not decode.channel.is_closed, "a decode engine would give the blocks back"
    kernel.may_go.set()
    assert asking.poll(5000)
    assert messages.decode(asking.recv()) == messages.Revoked("a")
    assert decode.channel.is_closed
    asking.close()


def test_a_worker_that_ends_while_it_is_let_go_of_ends_no_executor(
    address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    busy, go_on, answer = threading.Event(), threading.Event(), sockets.answer

    def slow(*args: Any) -> None:
        busy.set()
        assert go_on.wait(20)
        answer(*args)

    decode, asking = Decode(address, "a", in_process=False), sockets.connect(address)
    monkeypatch.setattr(sockets, "answer", slow)
    asking.send(messages.encode(messages.Revoke("nobody")))
    assert busy.wait(5)
    asking.send(messages.encode(messages.Revoke("a")))  # both are there when the executor looks again
    decode.end()
    time.sleep(0.1)
    go_on.set()
    for engine in ("nobody", "a"):
        assert asking.poll(5000), "the executor answers nobody any more"
        assert messages.decode(asking.recv()) == messages.Revoked(engine)
    assert Decode(address, "b").step()
    asking.close()


def test_an_attachment_that_fails_in_an_unforeseen_way_is_refused_and_others_are_served(
    address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = Decode(address, "b")
    with monkeypatch.context() as patch:
        patch.setattr(memory_file, "check", lambda *_: {}["memory"])
        memory = messages.MemoryFile(deposit(address, 0), [0])
        hello = messages.Attach(IDENTITY, "a", 0, memory, 1, 4, 4, 2)
        assert isinstance(sockets.ask_once(address, hello, 5), messages.Refused)
    assert other.step()


def test_a_worker_for_which_no_thread_can_be_started_is_refused_and_others_are_served(
    address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_thread(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(ChannelThread, "start", no_thread)
        with pytest.raises(AssertionError, match="can't start new thread"):
            Decode(address, "a")
    assert Decode(address, "b").step()


def test_an_executor_survives_whatever_it_is_sent(address: str) -> None:
    socket = sockets.connect(address)
    for frames in ([NESTED], [b""], [b"a", b"b"], [messages.encode(messages.Leave())]):
        socket.send_multipart(frames)
    assert sockets.ask(socket, messages.Revoke("nobody"), 5) == messages.Revoked("nobody")
    assert Decode(address, "a").step()


def test_channels_that_failed_do_not_fill_an_executor(address: str) -> None:
    for _ in range(80):
        decode = Decode(address, "a")
        decode.begin(block=BLOCKS)
        assert not decode.layer(0)
    assert Decode(address, "a").step()


class Executor:
    """An executor process as the prefill engine sees it; what it says to Revoke is the test's."""

    def __init__(self, address: str, answers: Callable[[str], messages.Message | None]) -> None:
        self._socket, self.address = sockets.bind(address)
        self._answers, self.killed, self.pid = answers, False, 1
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        peer, frame = self._socket.recv_multipart()
        message = messages.decode(frame)
        assert isinstance(message, messages.Revoke)
        if (answer := self._answers(message.engine)) is not None:
            sockets.answer(self._socket, peer, answer)

    def kill(self) -> None:
        self.killed = True


def pool_of(processes: list[Any]) -> executor_pool.ExecutorPool:
    """Return a pool of processes that were not started by it."""
    pool = object.__new__(executor_pool.ExecutorPool)
    pool.processes, pool._stopping = processes, threading.Event()
    return pool


def test_executors_that_acknowledge_live_and_deaf_ones_are_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(executor_pool, "REVOKE_S", 0.3)
    prompt = Executor(f"ipc://{tmp_path}/0", messages.Revoked)
    deaf = Executor(f"ipc://{tmp_path}/1", lambda _: None)
    confused = Executor(f"ipc://{tmp_path}/2", lambda _: messages.Revoked("another"))
    starting = SimpleNamespace(address="", killed=False)
    processes = [prompt, deaf, confused, starting]
    began = time.monotonic()
    pool_of(processes).revoke("a")
    assert time.monotonic() - began < 2
    assert [each.killed for each in processes] == [False, True, True, False]


def test_an_executor_that_cannot_even_be_asked_is_killed_and_the_others_are_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = (Executor(f"ipc://{tmp_path}/{i}", messages.Revoked) for i in range(2))
    connect = sockets.connect

    def too_many_files(address: str) -> zmq.Socket[bytes]:
        if address == first.address:
            raise zmq.ZMQError(errno.EMFILE)
        return connect(address)

    monkeypatch.setattr(sockets, "connect", too_many_files)
    pool_of([first, second]).revoke("a")
    assert (first.killed, second.killed) == (True, False)


def test_a_pool_that_is_stopped_has_nobody_who_could_write(tmp_path: Path) -> None:
    """vLLM stops executors before the scheduler: what decode engines still ask for meanwhile is not an error."""
    executor = Executor(f"ipc://{tmp_path}/0", lambda _: None)
    executor.pid = 7
    pool = pool_of([executor])
    pool._stopping.set()
    began = time.monotonic()
    pool.kill([7])
    pool.revoke("a")
    assert time.monotonic() - began < 1
    assert not executor.killed


class Clock:
    """Time that passes when somebody sleeps, or when a process runs."""

    def __init__(self) -> None:
        self.now, self.slept = 0.0, list[float]()

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds


@pytest.mark.parametrize(
    "failure", [AdrenalineError("it hangs as it starts, and was killed"), RuntimeError("can't start new thread")]
)
def test_only_health_makes_the_restart_of_an_executor_prompt_again(
    failure: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, done = Clock(), threading.Event()
    lives = iter([(1, 5), (1, 5), (1, 100), (1, 5), (119, 0), (1, 5), (1, 5)])  # seconds to be ready, and from then on

    class Process:
        pid = 1

        def __init__(self, spec: object) -> None:
            self.spec, self.left = spec, 0
            if (life := next(lives, None)) is None:
                done.set()
                threading.Event().wait()
            self.starting, self.lives = life

        def wait_ready(self) -> None:
            clock.now += self.starting
            if not self.lives:
                raise failure

        def kill(self) -> None:
            pass

        def wait(self) -> int:
            clock.now += self.lives
            return -9

    monkeypatch.setattr(executor_pool, "time", clock)
    monkeypatch.setattr(executor_pool, "ExecutorProcess", Process)
    kv = KVExport(1, [1], [1], "float32", "vec", 1, [], [0], 1)
    executor_pool.ExecutorPool([ExecutorSpec(0, "", IDENTITY, kv, 0, [0], 1, 1.0)])
    assert done.wait(5)
    assert clock.slept == [0.5, 1, 0.5, 1, 2, 4, 8]


def test_what_executors_run_on_fits_a_message_on_any_machine() -> None:
    def specs(ranks: int, cores: list[int]) -> list[ExecutorSpec]:
        kv = KVExport(1, [1], [1], "float32", "vec", 1, [], cores, 1)
        return [ExecutorSpec(rank, "", IDENTITY, kv, 0, cores, len(cores), 1.0) for rank in range(ranks)]

    assert executor_pool.in_words(specs(1, [0, 1, 2, 3, 8])) == "5 thread(s) on cores 0-3,8, share 1"
    for ranks, cores in ((1, list(range(512))), (1, list(range(0, 1024, 2))), (64, list(range(0, 512, 3)))):
        words = executor_pool.in_words(specs(ranks, cores))
        welcome = messages.Welcome("e", "h", 1, 1, [], words, 60.0)
        assert messages.decode(messages.encode(welcome)) == welcome
        assert words == executor_pool.in_words(specs(ranks, cores)), "profiles are kept by it"
        assert words != executor_pool.in_words(specs(ranks, [*cores, 2000]))


# Decode workers on other hosts


@contextmanager
def linked(address: str, monkeypatch: pytest.MonkeyPatch, engine: str, interface: str = "lo") -> Iterator[Link]:
    """The link of a decode worker to an executor of which it believes that it is on another host."""
    welcome = messages.Welcome("p", "h", 1, BLOCKS, [address], "", 60.0, vicinity="another host")
    with monkeypatch.context() as patch:
        patch.setattr(sockets, "ask_once", lambda *_: welcome)
        link = Link("tcp://p:1", IDENTITY, engine, 0, [str(n) for n in range(LAYERS)], SHAPE, 5.0, interface)
        executor = link._find()
    monkeypatch.setattr(link, "_find", lambda: executor)
    try:
        yield link
    finally:
        link.close()


def lets_go(link: Link) -> bool:
    """Say whether the executor writes nothing any more for the channel of a link."""
    assert link.channel is not None
    return link._is_let_go_of(link.channel)


def far_step(link: Link, block: int = 1, budget_s: float = 5.0) -> list[int]:
    """Run a step over a link; return which executors failed in each layer."""
    table = torch.full((1, 2), remote_id(0, block), dtype=torch.int32)
    starts, lens = torch.tensor([0, 1], dtype=torch.int32), torch.tensor([5], dtype=torch.int32)
    steps = Steps(SHAPE)
    split = split_rows(table, starts, lens, torch.zeros(1, dtype=torch.int64), [], BLOCK)
    steps.begin(split.handle, {0: link.channel}, (budget_s, budget_s))
    failed = []
    for layer in range(LAYERS):
        steps.send(layer, *[torch.ones(1, 2, 32)] * 3)
        failed.append(steps.receive(layer, torch.ones(1, 2, 32)))
    return failed


def test_a_worker_on_another_host_is_served_over_the_network_beside_one_on_this_host(
    networked: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    near = Decode(networked, "b")
    with linked(networked, monkeypatch, "a") as link:
        assert link.is_far
        link.attach()
        assert isinstance(link.channel, CollectiveDecodeChannel)
        assert far_step(link) == [0, 0]
        assert near.step()
        assert far_step(link) == [0, 0]
        assert link.pid == os.getpid()


def test_a_decode_engine_on_another_host_that_is_let_go_of_may_come_back(
    networked: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with linked(networked, monkeypatch, "a") as link, linked(networked, monkeypatch, "b") as other:
        link.attach()
        other.attach()
        assert far_step(link) == [0, 0]
        assert sockets.ask_once(networked, messages.Revoke("a"), 5) == messages.Revoked("a")
        began = time.monotonic()
        assert far_step(link) == [1, 0]
        assert time.monotonic() - began < 2, "it learns that at once"
        assert lets_go(link), "so the executor need not be killed"
        assert far_step(other) == [0, 0]
        link.close()
        link.attach()
        assert far_step(link) == [0, 0]


def test_a_step_that_cannot_be_served_costs_another_host_its_channel_and_nobody_else(
    networked: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with linked(networked, monkeypatch, "a") as link, linked(networked, monkeypatch, "a") as other:
        link.attach()
        other.attach()
        assert far_step(link, block=BLOCKS) == [1, 0]
        assert lets_go(link)
        assert far_step(other) == [0, 0], "of the same decode engine, but another channel"


def test_an_executor_in_a_step_lets_go_only_when_it_has_left_it(
    networked: str, monkeypatch: pytest.MonkeyPatch, kernel: Kernel
) -> None:
    monkeypatch.setattr(link_module, "LET_GO_S", 0.2)
    with linked(networked, monkeypatch, "a") as link:
        kernel.may_go.set()
        link.attach()
        kernel.may_go.clear()
        assert far_step(link, budget_s=0.2) == [1, 0], "it is late"
        assert not lets_go(link), "it may still write"
        kernel.may_go.set()
        eventually(lambda: lets_go(link))


@pytest.mark.parametrize("far", [False, True], ids=["here", "on another host"])
def test_an_executor_that_is_given_up_is_killed_only_if_it_does_not_let_go_and_is_used_again(
    networked: str, monkeypatch: pytest.MonkeyPatch, kernel: Kernel, far: bool
) -> None:
    for name, seconds in (("LET_GO_S", 0.3), ("RETRY_S", 0.01)):
        monkeypatch.setattr(link_module, name, seconds)
    monkeypatch.setattr(breaker, "MIN_PAUSE_S", 0.01)
    kernel.may_go.set()
    with linked(networked, monkeypatch, "a") as link:
        link.is_far = far
        link.attach()
        assert far_step(link) == [0, 0]
        assert link.attended[:2] == (LAYERS, LAYERS), "the step that tried it does not count"
        kernel.may_go.clear()
        assert far_step(link, budget_s=0.1) == [1, 0]
        link.fail()
        assert link.channel is None
        assert link.is_writing
        assert link.take_hung() == 0
        eventually(lambda: link.take_hung() == os.getpid())
        assert link.is_writing, "it is not dead yet"
        kernel.may_go.set()
        eventually(lambda: not link.is_writing)
        eventually(lambda: link.channel is not None)
        assert link.take_hung() == 0
        assert far_step(link) == [0, 0]


def test_an_executor_that_attaches_but_serves_no_step_is_not_used(
    networked: str, monkeypatch: pytest.MonkeyPatch, kernel: Kernel
) -> None:
    with linked(networked, monkeypatch, "a") as link:
        link.is_far = False
        threading.Timer(0.3, kernel.may_go.set).start()
        with pytest.raises(Unfit, match="does not answer in time"):
            link.attach((0.05, 0.05))
        assert link.channel is None
        assert not link.is_writing
        link.attach()
        assert far_step(link) == [0, 0]


def test_a_start_does_not_wait_for_an_executor_that_hangs(
    networked: str, monkeypatch: pytest.MonkeyPatch, kernel: Kernel
) -> None:
    monkeypatch.setattr(link_module, "WARM_UP_S", 0.05)
    began = time.monotonic()
    with linked(networked, monkeypatch, "a") as link:
        link.is_far = False
        with pytest.raises(Unfit, match="does not answer in time"):
            link.attach_until(began + 60)
        assert time.monotonic() - began < 5
        kernel.may_go.set()


def test_without_a_network_between_them_two_hosts_learn_which_option_names_it(
    address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with linked(address, monkeypatch, "a") as link, pytest.raises(AdrenalineError, match="--adrenaline-interface"):
        link.attach()
    with (
        pytest.raises(AdrenalineError, match="--adrenaline-interface, here and there"),
        linked(address, monkeypatch, "a", interface=""),
    ):
        pass


def test_an_executor_that_has_not_the_key_of_its_prefill_engine_is_not_talked_to(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    key = "ab" * 32
    for executor in ("tcp://10.0.0.1:5", f"tcp://{'cd' * 32}@10.0.0.1:5"):
        welcome = messages.Welcome("p", "h", 1, BLOCKS, [executor], "", 60.0, vicinity="another host")
        link = Link(f"tcp://{key}@10.0.0.1:1", IDENTITY, "a", 0, ["0"], SHAPE, 5.0, "lo")
        with monkeypatch.context() as patch:
            patch.setattr(sockets, "ask_once", lambda *_, answer=welcome: answer)
            with pytest.raises(AdrenalineError, match="has not its key"):
                link._find()


def test_an_executor_that_a_worker_cannot_use_is_let_go_of(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def serving() -> set[threading.Thread]:
        return {each for each in threading.enumerate() if isinstance(each, ChannelThread)}

    before, link = serving(), Link("p", IDENTITY, "a", 0, ["another layer"], SHAPE, 5.0)
    monkeypatch.setattr(link, "_find", lambda: address)
    with pytest.raises(AdrenalineError, match="other layers"):
        link.attach()
    eventually(lambda: serving() <= before)


def test_a_channel_that_was_not_passed_is_not_looked_for_anywhere_else(address: str) -> None:
    for token in (b"", b"t" * 16):
        attach = messages.Attach(IDENTITY, "a", 0, messages.MemoryFile(token, [0]), 1, 4, 4, 2)
        answer = sockets.ask_once(address, attach, 5)
        assert isinstance(answer, messages.Refused)
        assert "no descriptors were passed" in answer.reason


def test_over_tcp_on_loopback_channels_are_in_shared_memory_too() -> None:
    (port,) = reserve_ports(1)
    with executor_at(f"tcp://127.0.0.1:{port}") as address:
        assert Decode(address.replace("127.0.0.1", "localhost"), "a").step()


def test_what_is_passed_and_is_no_channel_is_refused_and_leaves_nothing_open(address: str) -> None:
    small = os.memfd_create("small")
    before = len(os.listdir("/proc/self/fd"))
    for file in (0, small) * 20:
        memory = messages.MemoryFile(deposit(address, file), [0])
        attach = messages.Attach(IDENTITY, "a", 0, memory, 1, 4, 4, 2)
        assert isinstance(sockets.ask_once(address, attach, 5), messages.Refused)
    eventually(lambda: len(os.listdir("/proc/self/fd")) < before + 10)  # ZMQ closes its own a moment later
    os.close(small)
