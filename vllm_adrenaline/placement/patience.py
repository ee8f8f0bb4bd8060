"""How long a step waits for attention executors, from what steps have waited so far. Pure."""

from __future__ import annotations

from collections import deque

from vllm_adrenaline.system.statistics import percentile

FLOOR_S = 0.3
"""However short steps are: where processes share cores, one may stand still for so long."""
LOOK_S = 1.0
"""However long steps usually wait, an executor is looked at after this: one that was stopped is given up by then."""
STEPS, USUAL = 64, 0.9
"""What is usual is this percentile of so many steps."""
SOFT, HARD = 4.0, 2.0
"""An executor is looked at when a step has waited so many times what is usual. No step waits longer than HARD times
that, unless `--adrenaline-executor-timeout` permits it."""


class Patience:
    """The budget of waiting for executors that one step has, all its layers together.

    It is of waiting alone: what the decode engine computes meanwhile takes nothing of it.
    """

    def __init__(self, timeout_s: float) -> None:
        """`timeout_s`: the most that a step waits, unless steps usually wait for longer than half of it."""
        self._timeout_s = timeout_s
        self._waits: deque[float] = deque(maxlen=STEPS)

    def observe(self, waited_s: float) -> None:
        """Note what a step waited in which no executor failed, in seconds."""
        self._waits.append(waited_s)

    @property
    def budget(self) -> tuple[float, float]:
        """Seconds until an executor that does not work is given up, and until any is. The former is the smaller one."""
        usual = percentile(self._waits, USUAL)
        hard = max(self._timeout_s, HARD * usual)
        return min(max(FLOOR_S, SOFT * usual), LOOK_S, hard), hard
