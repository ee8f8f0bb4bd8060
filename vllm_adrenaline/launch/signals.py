"""Signals that end a command, as an exception, so that `with` blocks clean up."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Stopped(BaseException):
    """The user or the system asked this command to end; `exit_status` is what a shell expects then."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.exit_status = 128 + number


@contextmanager
def ending_signals_raise() -> Iterator[None]:
    """Raise Stopped in the main thread on the first signal that ends a command.

    Later ones do not interrupt the cleaning up.
    """

    stopping = False

    def stop(number: int, _: FrameType | None) -> None:
        # Not SIG_IGN for the later ones: Python raises OSError for a signal that came in before it was ignored.
        nonlocal stopping
        if not stopping:
            stopping = True
            raise Stopped(number)

    before = {number: signal.signal(number, stop) for number in ENDING}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
