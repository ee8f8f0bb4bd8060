"""A vLLM plugin of `adrenaline bench` for vLLM's own systems: their threads do not take cores from each other.

NIXL's progress thread takes a whole core per engine, message queues spin, and NixlConnector moves the main thread of
every worker to the machine's last core, the decode worker's to that of the prefill engine (docs/vllm-notes.md). Found
through PYTHONPATH, in the engines that are compared with only.
"""

import functools


def register() -> None:
    """Called by vLLM in each of its processes."""
    from vllm.v1.worker.cpu_worker import CPUWorker

    from vllm_adrenaline.compat.engine_threads import settle_worker, wait_without_spinning
    from vllm_adrenaline.compat.nixl_progress import pause_progress_thread

    wait_without_spinning()
    pause_progress_thread()
    warm_up = CPUWorker.compile_or_warm_up_model
    if hasattr(warm_up, "__wrapped__"):
        return  # vLLM may call plugins more than once

    @functools.wraps(warm_up)
    def settled(self: CPUWorker) -> object:
        settle_worker()
        return warm_up(self)

    CPUWorker.compile_or_warm_up_model = settled
