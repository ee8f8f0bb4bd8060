"""The pool of a prefill engine's attention executors: it starts, watches, restarts and stops them, sets their share.

Runs in the engine core process. vLLM's executor starts the pool, and the scheduler asks it. The two do not know each
other, so the process has one pool, which `activate` sets.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import math
import os
import subprocess
import sys
import threading
import time
from collections.abc import Sequence

import msgspec
import zmq

from vllm_adrenaline.attention.spec import READY, ExecutorSpec
from vllm_adrenaline.control import messages, sockets
from vllm_adrenaline.control.kv_export import KVExport
from vllm_adrenaline.errors import AdrenalineError
from vllm_adrenaline.system import descriptors, priority
from vllm_adrenaline.system.child import dying_with_parent
from vllm_adrenaline.system.cores import ranges
from vllm_adrenaline.system.process import pid_of

logger = logging.getLogger("vllm.adrenaline")

START_TIMEOUT_S = 120.0
"""How long an executor may take to start."""
MIN_BACKOFF_S, MAX_BACKOFF_S = 0.5, 30.0
"""How long to wait before an executor is started again: after the first end, and at most."""
HEALTHY_S = 60.0
"""An executor that served for so long is started again as promptly as after the first end."""
REVOKE_S = 2.0
"""How long an executor may take to let go of a decode engine."""


def in_words(specs: Sequence[ExecutorSpec]) -> str:
    """Return what executors run on, in at most MAX_NAME characters.

    Executors that run on the same have the same words, and no others have: decode engines keep their profiles by them.
    """
    text = "; ".join(f"{s.threads} thread(s) on cores {ranges(s.cpus)}, share {s.share:g}" for s in specs)
    if len(text) <= messages.MAX_NAME:
        return text
    short = hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
    return f"{text[: messages.MAX_NAME - 40]}... ({len(specs)} executors, {short})"


class ExecutorProcess:
    """The process of one attention executor.

    Attributes:
        spec: what it was told.
        address: where it listens; empty until `wait_ready` returned.
    """

    def __init__(self, spec: ExecutorSpec) -> None:
        self.spec = spec
        self.address = ""
        self._process = subprocess.Popen(
            dying_with_parent([sys.executable, "-m", "vllm_adrenaline.attention"]),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            pass_fds=[spec.kv_file] if spec.kv_file >= 0 else [],
            env=os.environ | {"OMP_NUM_THREADS": str(spec.threads)},
        )
        assert self._process.stdin is not None
        self._process.stdin.write(msgspec.json.encode(spec))
        self._process.stdin.close()

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    def wait_ready(self) -> None:
        """Wait until it serves, and set `address`. Raises AdrenalineError when it ends or needs START_TIMEOUT_S."""
        assert self._process.stdout is not None
        watchdog = threading.Timer(START_TIMEOUT_S, self._process.kill)
        watchdog.start()
        try:
            for line in self._process.stdout:
                word, _, address = line.decode(errors="replace").strip().partition(" ")
                if word == READY:
                    self.address = address
                    return
        finally:
            watchdog.cancel()
        raise AdrenalineError(f"attention executor {self.spec.rank} did not start (exit code {self._process.wait()})")

    def wait(self) -> int:
        """Wait for its end; return the exit code."""
        return self._process.wait()

    def kill(self) -> None:
        """Kill it and wait for its end."""
        self._process.kill()
        self._process.wait()

    def stop(self) -> None:
        """End it with SIGTERM, or kill it when it takes longer than 5 s."""
        self._process.terminate()
        try:
            self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self.kill()


class ExecutorPool:
    """All attention executors of one prefill engine. One that ends is started again, ever more slowly.

    Attributes:
        processes: by rank; empty for an engine without executors.
        exports: the KV caches of the prefill engine's workers, by rank.
        weights: their weights, by rank; None for a worker that does not share them.
        passing: who passes descriptors of this process and its workers; None where nobody does.
        share: of their device, 0 to 1, as it was set last.
    """

    def __init__(
        self,
        specs: list[ExecutorSpec],
        exports: Sequence[KVExport] = (),
        weights: Sequence[messages.SharedWeights | None] = (),
        passing: descriptors.Server | None = None,
    ) -> None:
        """Start the executors, and wait until they serve. Raises AdrenalineError if one does not."""
        self.exports, self.weights, self.passing = exports, weights, passing
        self.processes = [ExecutorProcess(spec) for spec in specs]
        for process in self.processes:
            process.wait_ready()
        self._stopping = threading.Event()
        self.share = specs[0].share if specs else 1.0
        for rank in range(len(specs)):
            threading.Thread(target=self._watch, args=(rank,), name=f"adrenaline-watch-{rank}", daemon=True).start()

    def _watch(self, rank: int) -> None:
        backoff, ready_at = MIN_BACKOFF_S, time.monotonic()
        while True:
            code = self.processes[rank].wait()
            if self._stopping.is_set():
                return
            if time.monotonic() - ready_at > HEALTHY_S:
                backoff = MIN_BACKOFF_S
            ready_at = math.inf
            logger.error("attention executor %d ended with exit code %d: starting it again", rank, code)
            time.sleep(backoff)
            backoff = min(2 * backoff, MAX_BACKOFF_S)
            try:
                process = ExecutorProcess(msgspec.structs.replace(self.processes[rank].spec, share=self.share))
                self.processes[rank] = process
                if self._stopping.is_set():
                    process.stop()
                    return
                process.wait_ready()
                ready_at = time.monotonic()
            except Exception:  # also one without a name, such as too many threads: nobody else starts it
                logger.exception("attention executor %d did not come back", rank)
                self.processes[rank].kill()

    @property
    def addresses(self) -> list[str]:
        """Where the executors listen, by rank; empty for one that was started again and does not serve yet."""
        return [process.address for process in self.processes]

    @property
    def worker_pids(self) -> list[int]:
        """The processes of the prefill engine's workers, by rank."""
        assert self.passing is not None, "an engine's pool has it"
        return [pid_of(self.passing.offers[messages.offer_of(rank)][0]) for rank in range(len(self.exports))]

    @property
    def share_in_words(self) -> str:
        """What the executors run on (`in_words`)."""
        return in_words([process.spec for process in self.processes])

    def set_share(self, share: float) -> str:
        """Give every executor this share of its cores, now and after a restart. Return in words what they have."""
        self.share = share
        words = {priority.take_share(process.pid, share) for process in self.processes}
        for process in self.processes:
            cores = process.spec.cpus
            count = max(process.spec.threads, priority.threads_of(share, len(cores)))
            priority.keep_to(process.pid, cores[-count:])
        return ", ".join(sorted(words))

    def kill(self, pids: Sequence[int]) -> None:
        """Kill the executors that still run under one of `pids`, and wait for their end: then they write nothing.

        They are started again. A process that has replaced one of them meanwhile is left alone.
        """
        for process in self._unstopped():
            if process.pid in pids:
                process.kill()

    def revoke(self, engine: str) -> None:
        """Have no executor attend for a decode engine any more. Return when none can write for it.

        An executor that does not acknowledge within REVOKE_S is killed: nobody knows what it still does. Others go on.
        One that has no address yet was just started, and serves nobody.
        """
        with contextlib.ExitStack() as stack:
            ready = [process for process in self._unstopped() if process.address]
            asked = [(process, _ask_to_let_go(process, engine, stack)) for process in ready]
            deadline = time.monotonic() + REVOKE_S
            for process, socket in asked:
                if socket is None or not _await_acknowledgement(socket, engine, deadline):
                    logger.error("attention executor %d does not let go of decode engine %s", process.pid, engine)
                    process.kill()

    def _unstopped(self) -> list[ExecutorProcess]:
        """The executors that may run. After `stop` there are none, and so nothing that one of them could write."""
        return [] if self._stopping.is_set() else self.processes

    def stop(self) -> None:
        """Stop all of them."""
        self._stopping.set()
        for process in self.processes:
            with contextlib.suppress(OSError):
                process.stop()


