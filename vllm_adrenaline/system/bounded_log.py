"""Logs that cannot be flooded: so many lines a minute of each cause, which is a place in the code."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

LINES = 20
"""Of one cause, in each span."""
SPAN_S = 60.0


@dataclass
class _Cause:
    """What one place in the code said since `began` (seconds, monotonic)."""

    began: float
    lines: int = 0


class Bounded(logging.Filter):
    """Lets LINES lines of each cause pass in SPAN_S. The first one of the next span says how many were left out."""

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._now, self._lock = now, threading.Lock()
        self._causes: dict[tuple[str, int], _Cause] = {}  # as many as there are calls in the code

    def filter(self, record: logging.LogRecord) -> bool:
        place, now = (record.pathname, record.lineno), self._now()
        with self._lock:
            cause = self._causes.setdefault(place, _Cause(now))
            left_out = 0
            if now - cause.began >= SPAN_S:
                left_out, cause = cause.lines - LINES, _Cause(now)
                self._causes[place] = cause
            cause.lines += 1
            passes = cause.lines <= LINES
        if left_out > 0:
            record.msg = f"{record.getMessage()} ({left_out} more lines from here were left out before)"
            record.args = ()
        return passes


def bound(target: logging.Filterer) -> None:
    """Bound what a logger, or a handler, lets pass. To be called again is harmless."""
    if not any(isinstance(each, Bounded) for each in target.filters):
        target.addFilter(Bounded())
