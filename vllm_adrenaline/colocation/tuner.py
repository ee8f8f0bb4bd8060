"""The tuner of the executors' share: it feeds the controller (controller.py) and carries out what that decides.

Runs in the prefill engine's control thread. Without an objective it does nothing.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterable, Sequence

from vllm_adrenaline.colocation.controller import Change, Limits, Objectives, ShareController, smallest_prefill_share

logger = logging.getLogger("vllm.adrenaline")

TYPICAL_PROMPT = 512
"""Tokens of the prompt by which the first share is chosen."""
SHARES = tuple(share / 20 for share in range(1, 21))
"""Shares of prefill from which the first one is chosen."""


def first_share(prefill: Sequence[tuple[int, float]], ttft_s: float | None, share: float, limits: Limits) -> float:
    """Return the executors' share to begin with: what the smallest prefill share that meets the objective leaves.

    Args:
        prefill: (tokens of a prompt, seconds to compute it) of an engine that does nothing else. With a share x it is
            taken to need 1 / x of that time (semi-PD, equation 1).
        ttft_s: the objective for the time to first token, in seconds.
        share: what is returned without an objective or a profile, and the most that is returned.
        limits: within which the share is.
    """
    if ttft_s is None or not prefill:
        return share
    _, seconds = min(prefill, key=lambda point: abs(point[0] - TYPICAL_PROMPT))
    least = smallest_prefill_share({each: seconds / each for each in SHARES}, ttft_s)
    return min(share, limits.high, max(limits.low, 1 - least))


class ShareTuner:
    """Moves the executors' share of a prefill engine, so that its objectives are met.

    Attributes:
        share: the executors' share of their device in force, 0 to 1. Without an objective it is what was given.
    """

    def __init__(
        self,
        objectives: Objectives,
        share: float,
        prefill: Sequence[tuple[int, float]],
        take: Callable[[float], str],
        limits: Limits = Limits(high=1.0, window=16),  # noqa: B008 - frozen
    ) -> None:
        """Take the objectives and what there is to begin with.

        Args:
            objectives: what is to be met.
            share: the executors' share to begin with, if `prefill` or an objective is missing.
            prefill: what a prefill engine takes that does nothing else (Profile.prefill).
            take: makes a share take effect, and returns in words what that did.
            limits: of the controller.
        """
        self._has_objective = objectives.ttft is not None or objectives.tpot is not None
        self._take, self._taken = take, False
        begin = first_share(prefill, objectives.ttft, share, limits)
        self._controller = ShareController(objectives, limits, begin)
        self.share = self._controller.share if self._has_objective else share
        self._ttft: deque[float] = deque(maxlen=4096)

    def observe_ttft(self, seconds: float) -> None:
        """Note that a prompt was done so many seconds after its request came. The scheduler's thread calls this."""
        self._ttft.append(seconds)

    def update(self, tpots: Iterable[float]) -> None:
        """Let the controller decide, and carry out what it decides. To be called now and then.

        `tpots`: what decode engines said last of their steps, in seconds. The slowest counts.
        """
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
