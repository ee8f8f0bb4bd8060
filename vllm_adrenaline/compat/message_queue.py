"""A patch of vLLM's message queues: they sleep between polls instead of spinning.

vLLM's workers and engine core wait for each other in a sched_yield loop for a second after every message. Only then do
they sleep. A prefill engine that has a prompt on offer steps every millisecond, so it would spin without end, on the
very cores that the attention executor needs.
"""

from __future__ import annotations

import functools
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm.distributed.device_communicators.shm_broadcast import SpinCondition

SHORTEST_S, LONGEST_S, OF_THE_WAIT = 50e-6, 400e-6, 1 / 16
"""How long a queue sleeps between polls: OF_THE_WAIT of the wait so far, within the two limits (seconds)."""


def wait_without_spinning() -> None:
    """Let this process's message queues sleep between polls: the longer they have waited, the longer. Idempotent.

    Polls every 50 us took 10 to 14 % of a core in every engine that worked. vLLM's own notifications are no way out:
    some of them get lost (a PUB socket with a high-water mark of 1), and vLLM counts on polling to make up for that.
    """
    from vllm.distributed.device_communicators import shm_broadcast

    wait = shm_broadcast.SpinCondition.wait
    if hasattr(wait, "__wrapped__"):
        return

    @functools.wraps(wait)
    def sleeping(self: SpinCondition, timeout_ms: int | None = None) -> None:
        now = time.monotonic()
        if now > self.last_read + self.busy_loop_s:
            wait(self, timeout_ms)  # idle: until a notification
            return
        if getattr(self, "waits_since_read", None) != self.last_read:
            self.waits_since_read, self.waits_from = self.last_read, now
        time.sleep(min(max(SHORTEST_S, (now - self.waits_from) * OF_THE_WAIT), LONGEST_S))

    shm_broadcast.SpinCondition.wait = sleeping
    shm_broadcast.sched_yield = lambda: time.sleep(SHORTEST_S)
