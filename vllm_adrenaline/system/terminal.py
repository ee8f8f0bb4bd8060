"""What a command tells its user while it works."""

from __future__ import annotations

import shutil
import sys
import time

REFRESH_S = 0.1


def say(text: str) -> None:
    """Print one line of progress."""
    print(f"[adrenaline] {text}", flush=True)


class StatusLine:
    """One line of progress that changes.

    On a terminal it is rewritten in place. In a log it is printed again, at most once in `every_s` seconds.
    """

    def __init__(self, every_s: float) -> None:
        self._live = sys.stdout.isatty()
        self._every_s = REFRESH_S if self._live else every_s
        self._shown = time.monotonic()

    def show(self, text: str) -> None:
        """Show the line as it is now, unless it was shown a moment ago."""
        now = time.monotonic()
        if now - self._shown < self._every_s:
            return
        self._shown = now
        if self._live:
            width = shutil.get_terminal_size().columns - 1
            print(f"\r\033[K{f'[adrenaline] {text}'[:width]}", end="", flush=True)
        else:
            say(text)

    def keep(self, text: str) -> None:
        """Print a line that stays, in the place of the one that changes."""
        print("\r\033[K" if self._live else "", end="")
        say(text)