def _ask_to_let_go(process: ExecutorProcess, engine: str, stack: contextlib.ExitStack) -> zmq.Socket[bytes] | None:
    """Ask an executor to let go of a decode engine. Return the socket for its answer, None if it cannot be asked."""
    try:
        socket = sockets.connect(process.address)
        stack.callback(socket.close)
        socket.send(messages.encode(messages.Revoke(engine)))
    except zmq.ZMQError as error:  # too many open files, say
        logger.error("cannot talk to attention executor %d: %s", process.pid, error)
        return None
    return socket


def _await_acknowledgement(socket: zmq.Socket[bytes], engine: str, deadline: float) -> bool:
    """Wait until an executor says that it has let go of `engine`; return whether it did by the deadline."""
    while socket.poll(max(0, int(1000 * (deadline - time.monotonic())))):
        with contextlib.suppress(msgspec.DecodeError):
            if messages.decode(b"".join(socket.recv_multipart())) == messages.Revoked(engine):
                return True
    return False


_active: ExecutorPool | None = None


def activate(pool: ExecutorPool) -> None:
    """Make `pool` the pool of this process, until it ends."""
    global _active
    _active = pool


def active() -> ExecutorPool:
    """Return the pool of this process. Raises AdrenalineError while there is none."""
    if _active is None:
        raise AdrenalineError("the attention executors are not started yet")
    return _active
