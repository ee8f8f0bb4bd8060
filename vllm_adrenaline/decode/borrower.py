"""The decode engine's line to one prefill engine: claims and leases, asked for without ever blocking the scheduler.

A thread owns the socket; the scheduler talks to it through two queues. Runs in the engine core process.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import deque
from collections.abc import Iterable

import msgspec
import zmq

from vllm_adrenaline.control import messages, sockets

logger = logging.getLogger("vllm.adrenaline")

BEAT_S = 0.25
RETRY_S = 1.0
SILENCE_S = 60.0


class Borrower(threading.Thread):
    """`welcome` is the prefill engine's answer to our hello; None while it is not there or does not fit. `load` is what
    it last said of itself; `tpot` (seconds) and `waiting` (blocks of its prompts that wait here) are what we say."""

    def __init__(self, address: str, identity: messages.Identity, engine: str) -> None:
        super().__init__(name="adrenaline-borrower", daemon=True)
        self.address = address
        self.welcome: messages.Welcome | None = None
        self.load = messages.Load()
        self.tpot, self.waiting = 0.0, 0
        self._beat_is_due = False
        self.answers: deque[messages.AnyMessage] = deque()
        self.answered = threading.Event()
        self._hello = messages.Hello(identity, borrows=True, engine=engine, pid=os.getpid())
        self._outbox: deque[messages.Message] = deque()
        self._bell_in, self._bell_out = self._bell()
        self._stopping = False

    @staticmethod
    def _bell() -> tuple[zmq.Socket[bytes], zmq.Socket[bytes]]:
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context.instance()
        name = f"inproc://adrenaline-{time.monotonic_ns()}"
        ring, rung = context.socket(zmq.PAIR), context.socket(zmq.PAIR)
        rung.bind(name)
        ring.connect(name)
        return ring, rung

    # Scheduler thread

    def beat(self) -> None:
        """Send the next beat at once; several calls before it goes are one beat."""
        self._beat_is_due = True
        self._ring()

    def claim(self, request: str) -> None:
        """Ask to keep a finished prompt."""
        self._post(messages.Claim(request))

    def lease(self, want: int) -> None:
        """Ask for free blocks."""
        self._post(messages.Lease(want))

    def release(self, requests: Iterable[str], blocks: Iterable[int]) -> None:
        """Give claims and blocks back."""
        self._post(messages.Release(list(requests), list(blocks)))

    def report_fault(self, pids: Iterable[int]) -> None:
        """Tell the prefill engine which executor processes failed us: it kills them before it reuses any block."""
        self._post(messages.Fault(list(pids)))

    def take_answers(self) -> list[messages.AnyMessage]:
        """Return the answers that came since the last call."""
        self.answered.clear()
        taken = []
        while self.answers:
            taken.append(self.answers.popleft())
        return taken

    def stop(self) -> None:
        """Say nothing more and end."""
        self._stopping = True
        self._ring()
        self.join(timeout=2)

    def _post(self, message: messages.Message) -> None:
        self._outbox.append(message)
        self._ring()

    def _ring(self) -> None:
        self._bell_in.send(b"", zmq.NOBLOCK)

    # Own thread

    def run(self) -> None:
        while not self._stopping:
            socket = sockets.connect(self.address)
            try:
                self._talk(socket)
            finally:
                socket.close()

    def _talk(self, socket: zmq.Socket[bytes]) -> None:
        """Say hello and serve both directions until the peer is silent, does not know us or does not fit."""
        poller = zmq.Poller()
        poller.register(socket, zmq.POLLIN)
        poller.register(self._bell_out, zmq.POLLIN)
        socket.send(messages.encode(self._hello))
        heard = said = time.monotonic()
        while not self._stopping:
            ready = dict(poller.poll(int(BEAT_S * 1000)))
            now = time.monotonic()
            if self._bell_out in ready:
                while self._bell_out.poll(0):
                    self._bell_out.recv()
            if socket in ready:
                heard = now
                if not self._hear(socket):
                    return
            if self.welcome is not None:
                while self._outbox:
                    socket.send(messages.encode(self._outbox.popleft()))
                    said = now
            if now - said >= BEAT_S or (self._beat_is_due and self.welcome is not None):
                self._beat_is_due = False
                beat = messages.Beat(self.tpot, self.waiting)
                socket.send(messages.encode(beat if self.welcome is not None else self._hello))
                said = now
            if now - heard > SILENCE_S:
                self._lost(f"is silent for {SILENCE_S:.0f} s")
                return

    def _hear(self, socket: zmq.Socket[bytes]) -> bool:
        try:
            message = messages.decode(socket.recv())
        except (msgspec.ValidationError, msgspec.DecodeError) as error:
            logger.warning("the prefill engine at %s sent what is no message: %s", self.address, error)
            return True
        if isinstance(message, messages.Welcome):
            if self.welcome is None or self.welcome.engine_id == message.engine_id:
                self.welcome = message
                return True
            self._lost("was replaced by another one")
            return False
        if isinstance(message, messages.Refused):
            self._lost(f"refuses us: {message.reason}")
            time.sleep(RETRY_S)
            return False
        if isinstance(message, messages.Load):
            self.load = message
        else:
            self.answers.append(message)
            self.answered.set()
        return True

    def _lost(self, why: str) -> None:
        if self.welcome is not None:
            logger.error("the prefill engine at %s %s: its requests are recomputed locally", self.address, why)
            self.answers.append(messages.Refused(why))
        self.welcome = None
        self._outbox.clear()
