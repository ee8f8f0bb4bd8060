"""The prefill engine's vLLM executor: vLLM's own, plus one attention executor process beside each worker.

Runs in the engine core process. Checked against vllm/v1/executor/multiproc_executor.py of 0.32 (run) and 0.33 (read).
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
from typing import Any

import msgspec
import zmq
from vllm.v1.executor.multiproc_executor import MultiprocExecutor

from vllm_adrenaline.attention.spec import READY, ExecutorSpec, KVExport
from vllm_adrenaline.config import Options
from vllm_adrenaline.control import messages, sockets
from vllm_adrenaline.engine.identity import identity_of
from vllm_adrenaline.errors import AdrenalineError
from vllm_adrenaline.system import priority
from vllm_adrenaline.system.child import dying_with_parent
from vllm_adrenaline.system.cores import parse, ranges

logger = logging.getLogger("vllm.adrenaline")

START_TIMEOUT_S = 120.0
MIN_BACKOFF_S, MAX_BACKOFF_S = 0.5, 30.0
HEALTHY_S = 60.0
"""An executor that served for so long is started again as promptly as the first time."""
REVOKE_S = 2.0

_site: ExecutorPool | None = None


def addresses() -> list[str]:
    """Return where this engine's attention executors listen, by rank; raises AdrenalineError before they run."""
    if _site is None:
        raise AdrenalineError("the attention executors are not started yet")
    return [process.address for process in _site.processes]


def share() -> str:
    """Return in words, and at most MAX_NAME characters, what the executors run on."""
    if _site is None:
        raise AdrenalineError("the attention executors are not started yet")
    return in_words([process.spec for process in _site.processes])


def in_words(specs: Sequence[ExecutorSpec]) -> str:
    """Return what executors run on, the same for the same ones: decode engines keep their profiles by it."""
    text = "; ".join(f"{s.threads} thread(s) on cores {ranges(s.cpus)}, share {s.share:g}" for s in specs)
    if len(text) <= messages.MAX_NAME:
        return text
    short = hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
    return f"{text[: messages.MAX_NAME - 40]}... ({len(specs)} executors, {short})"


def set_share(share: float) -> str:
    """Give every executor this share of its cores, now and after a restart; return in words what they have."""
    if _site is None:
        return "no executor runs"
    _site.share = share
    words = {priority.take_share(process.pid, share) for process in _site.processes}
    for process in _site.processes:
        cores = process.spec.cpus
        count = max(process.spec.threads, priority.threads_of(share, len(cores)))
        priority.keep_to(process.pid, cores[-count:])
    return ", ".join(sorted(words))


def kill(pids: list[int]) -> None:
    """Kill those attention executors that still run under one of `pids` and wait for their end: after this they write
    nothing. They are started anew. A process that came in their place meanwhile is left alone."""
    if _site is not None:
        for process in _site.processes:
            if process.pid in pids:
                process.kill()


def revoke(engine: str) -> None:
    """Have no executor attend for a decode engine any more; return when none can write for it.

    An executor that does not acknowledge within REVOKE_S is killed: nobody knows what it still does. Those of others go
    on. One that has no address yet was just started, and serves nobody.
    """
    with contextlib.ExitStack() as stack:
        asked: list[tuple[ExecutorProcess, zmq.Socket[bytes] | None]] = []
        for process in _site.processes if _site is not None else []:
            if process.address:
                asked.append((process, _ask_to_let_go(process, engine, stack)))
        deadline = time.monotonic() + REVOKE_S
        for process, socket in asked:
            if socket is None or not _acknowledges(socket, engine, deadline):
                logger.error("attention executor %d does not let go of decode engine %s", process.pid, engine)
                process.kill()


def _ask_to_let_go(process: ExecutorProcess, engine: str, stack: contextlib.ExitStack) -> zmq.Socket[bytes] | None:
    try:
        socket = sockets.connect(process.address)
        stack.callback(socket.close)
        socket.send(messages.encode(messages.Revoke(engine)))
    except zmq.ZMQError as error:  # too many open files, say
        logger.error("cannot talk to attention executor %d: %s", process.pid, error)
        return None
    return socket


def _acknowledges(socket: zmq.Socket[bytes], engine: str, deadline: float) -> bool:
    while socket.poll(max(0, int(1000 * (deadline - time.monotonic())))):
        with contextlib.suppress(msgspec.DecodeError):
            if messages.decode(b"".join(socket.recv_multipart())) == messages.Revoked(engine):
                return True
    return False


class ExecutorProcess:
    """One attention executor: started, read until it is ready, stopped."""

    def __init__(self, spec: ExecutorSpec) -> None:
        self.spec = spec
        self.address = ""
        self._process = subprocess.Popen(
            dying_with_parent([sys.executable, "-m", "vllm_adrenaline.attention"]),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
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
        """Read the address it listens at; raises AdrenalineError when it ends or is silent for too long."""
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
        """End it in an orderly way, within seconds."""
        self._process.terminate()
        try:
            self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self.kill()


class ExecutorPool:
    """All attention executors of one prefill engine; one that ends is started again, ever more slowly."""

    def __init__(self, specs: list[ExecutorSpec]) -> None:
        self.processes = [ExecutorProcess(spec) for spec in specs]
        for process in self.processes:
            process.wait_ready()
        self._stopping = threading.Event()
        self.share = specs[0].share
        for rank in range(len(specs)):
            threading.Thread(target=self._watch, args=(rank,), name=f"adrenaline-watch-{rank}", daemon=True).start()

    def _watch(self, rank: int) -> None:
        backoff, ready = MIN_BACKOFF_S, time.monotonic()
        while True:
            code = self.processes[rank].wait()
            if self._stopping.is_set():
                return
            if time.monotonic() - ready > HEALTHY_S:
                backoff = MIN_BACKOFF_S
            ready = math.inf
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
                ready = time.monotonic()
            except (AdrenalineError, OSError):
                logger.exception("attention executor %d did not come back", rank)

    def stop(self) -> None:
        """Stop all of them."""
        self._stopping.set()
        for process in self.processes:
            with contextlib.suppress(OSError):
                process.stop()


class PrefillExecutor(MultiprocExecutor):
    """Starts the attention executors once the workers have allocated their KV cache."""

    def initialize_from_config(self, kv_cache_configs: list[Any]) -> None:
        super().initialize_from_config(kv_cache_configs)
        global _site
        options = Options.of(self.vllm_config)
        identity = identity_of(self.vllm_config)
        exports = [msgspec.convert(export, KVExport) for export in self.collective_rpc("export_kv")]
        cores = parse(options.executor_cores) or [
            export.cpus[-priority.threads_of(options.executor_share, len(export.cpus)) :] for export in exports
        ]
        specs = [
            ExecutorSpec(
                rank=rank,
                address=sockets.sibling(options.listen_address, f"executor{rank}"),
                identity=identity,
                kv=export,
                cpus=cores[rank],
                threads=options.executor_threads
                or (len(cores[rank]) if options.executor_cores else min(len(cores[rank]), export.threads)),
                idle_timeout=options.lease_seconds,
                share=options.executor_share,
            )
            for rank, export in enumerate(exports)
        ]
        logger.info("starting %d attention executor(s)", len(specs))
        _site = ExecutorPool(specs)

    def shutdown(self) -> None:
        global _site
        if _site is not None:
            _site.stop()
            _site = None
        super().shutdown()
