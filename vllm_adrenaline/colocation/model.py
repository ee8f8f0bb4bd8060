"""The models of semi-PD (arXiv 2504.19867, equations 1 to 4): what a share of the device makes of TTFT and TPOT. Pure.

TTFT(x) = a1 / (x - lambda) + b1 is the M/M/1 queue: a prompt needs 1 / x of its time, and lambda is the share that the
prompts which arrive need at least.  TPOT(y) = a2 / y + b2.  x and y are parts of the device that add up to 1.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Mapping, Sequence
from typing import NamedTuple

LAMBDAS = tuple(step / 20 for step in range(18))
"""What lambda may be in the model of TTFT."""


class Point(NamedTuple):
    """A share of the device, and what was observed with it, in seconds."""

    share: float
    seconds: float


class Model:
    """A model of seconds over a share: seconds = a / (share - lambda) + b, with a >= 0.

    It is refitted to the last KEPT points, by least squares over a small grid of lambda. The load changes, and with it
    a, b and lambda: each point counts DECAY of what the next one counts. While all points have the same share, b is 0:
    seconds are taken to fall as the share grows.
    """

    KEPT = 16
    DECAY = 0.7

    def __init__(self, lambdas: Sequence[float] = (0.0,)) -> None:
        """Begin without a point. `lambdas`: what lambda may be, in ascending order."""
        self._points: deque[Point] = deque(maxlen=self.KEPT)
        self._lambdas = lambdas
        self._a, self._b, self._lambda = 0.0, 0.0, 0.0

    def add(self, point: Point) -> None:
        """Take a point, and refit the model."""
        self._points.append(point)
        least = min(each.share for each in self._points)
        usable = [each for each in self._lambdas if each < least - 1e-6] or [0.0]
        if len({round(each.share, 6) for each in self._points}) < 2:
            self._a, self._b, self._lambda = point.seconds * (point.share - usable[0]), 0.0, usable[0]
            return
        weights = [self.DECAY**age for age in reversed(range(len(self._points)))]
        fits = [(*self._line(each, weights), each) for each in usable]
        best = min(error for error, *_ in fits)
        scale = sum(weight * each.seconds**2 for weight, each in zip(weights, self._points, strict=True))
        # Two shares fit every lambda. Of those that fit alike the least is taken: it promises the least of a change.
        _, self._a, self._b, self._lambda = next(fit for fit in fits if fit[0] <= best + 1e-9 * scale)

    def at(self, share: float) -> float:
        """Return the seconds that are to be expected with a share; 0 before there is a point."""
        return self._a / max(share - self._lambda, 1e-6) + self._b

    def _line(self, lam: float, weights: Sequence[float]) -> tuple[float, float, float]:
        """Fit seconds = a / (share - lam) + b with a >= 0 by weighted least squares; return (squared error, a, b)."""
        xs, ys = [1 / (each.share - lam) for each in self._points], [each.seconds for each in self._points]
        total = sum(weights)
        mean_x = sum(w * x for w, x in zip(weights, xs, strict=True)) / total
        mean_y = sum(w * y for w, y in zip(weights, ys, strict=True)) / total
        found = list(zip(weights, xs, ys, strict=True))
        spread = sum(w * (x - mean_x) ** 2 for w, x, _ in found)
        a = max(0.0, sum(w * (x - mean_x) * (y - mean_y) for w, x, y in found) / spread) if spread > 1e-12 else 0.0
        b = mean_y - a * mean_x
        return sum(w * (y - a * x - b) ** 2 for w, x, y in found), a, b


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
