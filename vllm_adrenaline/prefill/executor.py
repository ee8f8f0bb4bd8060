"""The prefill engine's vLLM executor: vLLM's own, plus one attention executor process beside each worker.

Runs in the engine core process. Checked against vllm/v1/executor/multiproc_executor.py of 0.32 (run) and 0.33 (read).
"""

from __future__ import annotations

import contextlib
import logging
import os
import subprocess
import sys
import threading
import time
from typing import Any

import msgspec
from vllm.v1.executor.multiproc_executor import MultiprocExecutor

from vllm_adrenaline import identity
from vllm_adrenaline.attention.spec import READY, ExecutorSpec, KVExport
from vllm_adrenaline.child import dying_with_parent
from vllm_adrenaline.colocation import cpu
from vllm_adrenaline.config import Options
from vllm_adrenaline.control import sockets
from vllm_adrenaline.cores import parse
from vllm_adrenaline.errors import AdrenalineError

logger = logging.getLogger("vllm.adrenaline")

START_TIMEOUT_S = 120.0
MAX_BACKOFF_S = 30.0

_site: AttentionSite | None = None


def addresses() -> list[str]:
    """Return where this engine's attention executors listen, by rank; raises AdrenalineError before they run."""
    if _site is None:
        raise AdrenalineError("the attention executors are not started yet")
    return [process.address for process in _site.processes]


def share() -> str:
    """Return in words what the executors run on."""
    if _site is None:
        raise AdrenalineError("the attention executors are not started yet")
    specs = [process.spec for process in _site.processes]
    return "; ".join(f"{s.threads} thread(s) on cores {s.cpus}, share {s.share:g}" for s in specs)


def set_share(share: float) -> str:
    """Give every executor this share of its cores, now and after a restart; return in words what they have."""
    if _site is None:
        return "no executor runs"
    _site.share = share
    words = {cpu.take_share(process.pid, share) for process in _site.processes}
    for process in _site.processes:
        cores = process.spec.cpus
        count = max(process.spec.threads, cpu.threads_of(share, len(cores)))
        cpu.keep_to(process.pid, cores[-count:])
    return ", ".join(sorted(words))


def kill(pids: list[int] | None) -> None:
    """Kill those attention executors that still run under one of `pids` (None: all) and wait for their end: after this
    they write nothing. They are started anew. A process that came in their place meanwhile is left alone."""
    if _site is not None:
        for process in _site.processes:
            if pids is None or process.pid in pids:
                process.kill()


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


class AttentionSite:
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
        backoff = 0.5
        while True:
            code = self.processes[rank].wait()
            if self._stopping.is_set():
                return
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
        us = identity.of(self.vllm_config)
        exports = [msgspec.convert(export, KVExport) for export in self.collective_rpc("export_kv")]
        cores = parse(options.executor_cores) or [
            export.cpus[-cpu.threads_of(options.executor_share, len(export.cpus)) :] for export in exports
        ]
        specs = [
            ExecutorSpec(
                rank=rank,
                address=sockets.sibling(options.listen_address, f"executor{rank}"),
                identity=us,
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
        _site = AttentionSite(specs)

    def shutdown(self) -> None:
        global _site
        if _site is not None:
            _site.stop()
            _site = None
        super().shutdown()
