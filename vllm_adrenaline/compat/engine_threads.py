"""The threads of vLLM's engine processes on CPU: workers stay on their own cores, and nothing waits by spinning.

vLLM's workers and engine core wait for each other in a sched_yield loop for a second after every message, and only then
sleep (vllm/distributed/device_communicators/shm_broadcast.py, SpinCondition; 0.32 run, 0.33 read). A prefill engine
with a prompt on offer steps every millisecond. It would spin without end, on the very cores that the attention executor
needs.
"""

from __future__ import annotations

import contextlib
import functools
import os
import re
import time
from typing import Any

from vllm_adrenaline.system import priority

CORES_ENV = "VLLM_CPU_OMP_THREADS_BIND"
"""vLLM's variable for the cores of an engine's workers."""
AFFINITY_VARIABLES = ("KMP_AFFINITY", "GOMP_CPU_AFFINITY", "OMP_PLACES")
SHORTEST_S, LONGEST_S, OF_THE_WAIT = 50e-6, 400e-6, 1 / 16
"""Sleeps between polls of a message queue: this part of the wait so far, within limits."""


def wait_without_spinning() -> None:
    """Let this process's message queues sleep between polls, longer the longer they wait. Once more does no harm.

    Polls every 50 us took 10 to 14 % of a core in every engine that worked. vLLM's own notifications are no way out: it
    counts on polling and lets some get lost (a PUB socket with a high water mark of 1).

    Removal condition: vLLM lets one set the busy-loop time of its message queues.
    """
    from vllm.distributed.device_communicators import shm_broadcast

    wait = shm_broadcast.SpinCondition.wait
    if hasattr(wait, "__wrapped__"):
        return

    @functools.wraps(wait)
    def sleeping(self: Any, timeout_ms: int | None = None) -> None:
        now = time.monotonic()
        if now > self.last_read + self.busy_loop_s:
            wait(self, timeout_ms)  # idle: until a notification
            return
        if getattr(self, "waits_since_read", None) != self.last_read:
            self.waits_since_read, self.waits_from = self.last_read, now
        time.sleep(min(max(SHORTEST_S, (now - self.waits_from) * OF_THE_WAIT), LONGEST_S))

    shm_broadcast.SpinCondition.wait = sleeping
    shm_broadcast.sched_yield = lambda: time.sleep(SHORTEST_S)


def bound_cores() -> set[int]:
    """Return the cores that vLLM bound this worker's OpenMP threads to, or all that this process may use."""
    for name in AFFINITY_VARIABLES:
        cores = re.search(r"(?:proclist=\[|\{|^)([\d ,]+)", os.environ.get(name, ""))
        if cores:
            return {int(core) for core in re.findall(r"\d+", cores[1])}
    return os.sched_getaffinity(0)


def come_first() -> None:
    """Give all threads of this process a niceness of -10. Where that is not permitted (CAP_SYS_NICE), nothing changes.

    For the engine core and its workers, which every request of a decode step waits for. API servers and the proxy share
    cores with them, and a moment's delay of those touches one client only.
    """
    with contextlib.suppress(PermissionError):
        priority.set_niceness(os.getpid(), priority.PROMPT_NICENESS)


def settle_worker() -> None:
    """Keep all threads of this worker on the cores of its OpenMP threads.

    Called when the worker is made and again when it is ready: meanwhile NixlConnector moves the main thread to the last
    core of each NUMA node (vllm/distributed/kv_transfer/kv_connector/v1/nixl/base_worker.py; 0.32, run).
    """
    wait_without_spinning()
    priority.keep_to(os.getpid(), bound_cores())
