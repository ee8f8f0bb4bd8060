"""Whether something grows: samples over time, a line through them, and a verdict. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

ERRORS = 3.0
"""So many standard errors from zero a slope may be and still mean nothing."""
HOUR_S = 3600.0
FEW = 10
"""Fewer samples say nothing."""


@dataclass(frozen=True)
class Trend:
    """A line through samples.

    Attributes:
        name, unit: of what was sampled.
        first, last: what the line says at its ends.
        slope, error: how much it grows in an hour, and the standard error of that.
        bound: the growth in an hour that does not matter.
        samples: how many there were.
    """

    name: str
    unit: str
    first: float
    last: float
    slope: float
    error: float
    bound: float
    samples: int

    @property
    def verdict(self) -> str:
        """flat: no growth can be told from chance, or it is below the bound. grows. Or few: too few samples."""
        if self.samples < FEW:
            return "few"
        return "flat" if self.slope <= max(self.bound, ERRORS * self.error) else "grows"


def trend(name: str, unit: str, bound: float, points: Sequence[tuple[float, float]]) -> Trend:
    """Return the least-squares line through points of time (seconds) and value."""
    count = len(points)
    if count < FEW:
        value = points[-1][1] if points else 0.0
        return Trend(name, unit, value, value, 0.0, math.inf, bound, count)
    mean_t, mean_v = (sum(point[i] for point in points) / count for i in (0, 1))
    spread = sum((t - mean_t) ** 2 for t, _ in points)
    slope = sum((t - mean_t) * (v - mean_v) for t, v in points) / spread
    rest = sum((v - mean_v - slope * (t - mean_t)) ** 2 for t, v in points)
    error = math.sqrt(rest / (count - 2) / spread)
    first, last = (mean_v + slope * (points[i][0] - mean_t) for i in (0, -1))
    return Trend(name, unit, first, last, HOUR_S * slope, HOUR_S * error, bound, count)
