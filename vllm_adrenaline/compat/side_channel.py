"""NIXL's side channel, on which an engine tells others how its memory is read: bound at once, to a port of its own.

vLLM binds it half a minute after its port was chosen, in a thread whose end nobody notices. If the port is taken
meanwhile, or one malformed frame comes, the engine waits for ever, or whoever would read from it
(vllm/distributed/kv_transfer/kv_connector/v1/nixl/base_scheduler.py, _nixl_handshake_listener; 0.32 run, 0.33 read).
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Mapping
from urllib.parse import urlsplit

import msgspec
import zmq

from vllm_adrenaline.errors import AdrenalineError

logger = logging.getLogger("vllm.adrenaline")

PORT = "VLLM_NIXL_SIDE_CHANNEL_PORT"
"""Environment variable with an operator's choice of the port, as in vLLM. Any free one is taken otherwise."""
POLL_MS = 500
MAX_FRAME = 1 << 20
"""Bytes of the largest question that is read."""

Rank = tuple[int, int]
"""A worker's pipeline-parallel and tensor-parallel rank."""


class Request(msgspec.Struct, frozen=True, array_like=True):
    """vLLM's question: how is the memory of this rank read? `what` is not looked at."""

    what: bytes
    pipeline_rank: int
    tensor_rank: int


class SideChannel(threading.Thread):
    """The thread that answers every question for a rank's metadata, from `serve` on.

    Attributes:
        port: the TCP port, bound from the beginning.
        bad_frames: how many questions could not be answered.
    """

    def __init__(self, host: str) -> None:
        """Bind a port of `host`. Raises AdrenalineError if that is not possible."""
        super().__init__(name="adrenaline-side-channel", daemon=True)
        self.bad_frames = 0
        self._metadata: Mapping[Rank, bytes] = {}
        self._stopping = threading.Event()
        self._socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.ROUTER)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.MAXMSGSIZE, MAX_FRAME)
        wanted = os.environ.get(PORT, "*")
        try:
            self._socket.bind(f"tcp://{host}:{wanted}")
        except zmq.ZMQError as error:
            self._socket.close()
            raise AdrenalineError(
                f"NIXL's side channel cannot listen at {host}, port {wanted}: {error}; unset {PORT}, or choose another"
            ) from None
        self.port = urlsplit(self._socket.getsockopt_string(zmq.LAST_ENDPOINT).rstrip("\0")).port or 0

    def serve(self, metadata: Mapping[Rank, bytes]) -> None:
        """Answer with the encoded metadata of these (pipeline, tensor parallel) ranks from now on.

        May be called again: vLLM 0.33 does so when an engine is woken up (v1/engine/core.py, wake_up; read).
        """
        self._metadata = metadata
        if self.ident is None:
            self.start()

    def stop(self) -> None:
        """End the thread; waits up to 2 s for it."""
        self._stopping.set()
        if self.ident is None:
            self._socket.close()
        elif self.is_alive():
            self.join(timeout=4 * POLL_MS / 1000)

    def run(self) -> None:
        try:
            while not self._stopping.is_set():
                if self._socket.poll(POLL_MS):
                    self._serve_one()
        finally:
            self._socket.close()

    def _serve_one(self) -> None:
        frames = self._socket.recv_multipart()
        try:
            peer, _, question = frames
            asked = msgspec.msgpack.decode(question, type=Request)
            answer = self._metadata[asked.pipeline_rank, asked.tensor_rank]
            # With our clock: by it the other side knows when what it may read expires.
            self._socket.send_multipart([peer, b"", answer, msgspec.msgpack.encode(time.perf_counter())], zmq.NOBLOCK)
        except (ValueError, KeyError, RecursionError, msgspec.DecodeError, zmq.ZMQError) as error:
            self.bad_frames += 1
            logger.warning("NIXL's side channel was asked what it cannot answer: %s", error)
