"""One engine as a child process with a process group and a log file of its own. It ends when its parent does."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

from vllm_adrenaline.launch.engine_command import PROXY
from vllm_adrenaline.system.child import dying_with_parent

SHM = "/dev/shm/"
MADE_BY_ENGINES = ("psm_", "sem.mp-", "ucx_", "torch_")
"""How the names of files begin that Python's multiprocessing, UCX and torch make in /dev/shm. An engine maps files of
others, too: a user's weights, say."""
TRACKER_COMMAND = b"multiprocessing.resource_tracker"
LOG_LIMIT = 32 << 20
"""Bytes of a log. What is above that is moved to a second file, which the next such one replaces."""
LOG_TAIL = 200_000
"""Bytes at the end of a log that are read."""
TRACKER_S = 3.0
"""Seconds that a resource tracker may take to end once all others of its group are gone."""
# vLLM puts "(EngineCore pid=7)" and "ERROR 11-20 22:13:22 [core.py:99]" before each line.
LOG_PREFIX = re.compile(r"^(\([^)]* pid=\d+\)\s*)?([A-Z]+ \d\d-\d\d \d\d:\d\d:\d\d (\[[^\]]*\] ?)?)?")
FAILURE = re.compile(r"^[\w.]*(Error|Exception|Interrupt)\b:? |^[\w./-]+: error: |^adrenaline: ")
THREAD_DIED = "Exception in thread "
# Says only that something else, printed before it, went wrong.
CONSEQUENCE = "Engine core initialization failed"


def group_members(group: int) -> list[int]:
    """Return the ids of a process group's processes, without zombies."""
    members = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        with contextlib.suppress(OSError):
            # After the name, which may hold blanks and parentheses: state, parent, process group.
            state, _, pgrp = (entry / "stat").read_text().rpartition(")")[2].split()[:3]
            if int(pgrp) == group and state != "Z":
                members.append(int(entry.name))
    return members


def is_tracker(pid: int) -> bool:
    """Say whether a process is a resource tracker of Python's multiprocessing."""
    with contextlib.suppress(OSError):
        return TRACKER_COMMAND in Path(f"/proc/{pid}/cmdline").read_bytes()
    return False


def meaningful_lines(text: str, count: int = 3) -> list[str]:
    """Return what a log says went wrong: its last error messages, or its last lines if there are none."""
    lines = [LOG_PREFIX.sub("", line).rstrip() for line in text.splitlines()]
    errors = list(dict.fromkeys(line for line in lines if FAILURE.match(line)))
    causes = [line for line in errors if CONSEQUENCE not in line] or errors
    return causes[-count:] or [line for line in lines if line.strip()][-count:]


class EngineProcess:
    """An engine, or any other command, that runs in a process group of its own and writes to the file `log`.

    `files` are the numbers of open files that it gets.
    """

    def __init__(
        self, name: str, command: Sequence[str], env: dict[str, str], log: Path, files: Sequence[int] = ()
    ) -> None:
        self.name, self.log = name, log
        self.label = PROXY if name == PROXY else f"{name} engine"
        self._shm: set[str] = set()
        self._there_before = set(os.listdir(SHM))
        log.write_bytes(b"")
        with log.open("ab") as output:  # appended to: after a cut it goes on at the new end
            self._popen = subprocess.Popen(
                dying_with_parent(command),
                env=env,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                # Not start_new_session: Linux gives every session a scheduling group of its own, and such groups were
                # seen to starve each other for minutes (docs/vllm-notes.md).
                process_group=0,
                pass_fds=files,
            )

    @property
    def pid(self) -> int:
        """Return the process id, which is the id of the group too."""
        return self._popen.pid

    @property
    def exit_status(self) -> int | None:
        """Return the exit status, or None while it runs."""
        return self._popen.poll()

    def failure(self) -> str:
        """Return one message for the user about an engine that ended by itself."""
        status = self.exit_status
        how = (
            f"was killed by {signal.Signals(-status).name}" if status and status < 0 else f"ended with status {status}"
        )
        return self.explained(f"the {self.label} {how}")

    def explained(self, what: str) -> str:
        """Return one message for the user: `what` happened, and what the log says of it."""
        return "\n".join([f"{what}; its log: {self.log}", *(f"  | {line}" for line in meaningful_lines(self._said()))])

    @property
    def last_line(self) -> str:
        """Return what the engine said last."""
        lines = [line for line in (LOG_PREFIX.sub("", each).strip() for each in self._said().splitlines()) if line]
        return lines[-1] if lines else ""

    def bound_log(self) -> None:
        """Cut the log when it has grown too long. Lines that are written in the very moment may be lost."""
        with contextlib.suppress(OSError):  # it was removed
            if self.log.stat().st_size > LOG_LIMIT:
                second = Path(f"{self.log}.1")
                try:
                    shutil.copyfile(self.log, second)
                except OSError:  # the disk is full, and this log would keep it so
                    second.unlink(missing_ok=True)
                finally:
                    os.truncate(self.log, 0)

    @property
    def thread_died(self) -> bool:
        """Say whether the log tells of a thread that ended by an exception. Others may wait for it for ever."""
        return THREAD_DIED in self._said()

    @property
    def silent_s(self) -> float:
        """Return the seconds since the log last grew."""
        try:
            return max(0.0, time.time() - self.log.stat().st_mtime)
        except OSError:  # removed: later runs keep only so many
            return 0.0

    def _said(self) -> str:
        try:
            with self.log.open("rb") as log:
                log.seek(max(0, log.seek(0, os.SEEK_END) - LOG_TAIL))
                return log.read().decode(errors="replace")
        except OSError:
            return ""

    def remember_shared_memory(self) -> None:
        """Remember the files in /dev/shm that the group made and has mapped: a killed process leaves them behind."""
        for pid in group_members(self.pid):
            with contextlib.suppress(OSError):
                for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
                    name = line.partition(SHM)[2]
                    if name.startswith(MADE_BY_ENGINES) and name not in self._there_before:
                        self._shm.add(SHM + name)

    def terminate(self) -> None:
        """Ask the engine to stop; it stops its own children."""
        if self.exit_status is None:
            self.remember_shared_memory()
            self._popen.terminate()

    def finish(self, deadline: float) -> None:
        """Wait until the whole group has ended, or until `deadline` (time.monotonic); then kill what is left of it.

        Shared memory that it left behind is removed.
        """
        while time.monotonic() < deadline and (self.exit_status is None or group_members(self.pid)):
            time.sleep(0.05)
        # The id stays the group's own as long as there is a member, so this cannot hit another group.
        patience = time.monotonic() + TRACKER_S
        while members := group_members(self.pid):
            self.remember_shared_memory()
            # Python's resource trackers remove what the others leave in shared memory, and then end by themselves.
            spared = {pid for pid in members if time.monotonic() < patience and is_tracker(pid)}
            for pid in set(members) - spared:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.05)
        self._popen.wait()
        for path in self._shm:
            with contextlib.suppress(OSError):
                if os.stat(path).st_uid == os.getuid():
                    os.unlink(path)
