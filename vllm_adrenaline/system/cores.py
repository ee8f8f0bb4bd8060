"""How an engine's processes share cores on CPU: workers stay on their own cores, and nothing waits by spinning.

vLLM's workers and engine core wait for each other in a sched_yield loop for a second after every message, and only then
sleep (vllm/distributed/device_communicators/shm_broadcast.py, SpinCondition; 0.32 run, 0.33 read). A prefill
engine with a prompt on offer steps every millisecond, so it would spin without end, on the very cores the attention
executor needs.
"""

import contextlib
import functools
import os
import re
import time
from collections.abc import Collection
from typing import Any

from vllm_adrenaline.errors import AdrenalineError
from vllm_adrenaline.system import priority

SHORTEST_S, LONGEST_S, OF_THE_WAIT = 50e-6, 400e-6, 1 / 16
"""Sleeps between polls of a message queue: this part of the wait so far, within limits."""
MAX_CORES = 4096
AFFINITY_VARIABLES = ("KMP_AFFINITY", "GOMP_CPU_AFFINITY", "OMP_PLACES")


def wait_without_spinning() -> None:
    """Let this process's message queues sleep between polls, longer the longer they wait. Idempotent.

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


def parse(text: str) -> list[list[int]]:
    """Return the cores of each rank in "0-3,8|4-7"; [] for an empty text. Raises AdrenalineError."""
    ranks = []
    for part in text.split("|") if text else []:
        cores: set[int] = set()
        for item in part.split(","):
            found = re.fullmatch(r"(\d+)(?:-(\d+))?", item.strip())
            if found is None:
                raise AdrenalineError(f"{text!r} is no list of cores: write it like 0-3,8 or, for two ranks, 0-3|4-7")
            cores |= set(range(int(found[1]), int(found[2] or found[1]) + 1))
        if not cores or max(cores) >= MAX_CORES:
            raise AdrenalineError(f"{part!r} in {text!r} names no core, or one beyond {MAX_CORES}")
        ranks.append(sorted(cores))
    return ranks


def ranges(cores: Collection[int]) -> str:
    """Return cores as `parse` reads them, the shortest way: 0-3,8."""
    runs: list[list[int]] = []
    for core in sorted(cores):
        if runs and core == runs[-1][-1] + 1:
            runs[-1][1:] = [core]
        else:
            runs.append([core])
    return ",".join("-".join(map(str, run)) for run in runs)


def check(text: str, ranks: int) -> None:
    """Raise AdrenalineError unless `text` is empty, or has cores of this machine for so many ranks."""
    wanted = parse(text)
    if wanted and len(wanted) != ranks:
        raise AdrenalineError(f"--adrenaline-executor-cores {text} is for {len(wanted)} rank(s); there are {ranks}")
    for core in (core for cores in wanted for core in cores):
        if not os.path.exists(f"/sys/devices/system/cpu/cpu{core}"):
            raise AdrenalineError(f"--adrenaline-executor-cores {text}: this machine has no core {core}")


def bound_cores() -> set[int]:
    """Return the cores vLLM bound this worker's OpenMP threads to (VLLM_CPU_OMP_THREADS_BIND); all, if it did not."""
    for name in AFFINITY_VARIABLES:
        cores = re.search(r"(?:proclist=\[|\{|^)([\d ,]+)", os.environ.get(name, ""))
        if cores:
            return {int(core) for core in re.findall(r"\d+", cores[1])}
    return os.sched_getaffinity(0)


def come_first() -> None:
    """Give all threads of this process a niceness of -10, where that is permitted (CAP_SYS_NICE); else nothing changes.

    For those a decode step waits for, the engine core and its workers: what they share cores with (API servers, front
    doors) delays one client by a moment, but through them every request of the batch.
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
