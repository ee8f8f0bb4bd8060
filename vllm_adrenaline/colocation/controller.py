"""The controller of an executor's share of a device: that of semi-PD (arXiv 2504.19867, Algorithm 1). Pure.

Prefill has the share x, and attention has y = 1 - x. Once a window, TTFT and TPOT at a percentile are compared with
their objectives. If one alone is violated, its side gets more, until its model says that this is enough. The models are
refitted to what was seen:  TTFT(x) = a1 / (x - lambda) + b1,  TPOT(y) = a2 / y + b2.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from enum import Enum
from typing import NamedTuple

import msgspec

from vllm_adrenaline.system.statistics import percentile


class Objectives(msgspec.Struct, frozen=True):
    """What is to be met.

    Attributes:
        ttft, tpot: time to first token and time per output token, in seconds; None for no objective.
        percentile: the one at which they are to be met, 0 to 1.
    """

    ttft: float | None = None
    tpot: float | None = None
    percentile: float = 0.9


class Limits(msgspec.Struct, frozen=True):
    """How far and how fast the controller moves the executor's share.

    Attributes:
        low, high: the smallest and the largest share.
        step, max_steps: a change is at most `max_steps` times `step`.
        window: observations between two decisions.
        margin, patience: for `patience` windows after the other side's objective was violated, a side gets more only if
            it is beyond its own objective by more than the part `margin` of it. Objectives that are violated by turns
            cannot both be met, and swinging helps neither.
    """

    low: float = 0.1
    high: float = 0.9
    step: float = 0.05
    max_steps: int = 3
    window: int = 32
    margin: float = 0.2
    patience: int = 8


class Change(Enum):
    """What a decision did."""

    KEPT = "kept"
    MORE_PREFILL = "more_prefill"
    MORE_ATTENTION = "more_attention"


class Point(NamedTuple):
    """A share and what was observed with it, in seconds."""

    share: float
    seconds: float


class Model:
    """A model of seconds over a share: seconds = a / (share - lambda) + b, with a >= 0.

    It is refitted to the last KEPT points, by least squares over a small grid of lambda. While all points have the same
    share, b is 0: seconds are taken to fall as the share grows.
    """

    KEPT = 16

    def __init__(self, lambdas: Sequence[float] = (0.0,)) -> None:
        self._points: deque[Point] = deque(maxlen=self.KEPT)
        self._lambdas = lambdas
        self._a, self._b, self._lambda = 0.0, 0.0, 0.0

    def add(self, point: Point) -> None:
        """Take a point, and refit the model."""
        self._points.append(point)
        usable = [each for each in self._lambdas if each < min(p.share for p in self._points) - 1e-6] or [0.0]
        if len({round(p.share, 6) for p in self._points}) < 2:
            self._a, self._b, self._lambda = point.seconds * (point.share - usable[0]), 0.0, usable[0]
            return
        fits = [(*_line([(1 / (p.share - each), p.seconds) for p in self._points]), each) for each in usable]
        _, self._a, self._b, self._lambda = min(fits)

    def at(self, share: float) -> float:
        """Return the seconds that are to be expected with a share."""
        return self._a / max(share - self._lambda, 1e-6) + self._b


def _line(points: Iterable[tuple[float, float]]) -> tuple[float, float, float]:
    """Fit y = a x + b with a >= 0 by least squares; return (squared error, a, b)."""
    found = list(points)
    mean_x, mean_y = (sum(column) / len(found) for column in zip(*found, strict=True))
    spread = sum((x - mean_x) ** 2 for x, _ in found)
    a = max(0.0, sum((x - mean_x) * (y - mean_y) for x, y in found) / spread) if spread > 1e-12 else 0.0
    b = mean_y - a * mean_x
    return sum((y - a * x - b) ** 2 for x, y in found), a, b


class ShareController:
    """The controller of one executor's share.

    Attributes:
        share: the executor's, as it was decided last.
    """

    def __init__(self, objectives: Objectives, limits: Limits, share: float) -> None:
        self._objectives, self._limits = objectives, limits
        self.share = min(max(share, limits.low), limits.high)
        self._ttft, self._tpot = Model((0.0, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3)), Model()
        self._seen_ttft: list[float] = []
        self._seen_tpot: list[float] = []
        self._windows = 0
        self._violated: dict[Change, int] = {}

    def observe_ttft(self, seconds: float) -> None:
        """Note that a request had its first token after so many seconds."""
        self._seen_ttft.append(seconds)

    def observe_tpot(self, seconds: float) -> None:
        """Note that a token took so many seconds: in a step, or as the mean of a request."""
        self._seen_tpot.append(seconds)

    def update(self) -> Change:
        """Decide if the window is full, and begin the next one; return what changed."""
        if max(len(self._seen_ttft), len(self._seen_tpot)) < self._limits.window:
            return Change.KEPT
        ttft, tpot = self._at_percentile(self._seen_ttft), self._at_percentile(self._seen_tpot)
        self._seen_ttft, self._seen_tpot = [], []
        if ttft is not None:
            self._ttft.add(Point(max(1 - self.share, self._limits.step), ttft))
        if tpot is not None:
            self._tpot.add(Point(self.share, tpot))
        self._windows += 1
        late, slow = _beyond(ttft, self._objectives.ttft), _beyond(tpot, self._objectives.tpot)
        change = Change.KEPT
        if late > 0 and slow <= 0:
            change = self._turn(Change.MORE_PREFILL, Change.MORE_ATTENTION, late)
        elif slow > 0 and late <= 0:
            change = self._turn(Change.MORE_ATTENTION, Change.MORE_PREFILL, slow)
        for side, violated_by in ((Change.MORE_PREFILL, late), (Change.MORE_ATTENTION, slow)):
            if violated_by > 0:
                self._violated[side] = self._windows
        return change

    def _turn(self, change: Change, other: Change, violated_by: float) -> Change:
        """Give one side more until that is enough; return what changed. `violated_by`: the part of its objective."""
        ago = self._windows - self._violated.get(other, -self._limits.patience)
        if ago < self._limits.patience and violated_by <= self._limits.margin:
            return Change.KEPT
        before, limits = self.share, self._limits
        for _ in range(limits.max_steps):
            step = limits.step if change is Change.MORE_ATTENTION else -limits.step
            self.share = min(max(self.share + step, limits.low), limits.high)
            if self._is_enough(change):
                break
        return change if abs(self.share - before) > 1e-9 else Change.KEPT

    def _is_enough(self, change: Change) -> bool:
        ttft, tpot = self._objectives.ttft, self._objectives.tpot
        if change is Change.MORE_PREFILL:
            return ttft is None or self._ttft.at(max(1 - self.share, self._limits.step)) <= ttft
        return tpot is None or self._tpot.at(self.share) <= tpot

    def _at_percentile(self, seen: list[float]) -> float | None:
        return percentile(seen, self._objectives.percentile) if seen else None


def _beyond(seen: float | None, objective: float | None) -> float:
    """Return by which part of it an objective is violated; negative when it is met or there is none."""
    return seen / objective - 1 if seen is not None and objective is not None else -1.0


def smallest_prefill_share(latency: Mapping[float, float], objective: float) -> float:
    """Return the smallest share of prefill with which its latency meets an objective; 1.0 when none does.

    Args:
        latency: seconds by share. Between two of these shares, latency is taken to be linear in 1 / share.
        objective: in seconds.
    """
    points = sorted((1 / share, seconds) for share, seconds in latency.items())
    if not points or points[0][1] > objective:
        return 1.0
    for (x, low), (y, high) in itertools.pairwise(points):
        if high > objective:
            return 1 / (x + (y - x) * (objective - low) / (high - low))
    return 1 / points[-1][0]
