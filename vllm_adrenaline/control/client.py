"""The decode engine's line to one prefill engine, over which it asks for claims and leases.

A thread owns the socket. The scheduler posts messages and takes answers through two queues, and neither blocks it. It
blocks only where it chooses to wait for `answered`: the request table does so for claims that were just made, up to
CLAIM_WAIT_S (2 ms) a step. Runs in the engine core process.
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

from vllm_adrenaline.control import addresses, messages, sockets
from vllm_adrenaline.errors import AdrenalineError
from vllm_adrenaline.system import descriptors
from vllm_adrenaline.system.process import PeerProcess

logger = logging.getLogger("vllm.adrenaline")

BEAT_S = 0.25
"""Between two heartbeats, and between two hellos until one is answered."""
RETRY_S = 1.0
"""From a refusal, or a line that broke, to the next attempt."""
SILENCE_S = 60.0
"""After how much silence a connection is made anew while the prefill engine has not welcomed us."""
QUIET_S, HANGS_S, BUSY_S = 0.75, 2.0, 10.0
"""A prefill engine that has said nothing for so long, though we ask it every BEAT_S, hangs: if its process was stopped;
if it does not work, or cannot be seen; and in any case. One that gets no CPU from others is late, and does not hang."""
MARGIN = 0.9
"""The part of a lease that we rely on: clocks of two machines do not tick alike."""


class PrefillClient(threading.Thread):
    """The thread that talks to one prefill engine.

    The prefill engine has lives, numbered from 0. One ends when it is gone, silent for its lease, or takes back what we
    had. The last answer of a life is Refused. What is posted for a life that is over is not sent.

    Attributes:
        address: where the prefill engine listens.
        welcome: its answer to our hello; None while it is not there or does not fit.
        load: what it last said of itself.
        tpot, waiting, offloads, slack: what the next heartbeat says of us. The scheduler sets them; see
            messages.Heartbeat.
        answers: pairs of a life and what was said in it, the oldest first.
        answered: set when there are answers, until they are taken.
        bad_frames: how many frames came that were no message.
    """

    def __init__(self, address: str, identity: messages.Identity, engine: str, beyond_loopback: bool = False) -> None:
        """`beyond_loopback`: whether the operator named an interface to other hosts."""
        super().__init__(name="adrenaline-prefill-client", daemon=True)
        self.address = address
        self.welcome: messages.Welcome | None = None
        self.load = messages.Load()
        self.tpot, self.waiting, self.offloads = 0.0, 0, False
        self.slack: messages.Slack | None = None
        self.bad_frames = 0
        self._beyond_loopback = beyond_loopback
        self.answers: deque[tuple[int, messages.AnyMessage]] = deque()
        self.answered = threading.Event()
        self._process: PeerProcess | None = None  # of the prefill engine, once it has passed it
        self._hello = messages.Hello(identity, borrows=True, engine=engine)
        self._outbox: deque[tuple[int | None, messages.Message]] = deque()
        self._bell = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._life = 0
        self._said: deque[float] = deque()
        self._acknowledged = self._heard_at = 0.0
        self._beat_is_due = False
        self._stopping = False

    # Scheduler thread

    def beat(self) -> None:
        """Send the next heartbeat at once. Several calls before it goes make one heartbeat."""
        self._beat_is_due = True
        self._ring()

    def post(self, life: int | None, message: messages.Message) -> None:
        """Send a message to the prefill engine if this life of it is not over by then; for None in any life."""
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
        """Return what the prefill engine said of itself in this life; None before that, and when the life is over."""
        welcome = self.welcome  # first: the next one comes after the end of this life
        return welcome if life == self._life else None

    def is_over(self, life: int) -> bool:
        """Whether this life of the prefill engine is over. Then its last answer can be taken."""
        return life < self._life

    def holds(self, life: int, now: float) -> bool:
        """Whether the prefill engine cannot have taken anything back in this life before `now` (seconds, monotonic).

        It cannot if it has answered something that we said less than MARGIN of its lease before `now`.
        """
        peer = self.peer(life)
        return peer is not None and now < self._acknowledged + MARGIN * peer.lease_seconds

    def hangs(self, now: float) -> bool:
        """Whether the prefill engine is there, and says nothing at `now` (seconds, monotonic)."""
        welcome, silence = self.welcome, now - self._heard_at
        if welcome is None or silence < QUIET_S:
            return False
        process = self._process
        if process is None:
            return silence >= HANGS_S
        if silence < HANGS_S:
            return process.is_stopped()
        return silence >= BUSY_S or not process.works()

    def stop(self) -> None:
        """Say good-bye and end. Waits up to 2 s for the thread."""
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
            socket = None
            try:
                socket = sockets.connect(self.address)
                with contextlib.ExitStack() as stack:
                    self._talk(socket, stack)
            except AdrenalineError as error:  # it names what it must not
                logger.error("the prefill engine at %s is not believed: %s", self.address, error)
                self._end_life("cannot be believed")
                time.sleep(RETRY_S)
            except Exception:
                logger.exception("the line to the prefill engine at %s broke; it is made anew", self.address)
                self._end_life("cannot be talked to")
                time.sleep(RETRY_S)
            finally:
                if socket is not None:
                    socket.close(linger=int(1000 * RETRY_S) if self._stopping else 0)

    def _watch(self, socket: zmq.Socket[bytes], welcome: messages.Welcome, stack: contextlib.ExitStack) -> int:
        """Pass our pidfd to the prefill engine, and take its own. On another host neither can be.

        Returns:
            A descriptor that is ready when the prefill engine's process has ended; -1 if we cannot see it.
        """
        if welcome.vicinity != addresses.vicinity(self.address):
            return -1
        try:
            token, theirs = descriptors.introduce(addresses.for_descriptors(self.address))
            process = PeerProcess(theirs)
        except (AdrenalineError, OSError) as error:
            logger.warning("only silence will show that the prefill engine at %s has gone: %s", self.address, error)
            return -1
        self._process = process
        stack.callback(self._forget_process, process)
        self._say(socket, msgspec.structs.replace(self._hello, process=token))
        return process.pidfd

    def _forget_process(self, process: PeerProcess) -> None:
        self._process = None
        process.close()

    def _talk(self, socket: zmq.Socket[bytes], stack: contextlib.ExitStack) -> None:
        """Say hello and serve both directions until the peer ends, is silent, refuses us, or is another than before.

        `stack` closes what is opened for it.
        """
        poller = zmq.Poller()
        poller.register(socket, zmq.POLLIN)
        poller.register(self._bell, zmq.POLLIN)
        self._said.clear()
        self._heard_at = said = self._say(socket, self._hello)
        is_watched, process = False, -1
        while not self._stopping:
            if self.welcome is not None and not is_watched:
                is_watched = True
                process = self._watch(socket, self.welcome, stack)
                if process >= 0:
                    poller.register(process, zmq.POLLIN)
            ready = dict(poller.poll(int(BEAT_S * 1000)))
            now = time.monotonic()
            if self._bell in ready:
                os.eventfd_read(self._bell)
            if process in ready:
                self._end_life("has ended")
                return
            if socket in ready:
                self._heard_at = now
                if not self._hear(socket):
                    return
            if self.welcome is not None:
                while self._outbox:
                    life, message = self._outbox.popleft()
                    if life is None or life == self._life:
                        socket.send(messages.encode(message))
            if now - said >= BEAT_S or (self._beat_is_due and self.welcome is not None):
                self._beat_is_due = False
                beat = messages.Heartbeat(self.tpot, self.waiting, self.offloads, self.slack)
                said = self._say(socket, beat if self.welcome is not None else self._hello)
            silence = SILENCE_S if self.welcome is None else self.welcome.lease_seconds
            if now - self._heard_at > silence:
                self._end_life(f"is silent for {silence:.0f} s")
                return
        if self.welcome is not None:
            socket.send(messages.encode(messages.Leave()))

    def _say(self, socket: zmq.Socket[bytes], message: messages.Message) -> float:
        """Send a hello or a heartbeat, which are answered in turn; return when (seconds, monotonic)."""
        now = time.monotonic()
        self._said.append(now)
        socket.send(messages.encode(message))
        return now

    def _hear(self, socket: zmq.Socket[bytes]) -> bool:
        """Take one message; return whether the conversation goes on."""
        frames = socket.recv_multipart()
        try:
            message = messages.decode(b"".join(frames))
        except msgspec.DecodeError as error:
            self.bad_frames += 1
            logger.warning("the prefill engine at %s sent what is no message: %s", self.address, error)
            return True
        if isinstance(message, messages.Welcome):
            sockets.check_welcome(message, self.address, self._beyond_loopback)
            self._acknowledge()
            if self.welcome is None or self.welcome.engine_id == message.engine_id:
                self.welcome = message
                return True
            self._end_life("was replaced by another one")
            return False
        if isinstance(message, messages.Refused):
            self._end_life(f"refuses us: {message.reason}")
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
        """Note that the oldest hello or heartbeat without an answer was answered.

        If an answer got lost, the time that is noted is too early, never too late.
        """
        if self._said:
            self._acknowledged = self._said.popleft()

    def _end_life(self, why: str) -> None:
        """End the present life of the prefill engine, if it has one; what the scheduler hears last is Refused."""
        if self.welcome is not None:
            logger.error("the prefill engine at %s %s: what is not mapped is recomputed locally", self.address, why)
            self.answers.append((self._life, messages.Refused(why)))
            self.answered.set()
            self.welcome = None
            self._life += 1
