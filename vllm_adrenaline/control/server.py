"""The prefill engine's end of the control plane: a thread in the engine core that answers decode engines.

A handler says what it answers (prefill/lending.py). Here is only what every conversation has: greetings, signs of life,
and who is gone.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable
from typing import Protocol

import zmq

from vllm_adrenaline.control import messages, sockets
from vllm_adrenaline.errors import AdrenalineError
from vllm_adrenaline.system import descriptors

logger = logging.getLogger("vllm.adrenaline")

POLL_MS = 500
"""How long the thread sleeps at most, and the least time between two calls of the handler's `tick`."""
FAILED = 70
"""Exit code of an engine core whose control thread ended (EX_SOFTWARE)."""


class Handler(Protocol):
    """What a prefill engine says and does. The control thread alone calls it. A peer is a connection."""

    def welcome(self, peer: bytes | None) -> messages.Welcome:
        """Return the answer to a decode engine that fits. It is made anew each time, for executors may restart.

        `peer`: who may claim and lease from now on; None for one that only asks.
        """

    def map(self, message: messages.Map, process: int) -> messages.Message:
        """Let a decode worker, of which this is the pidfd, map the KV cache; return how it is read, or why not."""

    def note_sign_of_life(self, peer: bytes) -> bool:
        """Note that a peer said something; return False for one that has not joined, or has left."""

    def answer(self, peer: bytes, message: messages.AnyMessage) -> messages.Message | None:
        """Carry out a message of a peer that has joined; return the answer, if there is one."""

    def silent(self) -> list[bytes]:
        """Return the peers that have said nothing for a lease."""

    def leave(self, peer: bytes, engine: str) -> Callable[[], None] | None:
        """Forget a peer. Return a function that takes back the blocks it has; None if it has none.

        The function is called in a thread of its own. It waits until nobody can write for `engine` any more. Other
        decode engines are answered meanwhile.
        """

    def tick(self) -> None:
        """Do what is to be done from time to time: at most twice a second."""


