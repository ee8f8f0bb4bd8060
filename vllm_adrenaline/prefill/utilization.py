"""How busy a prefill engine is: the share of the last second in which it computed prompts."""

from collections import deque
from collections.abc import Callable

WINDOW_S = 1.0


class PrefillUtilization:
    """`begin` and `end` around every step that computes; `share` at any time, from any thread."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._since: float | None = None
        self._spans: deque[tuple[float, float]] = deque(maxlen=4096)

    def begin(self) -> None:
        """A step begins."""
        self._since = self._clock()

    def end(self) -> None:
        """The step, if one had begun, is done."""
        if self._since is not None:
            self._spans.append((self._since, self._clock()))
            self._since = None

    def share(self) -> float:
        """Return the share of the last WINDOW_S seconds that lay inside steps, 0 to 1."""
        now = self._clock()
        oldest, since = now - WINDOW_S, self._since
        spans = [*self._spans, (since, now)] if since is not None else list(self._spans)
        return min(1.0, sum(max(0.0, end - max(begin, oldest)) for begin, end in spans) / WINDOW_S)
