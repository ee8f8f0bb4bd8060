"""What the kernel says of another process, by descriptors: numbers of processes mean nothing in another PID namespace.

A process opens two descriptors of itself and passes them to others (descriptors.py). Its pidfd says when it has ended.
Its folder of /proc says what it does; opened there, it is read here, even where this /proc does not show the process.
"""

from __future__ import annotations

import contextlib
import os
import select
import threading
from pathlib import Path

from vllm_adrenaline.errors import AdrenalineError

MAX_STAT = 512
"""Bytes of a thread's `stat` that are read. The state stands behind the name, which has up to 15 characters."""


def open_own() -> list[int]:
    """Return what others know this process by: its pidfd and its folder of /proc. The caller closes both."""
    pidfd = os.pidfd_open(os.getpid())
    try:
        return [pidfd, os.open(f"/proc/{os.getpid()}", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)]
    except BaseException:
        os.close(pidfd)
        raise


def has_ended(pidfd: int) -> bool:
    """Whether a process has ended."""
    poller = select.poll()
    poller.register(pidfd, select.POLLIN)
    return bool(poller.poll(0))


def pid_of(pidfd: int) -> int:
    """Return the number of a process as it is here. 0: it is not seen here, or has ended.

    Raises AdrenalineError if the descriptor is none of a process.
    """
    for line in Path(f"/proc/self/fdinfo/{pidfd}").read_text().splitlines():
        if line.startswith("Pid:"):
            return max(0, int(line.split()[1]))
    raise AdrenalineError("a descriptor that was passed is none of a process")


class PeerProcess:
    """A process that passed its descriptors. It may be asked and closed by several threads.

    Attributes:
        pidfd: ready to be read when the process has ended.
        folder: of /proc.
    """

    def __init__(self, descriptors: list[int]) -> None:
        """Take what the other process has opened with `open_own`; `close` closes it.

        Raises AdrenalineError, and closes it, if it is something else.
        """
        try:
            if len(descriptors) != 2:
                raise AdrenalineError(f"{len(descriptors)} descriptors of a process were passed, and not 2")
            pid_of(descriptors[0])
        except BaseException:
            for each in descriptors:
                os.close(each)
            raise
        self.pidfd, self.folder = descriptors
        self._lock = threading.Lock()

    def has_ended(self) -> bool:
        """Whether it has ended. True once it is closed."""
        with self._lock:
            return self.pidfd < 0 or has_ended(self.pidfd)

    def is_stopped(self) -> bool:
        """Whether it was stopped, by SIGSTOP or by a debugger. False if it is not there."""
        with self._lock:
            return self._state("stat") in ("T", "t")

    def works(self) -> bool:
        """Whether a thread of it runs, wants to run, or waits for a disk or for memory; False if it is not there.

        One that was stopped, or whose threads all sleep, does not work. One that gets no CPU does
        (csrc/shm/process.h).
        """
        with self._lock, contextlib.suppress(OSError):
            tasks = os.open("task", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=self.folder)
            try:
                return any(self._state(f"task/{thread}/stat") in ("R", "D") for thread in os.listdir(tasks))
            finally:
                os.close(tasks)
        return False

    def _state(self, stat: str) -> str:
        """Return the state of a thread as a letter of proc(5); empty if it is not there."""
        with contextlib.suppress(OSError, IndexError):
            file = os.open(stat, os.O_RDONLY | os.O_CLOEXEC, dir_fd=self.folder)
            try:
                return os.read(file, MAX_STAT).rpartition(b")")[2].split()[0].decode()
            finally:
                os.close(file)
        return ""

    def close(self) -> None:
        """Close the descriptors, once."""
        with self._lock:
            for each in (self.pidfd, self.folder):
                if each >= 0:
                    os.close(each)
            self.pidfd = self.folder = -1
