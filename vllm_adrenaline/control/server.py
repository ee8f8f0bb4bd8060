"""The prefill engine's control thread: answers decode engines, in the process of the engine core.

It shares the block pool with vLLM's scheduler thread; `lock` is the fence between the two, held by the scheduler while
it schedules or frees and by this thread for the microseconds that a claim or a lease takes.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections.abc import Callable

import msgspec
import zmq

from vllm_adrenaline.control import messages, sockets
from vllm_adrenaline.prefill.leases import LeaseHolder, LeaseManager

logger = logging.getLogger("vllm.adrenaline")

POLL_MS = 500
FAILED = 70
"""Exit code of an engine core whose control thread ended (EX_SOFTWARE)."""


class ControlServer(threading.Thread):
    """Serves one ROUTER socket until `stop`. `welcome` is computed per answer, for executors may restart. `tick` is
    called twice a second. `kill_executors`: those that failed a decode engine, by process id. `revoke`: return when no
    executor can write for a decode engine any more. `beats`: what each decode engine said last of itself.

    Whatever arrives, the thread goes on; `bad_frames` counts what was no message. If it ends all the same, the engine
    core ends with it: decode engines would wait for it for ever.
    """

    def __init__(
        self,
        address: str,
        identity: messages.Identity,
        leases: LeaseManager,
        lock: threading.RLock,
        welcome: Callable[[], messages.Welcome],
        load: Callable[[], messages.Load],
        tick: Callable[[], None],
        kill_executors: Callable[[list[int]], None],
        revoke: Callable[[str], None],
        end_engine: Callable[[int], None] = os._exit,
    ) -> None:
        super().__init__(name="adrenaline-control", daemon=True)
        self.identity, self.leases, self.lock, self.welcome = identity, leases, lock, welcome
        self.load, self.tick, self.kill_executors, self.revoke = load, tick, kill_executors, revoke
        self.beats: dict[bytes, messages.Heartbeat] = {}
        self.bad_frames = 0
        self._end_engine = end_engine
        self._engines: dict[bytes, str] = {}  # of those that borrow
        self._processes: dict[int, bytes] = {}  # by pidfd
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
                self._depart(self._processes[pidfd], "has ended")
            if self._socket in ready:
                self._serve_one()
            if (now := time.monotonic()) - ticked >= POLL_MS / 1000:
                ticked = now
                try:
                    self.tick()
                except Exception:
                    logger.exception("the executors' share is not adjusted")
                with self.lock:
                    silent = self.leases.silent()
                for name in silent:
                    self._depart(name, "is silent")

    # Decode engines that go

    def _depart(self, borrower: bytes, why: str) -> None:
        """Take back what a decode engine had, when no executor can write for it any more. That is waited for elsewhere:
        other decode engines are answered meanwhile."""
        for pidfd in [fd for fd, name in self._processes.items() if name == borrower]:
            self._poller.unregister(pidfd)
            os.close(pidfd)
            del self._processes[pidfd]
        engine = self._engines.pop(borrower, "")
        self.beats.pop(borrower, None)
        with self.lock:
            if borrower not in self.leases.borrowers:
                return
            left = self.leases.leave(borrower)
        logger.warning("decode engine %s %s: taking back all it had borrowed", engine, why)
        if left is not None:
            threading.Thread(target=self._take_back, args=(left, engine), name="adrenaline-revoke", daemon=True).start()

    def _take_back(self, left: LeaseHolder, engine: str) -> None:
        try:
            self.revoke(engine)
            with self.lock:
                self.leases.evict(left)
        except Exception:
            logger.critical("blocks of decode engine %s stay out: it may still be attended for", engine, exc_info=True)

    def _join(self, borrower: bytes, hello: messages.Hello) -> None:
        """A decode engine says hello. What it had over another connection it does not know of any more."""
        for other in [name for name, engine in self._engines.items() if engine == hello.engine and name != borrower]:
            self._depart(other, "came back")
        with self.lock:
            self.leases.join(borrower)
        if borrower in self._engines:
            return
        self._engines[borrower] = hello.engine
        if hello.pid:
            with contextlib.suppress(OSError):  # it cannot be seen from here: its lease tells when it is gone
                pidfd = os.pidfd_open(hello.pid)
                self._processes[pidfd] = borrower
                self._poller.register(pidfd, zmq.POLLIN)

    # Messages

    def _serve_one(self) -> None:
        frames = self._socket.recv_multipart()
        try:
            borrower, frame = frames
            message = messages.decode(frame)
        except (ValueError, msgspec.DecodeError):
            self.bad_frames += 1
            return
        try:
            answer = self._answer(borrower, message)
        except Exception:
            logger.exception("cannot serve %s", type(message).__name__)
            return
        if answer is not None:
            sockets.answer(self._socket, borrower, answer)

    def _answer(self, borrower: bytes, message: messages.AnyMessage) -> messages.Message | None:
        if isinstance(message, messages.Hello):
            reason = messages.mismatch(self.identity, message.identity, "prefill engine", "decode engine")
            if reason is not None:
                return messages.Refused(reason)
            if message.borrows and not message.engine:
                return messages.Refused("a decode engine that borrows says its name: what it has is taken back by it")
            welcome = self.welcome()
            if message.borrows:
                self._join(borrower, message)
            return welcome
        with self.lock:
            if not self.leases.beat(borrower):
                return messages.Refused("unknown decode engine: say hello first")
        if isinstance(message, messages.Leave):
            self._depart(borrower, "leaves")
            return None
        if isinstance(message, messages.KillExecutors):
            self.kill_executors(message.pids)
            return None
        with self.lock:
            return self._lend(borrower, message)

    def _lend(self, borrower: bytes, message: messages.AnyMessage) -> messages.Message | None:
        lender = self.leases
        if isinstance(message, messages.Claim):
            offer = lender.claim(borrower, message.request)
            if offer is None:
                return messages.ClaimRejected(message.request)
            blocks = [block.block_id for block in offer.blocks]
            return messages.Claimed(message.request, blocks, offer.num_tokens, offer.digest)
        if isinstance(message, messages.Lease):
            return messages.Leased(lender.lease(borrower, message.want))
        if isinstance(message, messages.Drop):
            lender.drop(message.requests)
        if isinstance(message, messages.Release):
            lender.release(borrower, message.requests, message.blocks)
        if isinstance(message, messages.Heartbeat):
            self.beats[borrower] = message
            return self.load()
        return None
