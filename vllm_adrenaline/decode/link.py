"""A decode worker's link to one attention executor. It attaches at start-up, and again after every failure.

After a failure a thread of its own sees to it that the executor lets go of the channel that was given up, and has it
killed if it does not. Until then the executor may still write into blocks of ours, and so they are nobody's. Then the
thread attaches anew, tries the new channel with a step of one row (decode/probe.py), and hands it over.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections.abc import Callable
from typing import TypeVar

import zmq

from vllm_adrenaline.control import addresses, messages, sockets
from vllm_adrenaline.decode import probe
from vllm_adrenaline.engine.setup import executors_of, is_far, no_executors, out_of_sight
from vllm_adrenaline.errors import AdrenalineError
from vllm_adrenaline.native.cuda_channel import ChannelKernels
from vllm_adrenaline.placement.breaker import Breaker
from vllm_adrenaline.system import descriptors
from vllm_adrenaline.system.process import PeerProcess
from vllm_adrenaline.transport.collective import CollectiveDecodeChannel
from vllm_adrenaline.transport.gpu import GpuDecodeChannel, current_device, use_apart
from vllm_adrenaline.transport.shape import Shape
from vllm_adrenaline.transport.shm import ShmDecodeChannel

logger = logging.getLogger("vllm.adrenaline")

T = TypeVar("T")

ANSWER_S = 5.0
"""How long an answer is waited for."""
LET_GO_S = 2.0
"""How long an executor may take to let go of a channel that was given up, until its prefill engine is to kill it. Steps
do not wait for that."""
WRITING_POLL_S = 0.01
"""How often is looked whether it has let go."""
RETRY_S, SOON_S = 1.0, 0.2
"""Between two attempts to attach: after a failure, and at start-up."""
WARM_UP_S = 60.0
"""How long an executor may take for its first step, which warms it up. Nobody waits for it yet."""


class Unfit(AdrenalineError):
    """An executor attaches, and does not serve a step."""


class NoAnswer(AdrenalineError):
    """A prefill engine or its executor does not answer. It may not have started yet."""


def until_answered(ask: Callable[[], T], deadline: float) -> T:
    """Return what `ask` returns, once it raises NoAnswer no more. Raises that after `deadline` (seconds, monotonic)."""
    while True:
        try:
            return ask()
        except NoAnswer:
            if time.monotonic() > deadline:
                raise
            time.sleep(SOON_S)


class Link:
    """The link to the executor of our rank behind one prefill engine.

    Attributes:
        address: where the prefill engine listens.
        layers: names of the attention layers, in the order of their numbers.
        shape: of the channel.
        timeout_s: how long a step of one row may take an executor that is to be used again, in seconds.
        channel: None while we are not attached. A step that finds it so counts the executor's rows as failed.
        pid: the executor's process, when we attached last.
        is_writing: whether it may still write for a channel that we gave up.
        is_far: whether the executor is on another host, or as far away: no memory is shared with it.
        num_blocks, executors: what the prefill engine said last of itself, and of its executors (executors_of).
    """

    def __init__(
        self,
        address: str,
        identity: messages.Identity,
        engine: str,
        rank: int,
        layers: list[str],
        shape: Shape,
        timeout_s: float,
        interface: str = "",
        kernels: ChannelKernels | None = None,
    ) -> None:
        """Describe who attaches to whom.

        Args:
            address: where the prefill engine listens.
            identity, engine, rank: of our engine, its life, and this worker's rank.
            layers, shape, timeout_s: as in the attributes.
            interface: the network interface over which executors on other hosts are reached; empty for none.
            kernels: of channels through GPU memory, for a worker on a GPU; None for one on CPU.
        """
        self.address, self.layers, self.shape, self.timeout_s = address, layers, shape, timeout_s
        self._identity, self._engine, self._rank = identity, engine, rank
        self._interface, self._kernels = interface, kernels
        self._device = -1 if kernels is None else current_device()
        self.channel: ShmDecodeChannel | CollectiveDecodeChannel | None = None
        self.is_far = False
        self._process: PeerProcess | None = None
        self.pid = self.num_blocks = 0
        self.executors = ""
        self.is_writing = False
        self._hung = 0
        self._before = (0, 0, 0)  # what the executor had attended when we began to use the channel
        self._breaker = Breaker()

    @property
    def attended(self) -> tuple[int, int, int]:
        """What the executor attended since it is used: rows x layers, layers, nanoseconds. 0 while it is not."""
        channel, before = self.channel, self._before
        if channel is None:
            return 0, 0, 0
        rows, layers, busy_ns = channel.counters
        return rows - before[0], layers - before[1], busy_ns - before[2]

    def take_hung(self) -> int:
        """Return the executor's process if it is to be killed, for it does not let go; once. 0: nothing is."""
        hung, self._hung = self._hung, 0
        return hung

    def attach(self, budget_s: tuple[float, float] | None = None) -> None:
        """Find the executor of our rank through its prefill engine, attach, and have it serve a step of one row.

        `budget_s`: of that step, as in StepTransport.begin. None: what an executor is granted that is used again. One
        that does not serve it is waited for then until it has let go, and killed if that takes long.

        Raises:
            NoAnswer: one of the two does not answer.
            Unfit: the executor does not serve the step.
            AdrenalineError: one of the two refuses us, or has other layers.
            OSError, zmq.ZMQError: the executor has ended meanwhile, or it cannot be talked to.
        """
        executor = self._find()
        channel = self._attach_far(executor) if self.is_far else self._attach_near(executor)
        is_fit = False
        try:
            is_fit = probe.answers(channel, self.shape, self.layers, budget_s or (self.timeout_s, self.timeout_s))
        finally:
            if not is_fit:
                channel.leave()
                if budget_s is None:
                    self._let_go_of(channel)
                else:  # at the start nothing here is of use to us yet: it may hang, and we say so
                    self._close(channel)
        if not is_fit:
            raise Unfit(f"the attention executor behind {self.address} does not answer in time")
        self._before = channel.counters
        self.channel = channel

    def _attach_near(self, executor: str) -> ShmDecodeChannel:
        """Attach to an executor on this host, over shared memory, and GPU memory where we are on a GPU."""
        channel, process = self._make_channel(), None
        cpus = sorted(os.sched_getaffinity(0))
        try:
            token, theirs = descriptors.introduce(addresses.for_descriptors(executor), [channel.fd])
            process = PeerProcess(theirs)
            plans = messages.MemoryFile(token, cpus)
            if isinstance(channel, GpuDecodeChannel):
                answer = self._ask_to_attach(executor, messages.GpuMemory(plans, channel.inbox), channel.epoch)
                if answer.inbox is None:
                    raise AdrenalineError(f"the attention executor at {executor} does not say where it is sent to")
                channel.connect(answer.inbox)
            else:
                answer = self._ask_to_attach(executor, plans, channel.epoch)
        except BaseException as error:
            channel.leave()  # it may have been attached, and would be served for as long as we live
            channel.close()
            if process is not None:
                process.close()
            if isinstance(error, descriptors.Unreachable):
                raise NoAnswer(f"the attention executor at {executor} does not answer: {error}") from None
            raise
        self._process, self.pid = process, answer.pid
        channel.watch(process.folder, process.pidfd, shared_core=bool({*cpus} & {*answer.cpus}))
        return channel

    def _make_channel(self) -> ShmDecodeChannel:
        return ShmDecodeChannel(self.shape) if self._kernels is None else GpuDecodeChannel(self.shape, self._kernels)

    def _attach_far(self, executor: str) -> CollectiveDecodeChannel:
        """Attach to an executor on another host, over a process group."""
        if self._kernels is not None:
            raise AdrenalineError(f"the attention executor at {executor} is out of sight: from a GPU none is used yet")
        channel = CollectiveDecodeChannel(self.shape, self._interface, len(self.layers))
        try:
            answer = self._ask_to_attach(executor, messages.Group(channel.contact), channel.epoch)
            if answer.contact is None:
                raise AdrenalineError(f"the attention executor at {executor} does not say how it is reached")
            channel.connect(answer.contact)
            self.pid = answer.pid
        except BaseException:
            channel.close()
            raise
        return channel

    def _ask_to_attach(
        self, executor: str, channel: messages.MemoryFile | messages.Group | messages.GpuMemory, epoch: int
    ) -> messages.Attached:
        shape = self.shape
        sizes = (shape.max_rows, shape.max_tokens, shape.max_blocks)
        attach = messages.Attach(self._identity, self._engine, self._rank, channel, epoch, *sizes)
        answer = sockets.ask_once(executor, attach, ANSWER_S)
        if isinstance(answer, messages.Refused):
            raise AdrenalineError(f"the attention executor at {executor} refuses us: {answer.reason}")
        if not isinstance(answer, messages.Attached):
            raise NoAnswer(f"the attention executor at {executor} does not answer")
        if answer.layers != self.layers:
            raise AdrenalineError(f"the attention executor at {executor} has other layers than this engine")
        return answer

    def attach_until(self, deadline: float) -> None:
        """Attach to an executor that may not have started yet.

        Args:
            deadline: when to give up, in seconds (monotonic).

        Raises:
            AdrenalineError: nobody answered by the deadline, or we are refused, which is raised at once.
        """
        until_answered(lambda: self.attach((WARM_UP_S, WARM_UP_S)), deadline)

    def _find(self) -> str:
        """Ask the prefill engine where the executor of our rank listens."""
        answer = sockets.ask_once(self.address, messages.Hello(self._identity, borrows=False), ANSWER_S)
        if isinstance(answer, messages.Refused):
            raise AdrenalineError(f"the prefill engine at {self.address} refuses us: {answer.reason}")
        if not isinstance(answer, messages.Welcome):
            raise NoAnswer(f"the prefill engine at {self.address} does not answer")
        if self._rank >= len(answer.executors):
            raise no_executors(self.address)
        self.num_blocks = answer.num_blocks
        self.executors, self.is_far = executors_of(self.address, answer), is_far(self.address, answer)
        if self.is_far and not self._interface:
            raise out_of_sight(self.address, answer)
        if not answer.executors[self._rank]:
            raise NoAnswer(f"the attention executor {self._rank} of the prefill engine at {self.address} is starting")
        sockets.check_executors(answer, self.address)
        return answer.executors[self._rank]

    def fail(self) -> None:
        """Give the channel up. A thread of its own has the executor let go, and attaches anew."""
        left, self.channel = self.channel, None
        if left is not None:
            left.leave()
            self.is_writing = not self._is_let_go_of(left, at_once=True)
        if self._has_ended():
            self._breaker, pause = Breaker(), RETRY_S
        else:
            pause = self._breaker.fail(time.monotonic())
        logger.warning(
            "the attention executor behind %s %s: its requests are recomputed here, and it is tried again in %.0f s",
            self.address,
            "is late and given up" if self.is_writing else "has ended, or cannot serve a step",
            pause,
        )
        threading.Thread(target=self._recover, args=(left,), name="adrenaline-reattach", daemon=True).start()

    def _recover(self, left: ShmDecodeChannel | CollectiveDecodeChannel | None) -> None:
        if self._device >= 0:
            use_apart(self._device)
        if left is not None:
            self._let_go_of(left)
        while True:
            time.sleep(max(RETRY_S, self._breaker.retry_at - time.monotonic()))
            try:
                self.attach()
                break  # whether the channel is still used or not: if it failed again, another thread sees to that
            except Unfit as error:
                logger.warning("%s: it is tried again in %.0f s", error, self._breaker.fail(time.monotonic()))
            except (AdrenalineError, OSError, zmq.ZMQError):
                continue
            except Exception:
                logger.exception("cannot attach to the attention executor behind %s; trying again", self.address)
        self._breaker.close(time.monotonic())
        logger.info("the attention executor behind %s answers again, and is used again", self.address)

    def _let_go_of(self, left: ShmDecodeChannel | CollectiveDecodeChannel) -> None:
        """Wait until the executor writes nothing for a channel any more; have it killed if it takes long."""
        kill_at, is_killed = time.monotonic() + LET_GO_S, False
        while not self._is_let_go_of(left):
            self.is_writing = True
            if not is_killed and time.monotonic() >= kill_at:
                logger.warning("the attention executor behind %s does not let go: it is to be killed", self.address)
                self._hung, is_killed = self.pid, True
            time.sleep(WRITING_POLL_S)
        if self._has_ended():
            self._breaker = Breaker()
        self._close(left)
        self.is_writing, self._hung = False, 0

    def _is_let_go_of(self, left: ShmDecodeChannel | CollectiveDecodeChannel, at_once: bool = False) -> bool:
        """Whether the executor writes nothing for a channel any more. `at_once`: ask nobody who must answer first."""
        if isinstance(left, ShmDecodeChannel):
            return left.is_closed or self._has_ended()
        if at_once:
            return False
        # One that was started again never knew the channel, and says so, too.
        with contextlib.suppress(AdrenalineError, zmq.ZMQError):
            answer = sockets.ask_once(self._find(), messages.Revoke(self._engine, left.epoch), LET_GO_S)
            return answer == messages.Revoked(self._engine, left.epoch)
        return False

    def _has_ended(self) -> bool:
        """Whether the executor's process has ended, as far as that can be seen from here."""
        return self._process is not None and self._process.has_ended()

    def close(self) -> None:
        """Detach. The executor keeps its end until it closes that itself, or this process ends."""
        if self.channel is not None:
            left, self.channel = self.channel, None
            left.leave()
            self._close(left)

    def _close(self, left: ShmDecodeChannel | CollectiveDecodeChannel) -> None:
        left.close()
        if self._process is not None:
            self._process.close()
            self._process = None
