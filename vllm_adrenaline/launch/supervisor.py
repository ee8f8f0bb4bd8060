"""The supervisor of engines: it starts them, waits until they are ready, notices when one ends, and stops them all."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from pathlib import Path

from vllm_adrenaline.errors import AdrenalineError
from vllm_adrenaline.launch.engine_command import EngineCommand
from vllm_adrenaline.launch.process import EngineProcess
from vllm_adrenaline.launch.running import Running
from vllm_adrenaline.system import http_get
from vllm_adrenaline.system.folders import cache_folder, make_private
from vllm_adrenaline.system.http_get import UNIX
from vllm_adrenaline.system.terminal import StatusLine, say

STOP_S = 15.0
PROBE_S = 0.5
PROGRESS_S = 10.0
STUCK_S = 20.0
"""Seconds without a new line in its log after which an engine that lost a thread counts as stuck."""
LAST_LINE = 70
"""Characters of an engine's log that are shown while it starts."""
LOG_FOLDERS_KEPT = 10


def log_folder() -> Path:
    """Make and return a folder for the logs of one run. Only the last ten such folders are kept."""
    parent = make_private(cache_folder("logs"))
    old = sorted((path for path in parent.iterdir() if path.is_dir()), key=lambda path: path.stat().st_mtime)
    for path in old[: -LOG_FOLDERS_KEPT + 1]:
        shutil.rmtree(path, ignore_errors=True)
    return Path(tempfile.mkdtemp(prefix=time.strftime("%Y%m%d-%H%M%S-"), dir=parent))


def is_ready(url: str) -> bool:
    """Say whether the engine or proxy at this address answers /health with 200 within two seconds."""
    try:
        return http_get.get(url, "/health", 2)[0] == 200
    except OSError:
        return False


class Supervisor(Running):
    """A context manager that runs engines together and leaves no process behind.

    `ready_timeout` and `silence_limit` are the seconds after which a start is given up: in all, and without a new line
    in the log of an engine. `logs` is the folder for the engines' logs; None makes one in the user's cache.
    """

    def __init__(
        self,
        specs: Sequence[EngineCommand],
        *,
        logs: Path | None = None,
        ready_timeout: float = 1800,
        silence_limit: float = 600,
    ) -> None:
        self.specs = list(specs)
        self.ready_timeout, self.silence_limit = ready_timeout, silence_limit
        self.logs = logs
        self.processes: dict[str, EngineProcess] = {}
        self._spawned_at = 0.0

    def start(self) -> None:
        """Start all engines and return when each of them is healthy. Raises AdrenalineError when one does not start."""
        self.spawn()
        self.wait_until_ready()

    def spawn(self) -> None:
        """Start all engines, and wait for none."""
        self.logs, self._spawned_at = self.logs or log_folder(), time.monotonic()
        for spec in self.specs:
            self.launch(spec)

    def add(self, spec: EngineCommand) -> None:
        """Start one more process, and return when it is healthy. Raises AdrenalineError when it does not start."""
        self.specs.append(spec)
        self._spawned_at = time.monotonic()
        self.launch(spec)
        self.wait_until_ready([spec])

    def launch(self, spec: EngineCommand) -> None:
        """Start a process, for the first time or again. The log of its last life is kept beside the new one."""
        assert self.logs is not None, "the supervisor has started"
        log = self.logs / f"{spec.name}.log"
        with suppress(FileNotFoundError):
            log.rename(self.logs / f"{spec.name}.log.1")
        if spec.url.startswith(UNIX):  # vLLM does not bind where a killed engine left its socket
            Path(spec.url.removeprefix(UNIX)).unlink(missing_ok=True)
        process = EngineProcess(spec.name, spec.argv, {**os.environ, **spec.env}, log, spec.files)
        self.processes[spec.name] = process
        say(f"{process.label}: started as process {process.pid}, log: {log}")

    def check(self) -> None:
        """Raise AdrenalineError if an engine has ended."""
        for process in self.processes.values():
            if process.exit_status is not None:
                raise AdrenalineError(process.failure())

    def stop(self) -> None:
        """Stop all engines and everything that they started; may be called again."""
        for process in self.processes.values():
            process.terminate()
        deadline = time.monotonic() + STOP_S
        with ExitStack() as stack:  # one that cannot be stopped keeps no other from it
            for process in self.processes.values():
                stack.callback(process.finish, deadline)
            self.processes = {}

    def end(self, name: str, more_s: float) -> None:
        """Stop one process for good. It has `more_s` seconds more than others."""
        if (process := self.processes.pop(name, None)) is not None:
            process.terminate()
            process.finish(time.monotonic() + STOP_S + more_s)

    def stuck(self, process: EngineProcess, seconds: float) -> str | None:
        """Say in words why a process that has been starting for so many seconds will not be ready; None if it may."""
        if process.thread_died and process.silent_s > STUCK_S:
            return process.explained(f"the {process.label} does not start: one of its threads ended")
        if process.silent_s > self.silence_limit or seconds > self.ready_timeout:
            what = f"said nothing for {process.silent_s:.0f} s" if seconds <= self.ready_timeout else "is not up"
            return process.explained(f"the {process.label} {what}, and is given up after {seconds:.0f} s")
        return None

    def wait_until_ready(self, specs: Sequence[EngineCommand] | None = None) -> None:
        """Return when these or all processes are healthy. Raises AdrenalineError when one does not start."""
        waiting = {spec.name: spec for spec in specs or self.specs}
        line = StatusLine(PROGRESS_S)
        while waiting:
            time.sleep(PROBE_S)
            self.check()
            seconds = time.monotonic() - self._spawned_at
            for name in [name for name, spec in waiting.items() if is_ready(spec.url)]:
                del waiting[name]
                self.processes[name].remember_shared_memory()
                line.keep(f"{self.processes[name].label}: ready after {seconds:.0f} s")
            if waiting:
                said = {name: self.processes[name].last_line[:LAST_LINE] or "starting" for name in waiting}
                line.show(f"{seconds:.0f} s, {'; '.join(f'{name}: {last}' for name, last in said.items())}")
            for process in (self.processes[name] for name in waiting):
                if why := self.stuck(process, seconds):
                    raise AdrenalineError(why)
