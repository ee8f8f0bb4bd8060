"""A decode worker's link to one attention executor. It attaches at start-up, and again after every failure."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable
from typing import TypeVar

import zmq

from vllm_adrenaline.control import messages, sockets
from vllm_adrenaline.engine.setup import no_executors
from vllm_adrenaline.errors import AdrenalineError
from vllm_adrenaline.transport.shm import Shape, ShmDecodeChannel

logger = logging.getLogger("vllm.adrenaline")

T = TypeVar("T")

ANSWER_S = 5.0
"""How long an answer is waited for."""
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
        num_blocks, executor_share: what the prefill engine said last (messages.Welcome).
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
    ) -> None:
        self.address, self.layers, self.shape, self.timeout_s = address, layers, shape, timeout_s
        self._identity, self._engine, self._rank = identity, engine, rank
        self.channel: ShmDecodeChannel | None = None
        self._pidfd = -1
        self.pid = self.num_blocks = 0
        self.executor_share = ""

    def attach(self) -> None:
        """Find the executor of our rank through its prefill engine, and attach.

        Raises:
            NoAnswer: one of the two does not answer.
            AdrenalineError: one of the two refuses us, or has other layers.
            OSError, zmq.ZMQError: the executor has ended meanwhile, or it cannot be talked to.
        """
        executor = self._find()
        channel = ShmDecodeChannel(self.shape)
        cpus = sorted(os.sched_getaffinity(0))
        try:
            answer = sockets.ask_once(
                executor,
                messages.Attach(
                    self._identity,
                    self._engine,
                    self._rank,
                    os.getpid(),
                    channel.fd,
                    channel.epoch,
                    cpus,
                    self.shape.max_rows,
                    self.shape.max_tokens,
                    self.shape.max_blocks,
                ),
                ANSWER_S,
            )
            if isinstance(answer, messages.Refused):
                raise AdrenalineError(f"the attention executor at {executor} refuses us: {answer.reason}")
            if not isinstance(answer, messages.Attached):
                raise NoAnswer(f"the attention executor at {executor} does not answer")
            if answer.layers != self.layers:
                raise AdrenalineError(f"the attention executor at {executor} has other layers than this engine")
            self._pidfd = os.pidfd_open(answer.pid)
            self.pid = answer.pid
        except BaseException:
            channel.close()
            raise
        channel.watch(self._pidfd, self.timeout_s, shared_core=bool({*cpus} & {*answer.cpus}))
        self.channel = channel

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
        self.num_blocks, self.executor_share = answer.num_blocks, answer.executor_share
        if not answer.executors[self._rank]:
            raise NoAnswer(f"the attention executor {self._rank} of the prefill engine at {self.address} is starting")
        return answer.executors[self._rank]

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
