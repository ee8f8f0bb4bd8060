"""A remedy for NixlConnector's choice of cores: workers stay on the cores of their OpenMP threads.

NixlConnector on CPU moves the main thread of every worker to the last core of each NUMA node, whatever
VLLM_CPU_OMP_THREADS_BIND says. That thread is also the first of the OpenMP threads.
"""

import os
import re

from vllm_adrenaline.compat.message_queue import wait_without_spinning
from vllm_adrenaline.system import priority

CORES_ENV = "VLLM_CPU_OMP_THREADS_BIND"
"""vLLM's variable for the cores of an engine's workers."""
AFFINITY_VARIABLES = ("KMP_AFFINITY", "GOMP_CPU_AFFINITY", "OMP_PLACES")
"""Environment variables in which vLLM tells OpenMP the cores of its threads."""


def bound_cores() -> set[int]:
    """Return the cores to which vLLM bound this worker's OpenMP threads; all that it may use, if it bound none."""
    for name in AFFINITY_VARIABLES:
        cores = re.search(r"(?:proclist=\[|\{|^)([\d ,]+)", os.environ.get(name, ""))
        if cores:
            return {int(core) for core in re.findall(r"\d+", cores[1])}
    return os.sched_getaffinity(0)


def settle_worker() -> None:
    """Keep all threads of this worker on the cores of its OpenMP threads, and let its queues sleep between polls.

    Call it when the worker is made, and again when its KV cache is allocated: NIXL moves the main thread in between.
    """
    wait_without_spinning()
    priority.keep_to(os.getpid(), bound_cores())
