"""A decode worker's link to one attention executor. It attaches at start-up, and again after every failure."""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections.abc import Callable
from typing import TypeVar
from urllib.parse import urlsplit

import zmq

from vllm_adrenaline.control import messages, sockets
from vllm_adrenaline.engine.setup import executors_of, is_far, no_executors, on_another_host
from vllm_adrenaline.errors import AdrenalineError
from vllm_adrenaline.system.machine import process_space
from vllm_adrenaline.transport.collective import CollectiveDecodeChannel
from vllm_adrenaline.transport.shape import Shape
from vllm_adrenaline.transport.shm import ShmDecodeChannel

logger = logging.getLogger("vllm.adrenaline")

T = TypeVar("T")

ANSWER_S = 5.0
"""How long an answer is waited for."""
LET_GO_S = 0.5
"""How long an executor on another host may take to say that it has let go of a channel that failed. A step waits."""
RETRY_S, SOON_S = 1.0, 0.2
"""Between two attempts to attach: after a failure, and at start-up."""


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
        timeout_s: how long a layer's output is waited for at most, in seconds.
        channel: None while we are not attached. A step that finds it so counts the executor's rows as failed.
        pid: the executor's process, when we attached last.
        is_far: whether the executor is on another host.
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
    ) -> None:
        """`interface`: the network interface over which executors on other hosts are reached; empty for none."""
        self.address, self.layers, self.shape, self.timeout_s = address, layers, shape, timeout_s
        self._identity, self._engine, self._rank = identity, engine, rank
        self._interface, self._executor = interface, ""
        self.channel: ShmDecodeChannel | CollectiveDecodeChannel | None = None
        self.is_far = False
        self._pidfd = -1
        self.pid = self.num_blocks = 0
        self.executors = ""

    def attach(self) -> None:
        """Find the executor of our rank through its prefill engine, and attach.

        Raises:
            NoAnswer: one of the two does not answer.
            AdrenalineError: one of the two refuses us, or has other layers.
            OSError, zmq.ZMQError: the executor has ended meanwhile, or it cannot be talked to.
        """
        executor = self._find()
        if self.is_far:
            self._attach_far(executor)
        else:
            self._attach_near(executor)

    def _attach_near(self, executor: str) -> None:
        """Attach to an executor on this host, over shared memory."""
        channel = ShmDecodeChannel(self.shape)
        cpus = sorted(os.sched_getaffinity(0))
        try:
            memory = messages.MemoryFile(os.getpid(), channel.fd, process_space(), cpus)
            answer = self._ask_to_attach(executor, memory, channel.epoch)
            self._pidfd = os.pidfd_open(answer.pid)
            self.pid = answer.pid
        except BaseException:
            channel.close()
            raise
        channel.watch(self._pidfd, self.timeout_s, shared_core=bool({*cpus} & {*answer.cpus}))
        self.channel = channel

    def _attach_far(self, executor: str) -> None:
        """Attach to an executor on another host, over a process group."""
        channel = CollectiveDecodeChannel(self.shape, self._interface, len(self.layers))
        try:
            answer = self._ask_to_attach(executor, messages.Group(channel.contact), channel.epoch)
            if answer.contact is None:
                raise AdrenalineError(f"the attention executor at {executor} does not say how it is reached")
            channel.connect(answer.contact, self.timeout_s)
            self.pid = answer.pid
        except BaseException:
            channel.close()
            raise
        self._executor, self.channel = executor, channel

    def _ask_to_attach(
        self, executor: str, channel: messages.MemoryFile | messages.Group, epoch: int
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
        until_answered(self.attach, deadline)

    def _find(self) -> str:
        """Ask the prefill engine where the executor of our rank listens."""
        answer = sockets.ask_once(self.address, messages.Hello(self._identity, borrows=False), ANSWER_S)
        if isinstance(answer, messages.Refused):
            raise AdrenalineError(f"the prefill engine at {self.address} refuses us: {answer.reason}")
        if not isinstance(answer, messages.Welcome):
            raise NoAnswer(f"the prefill engine at {self.address} does not answer")
        if self._rank >= len(answer.executors):
            raise no_executors(self.address)
        self.num_blocks, self.executors, self.is_far = answer.num_blocks, executors_of(answer), is_far(answer)
        if self.is_far and not self._interface:
            raise on_another_host(self.address)
        if not answer.executors[self._rank]:
            raise NoAnswer(f"the attention executor {self._rank} of the prefill engine at {self.address} is starting")
        executor = answer.executors[self._rank]
        if urlsplit(executor).username != urlsplit(self.address).username:
            raise AdrenalineError(f"the prefill engine at {self.address} names an executor that has not its key")
        return executor

    def is_let_go_of(self) -> bool:
        """Whether the executor says that it writes nothing for the present channel any more."""
        if isinstance(self.channel, CollectiveDecodeChannel):
            revoke = messages.Revoke(self._engine, self.channel.epoch)
            with contextlib.suppress(zmq.ZMQError):
                answer = sockets.ask_once(self._executor, revoke, LET_GO_S)
                return answer == messages.Revoked(self._engine, self.channel.epoch)
            return False
        return self.channel is not None and self.channel.is_closed

    def fail(self) -> None:
        """Give the channel up, and attach anew in a thread of its own."""
        self.close()
        threading.Thread(target=self._reattach, name="adrenaline-reattach", daemon=True).start()

    def _reattach(self) -> None:
        while self.channel is None:
            time.sleep(RETRY_S)
            try:
                self.attach()
            except (AdrenalineError, OSError, zmq.ZMQError):
                continue
            except Exception:
                logger.exception("cannot attach to the attention executor behind %s; trying again", self.address)
        logger.info("attached to the attention executor behind %s again", self.address)

    def close(self) -> None:
        """Detach. The executor keeps its end until it closes that itself, or this process ends."""
        if self.channel is not None:
            self.channel.close()
            self.channel = None
        if self._pidfd >= 0:
            os.close(self._pidfd)
            self._pidfd = -1
