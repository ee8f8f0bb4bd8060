"""A share of CPU cores for a process that runs: how many cores, and what priority on cores that others use too."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Collection

ORDINARY = "ordinary priority"
PROMPT_NICENESS = -10
NICE_FACTOR = 1.25
"""Weight of a nice level against the next in Linux's fair scheduler (kernel/sched/core.c, sched_prio_to_weight)."""


def threads_of(share: float, cores: int) -> int:
    """Return how many of `cores` a share from 0 to 1 is, at least one."""
    return max(1, round(share * cores))


def niceness_of(share: float) -> int | None:
    """Return the niceness that gets `share` of a core, 0 to 1, against a competitor of niceness 0.

    None stands for real-time priority, before all others, and is the answer for a share of 1.
    """
    if share >= 1:
        return None
    share = max(share, 0.01)
    return min(19, max(-20, round(-math.log(share / (1 - share)) / math.log(NICE_FACTOR))))


def take_share(pid: int, share: float) -> str:
    """Give all threads of a process the priority of a share of its cores, and return in words what it has now.

    Real-time priority takes nothing from others but the time of the executor's work: it sleeps when it has nothing to
    do, and the kernel keeps 5 % of every second for others (kernel.sched_rt_runtime_us). It needs CAP_SYS_NICE or
    RLIMIT_RTPRIO. Where it is not permitted, a niceness of -10 is tried; where that is not permitted either, nothing
    changes. Threads that start later inherit from the one that starts them.
    """
    niceness = niceness_of(share)
    attempts = [niceness] if niceness is not None else [None, PROMPT_NICENESS]
    for attempt in attempts:
        with contextlib.suppress(PermissionError):
            set_niceness(pid, attempt)
            return "real-time priority" if attempt is None else f"niceness {attempt}"
    return ORDINARY


def require_permission() -> None:
    """Raise PermissionError unless this process may give any niceness to processes of its user.

    Without that permission a niceness only rises. What is taken from a process could not be given back.
    """
    before = os.getpriority(os.PRIO_PROCESS, 0)  # of this thread
    try:
        os.setpriority(os.PRIO_PROCESS, 0, -20)
    except PermissionError:
        raise PermissionError("priorities may not be raised here: it takes CAP_SYS_NICE, or ulimit -e 40") from None
    os.setpriority(os.PRIO_PROCESS, 0, before)


def is_grouped_apart(pid: int, other: int) -> bool:
    """Whether the kernel shares cores between the sessions of two processes, so that their priorities do not compare.

    It does so for processes that are in no CPU control group of their own (kernel.sched_autogroup_enabled).
    """
    try:
        with open("/proc/sys/kernel/sched_autogroup_enabled") as setting:
            is_on = setting.read().strip() == "1"
        return is_on and os.getsid(pid) != os.getsid(other)
    except (FileNotFoundError, ProcessLookupError):
        return False


def set_niceness(pid: int, niceness: int | None) -> None:
    """Give all threads of a process a niceness, or real-time priority for None. Raises PermissionError."""
    for thread in _threads(pid):
        with contextlib.suppress(ProcessLookupError):  # it ended meanwhile
            _take(thread, niceness)


def come_first() -> None:
    """Give all threads of this process a niceness of -10. Where that is not permitted (CAP_SYS_NICE), nothing changes.

    For the engine core and its workers, which every request of a decode step waits for. API servers and the proxy share
    cores with them, and a moment's delay of those touches one client only.
    """
    with contextlib.suppress(PermissionError):
        set_niceness(os.getpid(), PROMPT_NICENESS)


def _take(thread: int, niceness: int | None) -> None:
    if niceness is None:
        os.sched_setscheduler(thread, os.SCHED_FIFO, os.sched_param(1))
        return
    if os.sched_getscheduler(thread) != os.SCHED_OTHER:
        os.sched_setscheduler(thread, os.SCHED_OTHER, os.sched_param(0))
    os.setpriority(os.PRIO_PROCESS, thread, niceness)


def keep_to(pid: int, cores: Collection[int]) -> None:
    """Keep all threads of a process on `cores`, numbers of processors."""
    for thread in _threads(pid):
        with contextlib.suppress(ProcessLookupError):
            os.sched_setaffinity(thread, cores)


def _threads(pid: int) -> list[int]:
    try:
        return [int(name) for name in os.listdir(f"/proc/{pid}/task")]
    except FileNotFoundError:
        return []
