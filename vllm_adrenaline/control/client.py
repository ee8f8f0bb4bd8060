"""The decode engine's line to one prefill engine: claims and leases, asked for without ever blocking the scheduler.

A thread owns the socket; the scheduler talks to it through two queues. Runs in the engine core process.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections import deque

import msgspec
import zmq

from vllm_adrenaline.control import messages, sockets

logger = logging.getLogger("vllm.adrenaline")

BEAT_S = 0.25
RETRY_S = 1.0
SILENCE_S = 60.0
"""After how much silence a connection is made anew while the prefill engine has not welcomed us."""
MARGIN = 0.9
"""Of the lease, as what we rely on: clocks of two machines do not tick alike."""


class PrefillClient(threading.Thread):
    """`welcome` is the prefill engine's answer to our hello; None while it is not there or does not fit. `load` is what
    it last said of itself. `tpot` (seconds), `waiting` (blocks of its prompts that wait here) and `offloads` (whether
    its executors attend for us) are what we say of ourselves. `bad_frames`: what came and was no message.

    The prefill engine has lives: one ends when it is gone, silent for its lease, or takes back what we had. `answers`
    are pairs of a life and what was said in it; the last word of a life is Refused. What is posted for a life that is
    over is not sent.
    """

    def __init__(self, address: str, identity: messages.Identity, engine: str) -> None:
        super().__init__(name="adrenaline-prefill-client", daemon=True)
        self.address = address
        self.welcome: messages.Welcome | None = None
        self.load = messages.Load()
        self.tpot, self.waiting, self.offloads = 0.0, 0, False
        self.bad_frames = 0
        self.answers: deque[tuple[int, messages.AnyMessage]] = deque()
        self.answered = threading.Event()
        self._hello = messages.Hello(identity, borrows=True, engine=engine, pid=os.getpid())
        self._outbox: deque[tuple[int, messages.Message]] = deque()
        self._bell = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._life = 0
        self._said: deque[float] = deque()
        self._acknowledged = 0.0
        self._beat_is_due = False
        self._stopping = False

    # Scheduler thread

    def beat(self) -> None:
        """Send the next beat at once; several calls before it goes are one beat."""
        self._beat_is_due = True
        self._ring()

    def post(self, life: int, message: messages.Message) -> None:
        """Say something to the prefill engine in this life of it."""
        self._outbox.append((life, message))
        self._ring()

    def take_answers(self) -> list[tuple[int, messages.AnyMessage]]:
        """Return the answers that came since the last call, each with the life it belongs to."""
        self.answered.clear()
        taken = []
        while self.answers:
            taken.append(self.answers.popleft())
        return taken

    def peer(self, life: int) -> messages.Welcome | None:
        """What the prefill engine said of itself in this life of it; None when it is over."""
        welcome = self.welcome  # first: the next one comes after the end of this life
        return welcome if life == self._life else None

    def holds(self, life: int, now: float) -> bool:
        """Whether the prefill engine cannot have taken anything back in this life before `now` (seconds, monotonic): it
        answered something that we said less than its lease before."""
        peer = self.peer(life)
        return peer is not None and now < self._acknowledged + MARGIN * peer.lease_seconds

    def stop(self) -> None:
        """Say good-bye and end."""
        self._stopping = True
        self._ring()
        if self.is_alive():
            self.join(timeout=2)

    def _ring(self) -> None:
        with contextlib.suppress(BlockingIOError):  # it rings already
            os.eventfd_write(self._bell, 1)

    # Own thread

    def run(self) -> None:
        while not self._stopping:
            socket = sockets.connect(self.address)
            try:
                self._talk(socket)
            except Exception:
                logger.exception("the line to the prefill engine at %s broke; it is made anew", self.address)
                self._lost("cannot be talked to")
                time.sleep(RETRY_S)
            finally:
                socket.close(linger=int(1000 * RETRY_S) if self._stopping else 0)

    def _talk(self, socket: zmq.Socket[bytes]) -> None:
        """Say hello and serve both directions until the peer is silent, does not know us or does not fit."""
        poller = zmq.Poller()
        poller.register(socket, zmq.POLLIN)
        poller.register(self._bell, zmq.POLLIN)
        self._said.clear()
        heard = said = self._say(socket, self._hello)
        while not self._stopping:
            ready = dict(poller.poll(int(BEAT_S * 1000)))
            now = time.monotonic()
            if self._bell in ready:
                os.eventfd_read(self._bell)
            if socket in ready:
                heard = now
                if not self._hear(socket):
                    return
            if self.welcome is not None:
                while self._outbox:
                    life, message = self._outbox.popleft()
                    if life == self._life:
                        socket.send(messages.encode(message))
            if now - said >= BEAT_S or (self._beat_is_due and self.welcome is not None):
                self._beat_is_due = False
                beat = messages.Heartbeat(self.tpot, self.waiting, self.offloads)
                said = self._say(socket, beat if self.welcome is not None else self._hello)
            silence = SILENCE_S if self.welcome is None else self.welcome.lease_seconds
            if now - heard > silence:
                self._lost(f"is silent for {silence:.0f} s")
                return
        if self.welcome is not None:
            socket.send(messages.encode(messages.Leave()))

    def _say(self, socket: zmq.Socket[bytes], message: messages.Message) -> float:
        """Send what is answered in turn, and return when (seconds, monotonic)."""
        now = time.monotonic()
        self._said.append(now)
        socket.send(messages.encode(message))
        return now

    def _hear(self, socket: zmq.Socket[bytes]) -> bool:
        frames = socket.recv_multipart()
        try:
            message = messages.decode(b"".join(frames))
        except msgspec.DecodeError as error:
            self.bad_frames += 1
            logger.warning("the prefill engine at %s sent what is no message: %s", self.address, error)
            return True
        if isinstance(message, messages.Welcome):
            self._acknowledge()
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
            self._acknowledge()
            self.load = message
        else:
            self.answers.append((self._life, message))
            self.answered.set()
        return True

    def _acknowledge(self) -> None:
        """The oldest of what is answered in turn was answered. An answer that got lost makes this too early, never too
        late."""
        if self._said:
            self._acknowledged = self._said.popleft()

    def _lost(self, why: str) -> None:
        if self.welcome is not None:
            logger.error("the prefill engine at %s %s: its requests are recomputed locally", self.address, why)
            self.answers.append((self._life, messages.Refused(why)))
            self.answered.set()
            self.welcome = None
            self._life += 1
