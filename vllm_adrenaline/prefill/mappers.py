"""Who has this prefill engine's KV cache mapped: decode workers, which can write into it as long as they live.

What such a decode engine has is not taken back for its silence. A worker that only slept would wake up, and write into
blocks that are somebody else's by then. It is taken back when its workers have ended, or when it says itself that it
uses nothing of it any more.
"""

from __future__ import annotations

import os
import select
import threading

from vllm_adrenaline.errors import AdrenalineError
from vllm_adrenaline.system.process import has_ended, pid_of

MAX_WORKERS = 256
"""Workers of one decode engine at most; one that asks again counts again."""


class Mappers:
    """The decode workers that have the KV cache mapped, by what they belong to (messages.Welcome, `member`).

    The control thread adds them. `wait` is called in threads of its own.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._workers: dict[str, list[int]] = {}  # their pidfds
        self._bells: dict[str, int] = {}  # an eventfd for each member: it has let go

    def add(self, member: str, process: int) -> None:
        """Note that a process, of which this is a pidfd, maps the KV cache. The caller closes the pidfd.

        Raises AdrenalineError if it has ended, or if the member has asked MAX_WORKERS times already.
        """
        pid_of(process)  # it is one
        with self._lock:
            workers = self._workers.get(member, [])
            if len(workers) >= MAX_WORKERS:
                raise AdrenalineError(f"the decode engine has {MAX_WORKERS} workers already")
            if has_ended(process):
                raise AdrenalineError("the process of the decode worker has ended")
            if member not in self._bells:
                self._bells[member] = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
            self._workers[member] = [*workers, os.dup(process)]

    def may_write(self, member: str) -> bool:
        """Whether a worker of a member lives that has the KV cache mapped."""
        with self._lock:
            return not all(map(has_ended, self._workers.get(member, [])))

    def pids(self) -> list[int]:
        """Return the processes that live and have the KV cache mapped, of those that this PID namespace shows."""
        with self._lock:
            found = {pid_of(each) for workers in self._workers.values() for each in workers if not has_ended(each)}
        return sorted(found - {0})

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
            bell, pidfds = self._bells.get(member), self._workers.get(member, [])
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
            bell, workers = self._bells.pop(member, None), self._workers.pop(member, [])
        for fd in (*workers, *(() if bell is None else (bell,))):
            os.close(fd)
