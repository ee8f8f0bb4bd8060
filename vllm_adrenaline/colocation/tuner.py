"""Keeps a prefill engine's objectives by moving its executors' share: the controller, fed and obeyed.

Runs in the prefill engine's control thread; nothing is done without an objective.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterable, Sequence

from vllm_adrenaline.colocation.controller import Change, Limits, Objectives, ShareController, smallest_prefill_share

logger = logging.getLogger("vllm.adrenaline")

TYPICAL_PROMPT = 512
SHARES = tuple(share / 20 for share in range(1, 21))


def first_share(prefill: Sequence[tuple[int, float]], ttft_s: float | None, share: float, limits: Limits) -> float:
    """Return the executor's share to begin with: what the smallest prefill share leaves that meets the objective.

    `prefill`: seconds by prompt tokens of an undisturbed engine; with a share x it takes 1 / x of that (semi-PD,
    equation 1). Without an objective or a profile it is `share`.
    """
    if ttft_s is None or not prefill:
        return share
    _, seconds = min(prefill, key=lambda point: abs(point[0] - TYPICAL_PROMPT))
    least = smallest_prefill_share({each: seconds / each for each in SHARES}, ttft_s)
    return min(share, limits.high, max(limits.low, 1 - least))


class ShareTuner:
    """`take`: makes a share take effect, and returns in words what that did. `share` is 1 without an objective."""

    def __init__(
        self,
        objectives: Objectives,
        share: float,
        prefill: Sequence[tuple[int, float]],
        take: Callable[[float], str],
        limits: Limits = Limits(high=1.0, window=16),  # noqa: B008 - frozen
    ) -> None:
        self._has_objective = objectives.ttft is not None or objectives.tpot is not None
        self._take, self._taken = take, False
        begin = first_share(prefill, objectives.ttft, share, limits)
        self._controller = ShareController(objectives, limits, begin)
        self.share = self._controller.share if self._has_objective else share
        self._ttft: deque[float] = deque(maxlen=4096)

    def prefilled(self, seconds: float) -> None:
        """A prompt was done so long after its request came (from the scheduler's thread)."""
        self._ttft.append(seconds)

    def update(self, tpots: Iterable[float]) -> None:
        """Twice a second: `tpots` is what decode engines said of their steps, in seconds."""
        if not self._has_objective:
            return
        if not self._taken:
            self._taken = True
            logger.info("the executors begin with a share of %.2f: %s", self.share, self._take(self.share))
        while self._ttft:
            self._controller.observe_ttft(self._ttft.popleft())
        if slowest := max(tpots, default=0.0):
            self._controller.observe_tpot(slowest)
        change = self._controller.update()
        if change is not Change.KEPT:
            self.share = self._controller.share
            words = self._take(self.share)
            logger.info("%s: the executors' share is %.2f now (%s)", change.value.replace("_", " "), self.share, words)
