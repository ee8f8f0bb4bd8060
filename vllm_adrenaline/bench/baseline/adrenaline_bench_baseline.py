"""A vLLM plugin of `adrenaline bench` for vLLM's own systems: their waiting loops do not take cores from each other.

NIXL's progress thread takes a whole core per engine, and message queues spin (docs/vllm-notes.md). Found through
PYTHONPATH, in the engines that are compared with only.
"""


def register() -> None:
    """Called by vLLM in each of its processes."""
    from vllm_adrenaline.cores import wait_without_yield
    from vllm_adrenaline.nixl_pause import pause_progress_thread

    wait_without_yield()
    pause_progress_thread()
