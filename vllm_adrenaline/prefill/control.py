"""The prefill engine's control thread: answers decode engines, in the process of the engine core.

It shares the block pool with vLLM's scheduler thread; `lock` is the fence between the two, held by the scheduler while
it schedules or frees and by this thread for the microseconds that a claim or a lease takes.
"""

import logging
import threading
import time
from collections.abc import Callable

import msgspec
import zmq

from vllm_adrenaline.control import messages, sockets
from vllm_adrenaline.prefill.lender import Lender

logger = logging.getLogger("vllm.adrenaline")

POLL_MS = 500


class ControlServer(threading.Thread):
    """Serves one ROUTER socket until `stop`. `welcome` is computed per answer, for executors may restart. `tick`
    is called twice a second. `tpot`: what
    each decode engine said of its steps, in seconds."""

    def __init__(
        self,
        address: str,
        identity: messages.Identity,
        lender: Lender,
        lock: threading.RLock,
        welcome: Callable[[], messages.Welcome],
        load: Callable[[], messages.Load],
        tick: Callable[[], None],
        kill_executors: Callable[[list[int] | None], None],
    ) -> None:
        super().__init__(name="adrenaline-control", daemon=True)
        self.identity, self.lender, self.lock, self.welcome = identity, lender, lock, welcome
        self.load, self.tick, self.kill_executors = load, tick, kill_executors
        self.beats: dict[bytes, messages.Beat] = {}
        self.bad_frames = 0
        self._socket, self.address = sockets.bind(address)
        self._stopping = threading.Event()

    def run(self) -> None:
        ticked = 0.0
        try:
            while not self._stopping.is_set():
                if self._socket.poll(POLL_MS):
                    self._serve_one()
                if (now := time.monotonic()) - ticked >= POLL_MS / 1000:
                    ticked = now
                    self.tick()
                    with self.lock:
                        self._evict_silent()
        finally:
            sockets.unbind(self._socket, self.address)

    def stop(self) -> None:
        """Stop serving and remove the socket."""
        self._stopping.set()
        if self.is_alive():
            self.join(timeout=2 * POLL_MS / 1000)

    def _evict_silent(self) -> None:
        """Take back what silent decode engines have. One that only slept may wake up in the middle of a step, so the
        executors are ended before any of its blocks can become somebody else's."""
        silent = self.lender.silent()
        if any(self.lender.borrowers[name].has_blocks for name in silent):
            self.kill_executors(None)
        for name in silent:
            logger.warning("decode engine %s is silent: taking back all it had borrowed", name.hex())
            self.lender.evict(name)
            self.beats.pop(name, None)

    def _serve_one(self) -> None:
        frames = self._socket.recv_multipart()
        try:
            borrower, frame = frames
            message = messages.decode(frame)
        except (ValueError, msgspec.ValidationError, msgspec.DecodeError):
            self.bad_frames += 1
            return
        try:
            with self.lock:
                answer = self._answer(borrower, message)
        except Exception:
            logger.exception("cannot serve %s", type(message).__name__)
            return
        if answer is not None:
            try:
                self._socket.send_multipart([borrower, messages.encode(answer)], zmq.NOBLOCK)
            except zmq.ZMQError as error:
                logger.warning("cannot answer decode engine %s: %s", borrower.hex(), error)

    def _answer(self, borrower: bytes, message: messages.AnyMessage) -> messages.Message | None:
        lender = self.lender
        if isinstance(message, messages.Hello):
            reason = messages.mismatch(self.identity, message.identity, "prefill engine", "decode engine")
            if reason is not None:
                return messages.Refused(reason)
            if message.borrows:
                lender.join(borrower)
            return self.welcome()
        if not lender.beat(borrower):
            return messages.Refused("unknown decode engine: say hello first")
        if isinstance(message, messages.Claim):
            offer = lender.claim(borrower, message.request)
            if offer is None:
                return messages.Gone(message.request)
            blocks = [block.block_id for block in offer.blocks]
            return messages.Claimed(message.request, blocks, offer.num_tokens, offer.digest)
        if isinstance(message, messages.Lease):
            return messages.Leased(lender.lease(borrower, message.want))
        if isinstance(message, messages.Fault):
            self.kill_executors(message.pids)
            return None
        if isinstance(message, messages.Drop):
            lender.drop(message.requests)
            return None
        if isinstance(message, messages.Release):
            lender.release(borrower, message.requests, message.blocks)
            return None
        if isinstance(message, messages.Beat):
            self.beats[borrower] = message
            return self.load()
        return None
