"""Who has this prefill engine's KV cache mapped: decode workers, which can write into it as long as they live.

What such a decode engine has is not taken back for its silence. A worker that only slept would wake up, and write into
blocks that are somebody else's by then. It is taken back when its workers have ended, or when it says itself that it
uses nothing of it any more.
"""

from __future__ import annotations

import errno
import os
import select
import threading

MAX_WORKERS = 256
"""Workers of one decode engine at most."""


class Mappers:
    """The decode workers that have the KV cache mapped, by what they belong to (messages.Welcome, `member`).

    The control thread adds them. `wait` is called in threads of its own.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._workers: dict[str, dict[int, int]] = {}  # process id and pidfd
        self._bells: dict[str, int] = {}  # an eventfd for each member: it has let go

    def add(self, member: str, pid: int) -> None:
        """Note that process `pid` maps the KV cache.

        Raises OSError if it has ended or cannot be seen from here, or if the member has MAX_WORKERS already.
        """
        with self._lock:
            if pid in (workers := self._workers.get(member, {})):
                return
            if len(workers) >= MAX_WORKERS:
                raise OSError(errno.EMFILE, f"the decode engine has {MAX_WORKERS} workers already")
            pidfd = os.pidfd_open(pid)
            if member not in self._bells:
                self._bells[member] = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
            self._workers[member] = workers | {pid: pidfd}

    def may_write(self, member: str) -> bool:
        """Whether a worker of a member lives that has the KV cache mapped."""
        with self._lock:
            return any(not _has_ended(pidfd) for pidfd in self._workers.get(member, {}).values())

    def pids(self) -> list[int]:
        """Return the processes that live and have the KV cache mapped."""
        with self._lock:
            found = [each for workers in self._workers.values() for each in workers.items()]
            return [pid for pid, pidfd in found if not _has_ended(pidfd)]

    def let_go(self, member: str) -> None:
        """Note that a member uses nothing of what it had. For one that maps nothing this does nothing."""
        with self._lock:
            if member in self._bells:
                os.eventfd_write(self._bells[member], 1)

    def wait(self, member: str) -> None:
        """Return when no worker of a member writes any more: all have ended, or it has let go. Then forget it.

        The member must have left: nobody is added to it any more.
        """
        with self._lock:
            bell, pidfds = self._bells.get(member), list(self._workers.get(member, {}).values())
        if bell is None:
            return
        poller = select.poll()
        poller.register(bell, select.POLLIN)
        for pidfd in pidfds:
            poller.register(pidfd, select.POLLIN)
        living = set(pidfds)
        while living:
            ready = {fd for fd, _ in poller.poll()}
            if bell in ready:
                break
            living -= ready
            for pidfd in ready:
                poller.unregister(pidfd)
        self.forget(member)

    def forget(self, member: str) -> None:
        """Forget a member that has left, and of which nothing is to be taken back any more."""
        with self._lock:
            bell, workers = self._bells.pop(member, None), self._workers.pop(member, {})
        for fd in (*workers.values(), *(() if bell is None else (bell,))):
            os.close(fd)


def _has_ended(pidfd: int) -> bool:
    poller = select.poll()
    poller.register(pidfd, select.POLLIN)
    return bool(poller.poll(0))