class ControlServer(threading.Thread):
    """The control thread of a prefill engine. It serves one ROUTER socket until `stop`.

    No message or frame ends the thread. If it ends all the same, the engine core ends with it: decode engines would
    wait for it for ever.

    Attributes:
        address: where it listens; for a TCP address with port `*`, with the port that was found.
        identity: what a decode engine's must be equal to.
        handler: what this prefill engine says and does.
        bad_frames: how many frames came that were no message.
    """

    def __init__(
        self,
        address: str,
        identity: messages.Identity,
        handler: Handler,
        passing: descriptors.Server,
        end_engine: Callable[[int], None] = os._exit,
    ) -> None:
        """Bind `address`. `passing` is stopped with this thread. `end_engine` ends this process with an exit code.

        Raises:
            AdrenalineError: `address` is in use, or cannot be bound.
        """
        super().__init__(name="adrenaline-control", daemon=True)
        self.identity, self.handler, self._passing = identity, handler, passing
        self.bad_frames = 0
        self._end_engine = end_engine
        self._engines: dict[bytes, str] = {}  # decode engines that may claim and lease, by connection
        self._processes: dict[int, bytes] = {}  # their connections, by the pidfd of their engine core
        self._socket, self.address = sockets.bind(address)
        self._poller = zmq.Poller()
        self._poller.register(self._socket, zmq.POLLIN)
        self._stopping = threading.Event()

    def run(self) -> None:
        try:
            self._serve()
        except BaseException:
            if not self._stopping.is_set():
                logger.critical("the control thread of this prefill engine ended, and so does it", exc_info=True)
                self._end_engine(FAILED)
        finally:
            self._passing.stop()
            sockets.unbind(self._socket, self.address)

    def stop(self) -> None:
        """Stop serving and remove the socket."""
        self._stopping.set()
        if self.is_alive():
            self.join(timeout=2 * POLL_MS / 1000)

    def _serve(self) -> None:
        ticked = 0.0
        while not self._stopping.is_set():
            ready = dict(self._poller.poll(POLL_MS))
            # Before messages: one may say that its sender leaves, and close the descriptor that is ready, too.
            for pidfd in self._processes.keys() & ready.keys():
                self._part_with(self._processes[pidfd], "has ended")
            if self._socket in ready:
                self._serve_one()
            if (now := time.monotonic()) - ticked >= POLL_MS / 1000:
                ticked = now
                self._tick()

    def _tick(self) -> None:
        try:
            self.handler.tick()
        except Exception:
            logger.exception("the shares of prefill and decode are not adjusted")
        for peer in self.handler.silent():
            self._part_with(peer, "is silent")

    # Decode engines that come and go

    def _join(self, peer: bytes, hello: messages.Hello) -> None:
        """Take in a decode engine that says hello.

        It may have had another connection before. It does not know of what it had there, so that is taken back.
        """
        for other in [name for name, engine in self._engines.items() if engine == hello.engine and name != peer]:
            self._part_with(other, "came back")
        self._engines[peer] = hello.engine
        if hello.process and peer not in self._processes.values():
            try:
                (pidfd,) = self._passing.take(hello.process, 1)
            except AdrenalineError as error:
                logger.warning("only its silence will show that decode engine %s has gone: %s", hello.engine, error)
                return
            self._processes[pidfd] = peer
            self._poller.register(pidfd, zmq.POLLIN)

    def _part_with(self, peer: bytes, why: str) -> None:
        """Take back what a decode engine had that is gone, or is taken to be, once nobody can write for it."""
        for pidfd in [fd for fd, name in self._processes.items() if name == peer]:
            self._poller.unregister(pidfd)
            os.close(pidfd)
            del self._processes[pidfd]
        engine = self._engines.get(peer)
        if engine is None:
            return
        take_back = self.handler.leave(peer, engine)
        del self._engines[peer]
        logger.warning("decode engine %s %s: taking back all it had borrowed", engine, why)
        if take_back is not None:
            threading.Thread(
                target=self._run_take_back, args=(take_back, engine), name="adrenaline-revoke", daemon=True
            ).start()

    def _run_take_back(self, take_back: Callable[[], None], engine: str) -> None:
        try:
            take_back()
        except Exception:
            logger.critical("blocks of decode engine %s stay out: it may still be attended for", engine, exc_info=True)

    # Messages

    def _serve_one(self) -> None:
        received = sockets.receive(self._socket)
        if received is None:
            self.bad_frames += 1
            return
        peer, message = received
        try:
            answer = self._answer(peer, message)
        except Exception:
            logger.exception("cannot serve %s", type(message).__name__)
            return
        if answer is not None:
            sockets.answer(self._socket, peer, answer)

    def _answer(self, peer: bytes, message: messages.AnyMessage) -> messages.Message | None:
        if isinstance(message, messages.Hello):
            return self._greet(peer, message)
        if isinstance(message, messages.Map):
            reason = messages.mismatch(self.identity, message.identity, "prefill engine", "decode worker")
            return self._map(message) if reason is None else self._refuse(reason)
        is_known = self.handler.note_sign_of_life(peer)
        if not is_known and not isinstance(message, messages.LetGo):  # that is of what was taken from its sender before
            return messages.Refused("unknown decode engine: say hello first")
        if isinstance(message, messages.Leave):
            self._part_with(peer, "leaves")
            return None
        return self.handler.answer(peer, message)

    def _map(self, message: messages.Map) -> messages.Message:
        try:
            (process,) = self._passing.take(message.process, 1)
        except AdrenalineError as error:
            return self._refuse(str(error))
        try:
            return self.handler.map(message, process)
        finally:
            os.close(process)

    def _greet(self, peer: bytes, hello: messages.Hello) -> messages.Message:
        reason = messages.mismatch(self.identity, hello.identity, "prefill engine", "decode engine")
        if reason is not None:
            return self._refuse(reason)
        if hello.borrows and not hello.engine:
            return messages.Refused("a decode engine that borrows says its name: what it has is taken back by it")
        if hello.borrows:
            self._join(peer, hello)
        return self.handler.welcome(peer if hello.borrows else None)

    def _refuse(self, reason: str) -> messages.Refused:
        """Refuse somebody who does not fit, and log why."""
        logger.warning("an engine is refused: %s", reason)
        return sockets.refusal(reason, self.address)
