"""Start engines, wait until they are ready, notice when one ends, stop them all. Runs in the launching process."""

from __future__ import annotations

import http.client
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from vllm_adrenaline.errors import AdrenalineError
from vllm_adrenaline.launch.process import EngineProcess
from vllm_adrenaline.launch.roles import EngineSpec
from vllm_adrenaline.launch.running import Running

STOP_S = 15.0
PROBE_S = 0.5
PROGRESS_S = 10.0
LOG_FOLDERS_KEPT = 10


def say(text: str) -> None:
    """Show one line of progress."""
    print(f"[adrenaline] {text}", flush=True)


def log_folder() -> Path:
    """Return a new folder for the logs of one run; the oldest ones are removed."""
    base = os.environ.get("XDG_CACHE_HOME")
    parent = (Path(base) if base else Path.home() / ".cache") / "vllm-adrenaline" / "logs"
    parent.mkdir(parents=True, exist_ok=True)
    old = sorted((path for path in parent.iterdir() if path.is_dir()), key=lambda path: path.stat().st_mtime)
    for path in old[: -LOG_FOLDERS_KEPT + 1]:
        shutil.rmtree(path, ignore_errors=True)
    return Path(tempfile.mkdtemp(prefix=time.strftime("%Y%m%d-%H%M%S-"), dir=parent))


def is_ready(port: int) -> bool:
    """Say whether the engine on this loopback port answers /health with 200."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=2)
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


class Supervisor(Running):
    """Engines that live and die together; a context manager that leaves no process behind."""

    def __init__(self, specs: Sequence[EngineSpec], *, logs: Path | None = None, ready_timeout: float = 1800) -> None:
        self.specs = list(specs)
        self.ready_timeout = ready_timeout
        self.logs = logs
        self.processes: dict[str, EngineProcess] = {}

    def start(self) -> None:
        """Start all engines and return when each of them is healthy."""
        self.logs = self.logs or log_folder()
        for spec in self.specs:
            log = self.logs / f"{spec.name}.log"
            self.processes[spec.name] = EngineProcess(spec.name, spec.command, {**os.environ, **spec.env}, log)
            say(f"{spec.name} engine: started as process {self.processes[spec.name].pid}, log: {log}")
        self._wait_until_ready()

    def check(self) -> None:
        """Raise AdrenalineError if an engine has ended."""
        for process in self.processes.values():
            if process.exit_status is not None:
                raise AdrenalineError(process.failure())

    def stop(self) -> None:
        """Stop all engines and everything that they started; may be called again."""
        if not self.processes:
            return
        for process in self.processes.values():
            process.terminate()
        deadline = time.monotonic() + STOP_S
        for process in self.processes.values():
            process.finish(deadline)
        self.processes.clear()

    def _wait_until_ready(self) -> None:
        started = time.monotonic()
        waiting = {spec.name: spec for spec in self.specs}
        live = sys.stdout.isatty()
        shown = started
        while waiting:
            time.sleep(PROBE_S)
            self.check()
            now = time.monotonic()
            seconds = f"{now - started:.0f} s"
            if live:
                print(f"\r\033[K[adrenaline] {', '.join(waiting)}: starting, {seconds}", end="", flush=True)
            elif now - shown >= PROGRESS_S:
                shown = now
                say(f"{', '.join(waiting)}: starting, {seconds}")
            for name in [name for name, spec in waiting.items() if is_ready(spec.port)]:
                del waiting[name]
                self.processes[name].remember_shared_memory()
                print("\r\033[K" if live else "", end="")
                say(f"{name} engine: ready after {seconds}")
            if now - started > self.ready_timeout:
                logs = ", ".join(str(self.processes[name].log) for name in waiting)
                raise AdrenalineError(f"not ready after {seconds}: {', '.join(waiting)}; see {logs}")
