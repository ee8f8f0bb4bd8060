"""When an attention executor that failed is tried again: after a pause that grows while it fails again. Pure.

It is about one process. One that has ended is another matter: how soon it comes back is up to its prefill engine, which
starts it again ever more slowly.
"""

from __future__ import annotations

import math

MIN_PAUSE_S, MAX_PAUSE_S = 1.0, 60.0
"""The pause after a first failure, and the longest one. It doubles with each."""
HEALTHY_S = 60.0
"""A failure after so long in use counts as a first one."""


class Breaker:
    """The circuit breaker of one executor process. It is closed while the executor is used.

    Times are seconds on a clock of the caller's.

    Attributes:
        retry_at: when the executor may be tried again.
    """

    def __init__(self) -> None:
        self.retry_at = -math.inf
        self._pause_s, self._closed_at = 0.0, -math.inf

    def fail(self, now: float) -> float:
        """Note that the executor failed, in use or when it was tried; return how long it is left alone, in seconds."""
        if now - self._closed_at > HEALTHY_S:
            self._pause_s = 0.0
        self._closed_at = math.inf
        self._pause_s = min(max(MIN_PAUSE_S, 2 * self._pause_s), MAX_PAUSE_S)
        self.retry_at = now + self._pause_s
        return self._pause_s

    def close(self, now: float) -> None:
        """Note that the executor is used from now on."""
        self._closed_at = now
