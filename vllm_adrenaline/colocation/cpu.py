"""Shares of CPU cores: the priority of processes that run. No process is replaced, and each keeps its threads.

Cores have no limits for either phase, only weights against each other. So of the shares x and y only the parts count
that each phase gets while both want a core: x / (x + y) and y / (x + y).
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Iterable, Sequence

from vllm_adrenaline.colocation.controller import Phase, Shares
from vllm_adrenaline.system import priority

logger = logging.getLogger("vllm.adrenaline")

FIRST = 0.9
"""From this part on attention executors come before prefill: they get real-time priority. Of that the kernel keeps 5 %
of every second for others, so it is no more than they may have."""


class ExecutorShares:
    """A prefill engine against its attention executors, whose priority is moved. The prefill workers keep theirs."""

    def __init__(self, set_share: Callable[[float], str]) -> None:
        """`set_share` gives the executors a part of their cores, 1 for all, and says in words what they have."""
        self._set_share = set_share

    def take(self, shares: Shares) -> str:
        priority.require_permission()
        part = shares.part(Phase.DECODE)
        return self._set_share(1.0 if part >= FIRST else part)

    def advance(self) -> bool:
        return True


class WorkerShares:
    """A prefill engine's workers against the decode workers that have its KV cache mapped.

    Only the prefill workers' priority is moved, to what gives both sides their parts. A decode engine may map the
    memory of several prefill engines, which would move its workers by turns. It keeps its priority if this engine ends.
    And no process has its priority changed because somebody named it in a message.
    """

    def __init__(self, prefill: Sequence[int], decode: Callable[[], Iterable[int]]) -> None:
        """Take the process ids of the prefill workers, and what returns those of the decode workers."""
        self._prefill, self._decode = prefill, decode
        self._difference = 0  # of the decode workers' niceness and that of the prefill workers
        self._niceness: int | None = None  # of the prefill workers, as it was set last
        self._warned: set[str] = set()

    def take(self, shares: Shares) -> str:
        priority.require_permission()
        niceness = priority.niceness_of(shares.part(Phase.DECODE))
        assert niceness is not None, "prefill has a share"
        self._difference = niceness
        if not self.advance():
            return "as soon as a decode worker on the same cores has the KV cache mapped"
        return f"prefill workers: niceness {self._niceness}, decode workers: {niceness:+d}"

    def advance(self) -> bool:
        """Give the prefill workers the priority that is due now. Decode workers may have come, or come back."""
        decode = list(self._decode())
        workers = [found for found in map(_cores_and_niceness, decode) if found is not None]
        ours = set().union(*(found[0] for found in map(_cores_and_niceness, self._prefill) if found is not None))
        rivals = [niceness for cores, niceness in workers if cores & ours]
        if not rivals:
            if workers:
                self._warn_once("prefill and decode workers have no core in common: shares of cores change nothing")
            return False
        if any(priority.is_grouped_apart(self._prefill[0], pid) for pid in decode):
            self._warn_once(
                "prefill and decode engine run in sessions of their own, between which Linux shares cores whatever "
                "their priorities: start both from one shell, or set kernel.sched_autogroup_enabled=0"
            )
        niceness = min(19, max(-20, min(rivals) - self._difference))
        if niceness != self._niceness:
            for pid in self._prefill:
                priority.set_niceness(pid, niceness)
            self._niceness = niceness
        return True

    def _warn_once(self, text: str) -> None:
        if text not in self._warned:
            self._warned.add(text)
            logger.warning(text)


def _cores_and_niceness(pid: int) -> tuple[set[int], int] | None:
    """Return the cores that a process may use, and its niceness; None if it has ended."""
    with contextlib.suppress(ProcessLookupError):
        return set(os.sched_getaffinity(pid)), os.getpriority(os.PRIO_PROCESS, pid)
    return None
