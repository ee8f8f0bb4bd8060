"""How an engine's processes share cores on CPU: workers stay on their own cores, and nothing waits by sched_yield.

vLLM's workers and engine core wait for each other in a sched_yield loop for up to a second after every message
(vllm/distributed/device_communicators/shm_broadcast.py, SpinCondition; 0.32 run, 0.33 read). A prefill engine with a
prompt on offer steps every millisecond, so it would spin without end, on the very cores the attention executor needs.
"""

import contextlib
import os
import re
import time

from vllm_adrenaline.errors import AdrenalineError

PAUSE_S = 50e-6
MAX_CORES = 4096
AFFINITY_VARIABLES = ("KMP_AFFINITY", "GOMP_CPU_AFFINITY", "OMP_PLACES")


def wait_without_yield() -> None:
    """Let this process's message queues sleep 50 us between polls. Idempotent.

    Removal condition: vLLM lets one set the busy-loop time of its message queues.
    """
    from vllm.distributed.device_communicators import shm_broadcast

    shm_broadcast.sched_yield = lambda: time.sleep(PAUSE_S)


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


def settle_worker() -> None:
    """Keep all threads of this worker on the cores of its OpenMP threads.

    Called when the worker is made and again when it is ready: while it starts, something in it moves the main thread to
    the machine's last core, whatever was asked for (seen with vLLM 0.32 on two cores: every worker ended up on core 1).
    """
    wait_without_yield()
    cores = bound_cores()
    for thread in os.listdir("/proc/self/task"):
        with contextlib.suppress(ProcessLookupError):
            os.sched_setaffinity(int(thread), cores)
