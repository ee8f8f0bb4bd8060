"""When a process that ended is started again: pure policy."""

from __future__ import annotations

FIRST_PAUSE_S, LONGEST_PAUSE_S = 1.0, 30.0
WELL_S = 120.0
"""Seconds that a process must have been ready for its end to count as a first one."""
LIMIT, WITHIN_S = 5, 600.0
"""A process is started again so many times in so many seconds at most."""


class Restarts:
    """The ends of one process, and what follows from them."""

    def __init__(self) -> None:
        self._ends: list[float] = []
        self._in_a_row = 0

    def pause(self, now: float, ready_s: float) -> float | None:
        """Return the seconds from an end at `now` until the next start; None gives the process up.

        `ready_s` is how long it was ready before. The pause doubles with every end, and begins anew once it ran well.
        """
        self._in_a_row = 1 if ready_s >= WELL_S else self._in_a_row + 1
        self._ends = [*(end for end in self._ends if now - end < WITHIN_S), now]
        if len(self._ends) > LIMIT:
            return None
        return min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2.0 ** (self._in_a_row - 1))
