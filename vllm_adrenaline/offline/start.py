"""How the two engines of an `LLM` are started: what each gets of this machine, and what ends with what."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from vllm_adrenaline.compat import versions
from vllm_adrenaline.compat.worker_cores import CORES_ENV
from vllm_adrenaline.engine.setup import ENDS_WITH_STARTER, PEERS_START_TOO
from vllm_adrenaline.errors import AdrenalineError
from vllm_adrenaline.launch import engine_command, memory
from vllm_adrenaline.launch.engine_command import EngineCommand
from vllm_adrenaline.launch.supervisor import Supervisor
from vllm_adrenaline.offline.arguments import flags_of
from vllm_adrenaline.system import cores
from vllm_adrenaline.system.memory import read

WATCH_S = 0.5
PATIENCE_S = 5.0
"""How long an engine may take to end when it is asked to."""
MEMORY = "gpu_memory_utilization"


def cores_of_engines(share_all: bool) -> dict[str, str]:
    """Return the cores of each role, "prefill" and "decode"; none where vLLM or its user divides them.

    `share_all`: both get all.
    """
    if not versions.is_cpu_build() or CORES_ENV in os.environ:
        return {}
    physical = cores.physical_cores()
    decode, prefill = (cores.ranges(physical),) * 2 if share_all else cores.split_cores(physical)
    return {"decode": decode, "prefill": prefill}


def with_memory(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return an engine's arguments with its half of this machine's memory, if nobody chose how much it takes."""
    if not versions.is_cpu_build() or memory.is_chosen(flags_of(dict.fromkeys(arguments, 0)), os.environ):
        return dict(arguments)
    return {**arguments, MEMORY: round(memory.utilization(read(), 2), 3)}


def listen_address(folder: Path) -> str:
    """Return the control address of the prefill engine whose sockets are in `folder`."""
    return f"ipc://{folder}/prefill"


def prefill_engine(model: str, folder: Path, arguments: Mapping[str, Any], on_cores: str | None) -> EngineCommand:
    """Return how the prefill engine is started. In `folder` it serves, and listens for the decode engine."""
    flags = ["--plugin", "adrenaline", "--adrenaline-role", "prefill", "--adrenaline-listen", listen_address(folder)]
    env = {CORES_ENV: on_cores} if on_cores else {}
    return engine_command.vllm_server("prefill", model, folder / "prefill.http", [*flags, *flags_of(arguments)], env)


@contextmanager
def environment(on_cores: str | None, peers_start_too: bool) -> Iterator[None]:
    """Have what starts in the context begin on these cores, not wait for its peers, and end with this process."""
    wanted = {
        CORES_ENV: on_cores,
        PEERS_START_TOO: "1" if peers_start_too else None,
        ENDS_WITH_STARTER: str(os.getpid()),
    }
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update({name: value for name, value in wanted.items() if value is not None})
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _end(pid: int | None, by_force: bool) -> None:
    """End a child of this process, with what it has started. By force one that is starting, and hears no signal."""
    with contextlib.suppress(psutil.NoSuchProcess):
        child = psutil.Process(pid)
        if not by_force:
            child.terminate()
            return
        for each in [*child.children(recursive=True), child]:
            with contextlib.suppress(psutil.NoSuchProcess):
                each.kill()


@contextmanager
def ending_with(supervisor: Supervisor | None) -> Iterator[None]:
    """End what this process starts in the context as soon as an engine of the supervisor ends.

    Else a decode engine would wait for a prefill engine that failed. Raises AdrenalineError with what that engine said.
    """
    if supervisor is None:
        yield
        return
    before, is_done, failures = set(multiprocessing.active_children()), threading.Event(), list[AdrenalineError]()

    def watch() -> None:
        kill_at = 0.0
        while not is_done.wait(WATCH_S):
            try:
                if not failures:
                    supervisor.check()
            except AdrenalineError as error:
                failures.append(error)
                kill_at = time.monotonic() + PATIENCE_S
            if failures:  # also what starts only now
                for child in set(multiprocessing.active_children()) - before:
                    _end(child.pid, by_force=time.monotonic() > kill_at)

    watcher = threading.Thread(target=watch, name="adrenaline-watch", daemon=True)
    watcher.start()
    try:
        yield
    except Exception as error:
        if failures:
            raise failures[0] from error
        raise
    finally:
        is_done.set()
        watcher.join()
    if failures:
        raise failures[0]
