"""How busy a prefill engine is: the share of the last second in which it computed prompts."""

from collections import deque
from collections.abc import Callable

WINDOW_S = 1.0
"""The time over which the share is taken."""


class PrefillUtilization:
    """The share of the last WINDOW_S in which an engine computed.

    Every step that computes calls `begin` and `end`. Any thread may ask for the `share`.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._since: float | None = None
        self._spans: deque[tuple[float, float]] = deque(maxlen=4096)

    def begin(self) -> None:
        """Note that a step begins."""
        self._since = self._clock()

    def end(self) -> None:
        """Note that the step is done, if one has begun."""
        if self._since is not None:
            self._spans.append((self._since, self._clock()))
            self._since = None

    def share(self) -> float:
        """Return the share of the last WINDOW_S seconds that lay inside steps, 0 to 1."""
        now = self._clock()
        oldest, since = now - WINDOW_S, self._since
        spans = [*self._spans, (since, now)] if since is not None else list(self._spans)
        return min(1.0, sum(max(0.0, end - max(begin, oldest)) for begin, end in spans) / WINDOW_S)
