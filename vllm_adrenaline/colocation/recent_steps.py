"""What a decode engine tells prefill engines of its steps, by which they keep its objective."""

from __future__ import annotations

from collections import deque

from vllm_adrenaline.system.statistics import percentile

TPOT_STEPS = 64
"""Steps over which the time per output token is told to prefill engines."""


class RecentSteps:
    """The lengths of the last TPOT_STEPS steps of decodes, in seconds."""

    def __init__(self) -> None:
        self._seconds: deque[float] = deque(maxlen=TPOT_STEPS)

    def note(self, seconds: float) -> float:
        """Note the length of a step, 0 for one that computed prompts as well; return the 90th percentile."""
        if seconds > 0:
            self._seconds.append(seconds)
        return percentile(self._seconds, 0.9)
