"""Arithmetic for modules that run without vLLM.

vLLM has the same `cdiv` in vllm/utils/math_utils.py, and modules that import vLLM anyway use that one. Importing vLLM
takes ten seconds, which is too long for the placement policy's tests, the simulator and the launcher.
"""

import bisect
from collections.abc import Sequence

Point = tuple[float, float]


def cdiv(a: int, b: int) -> int:
    """Return a / b, rounded up to a whole number."""
    return -(a // -b)


def bucket(count: int, most: int) -> int:
    """Return the smallest power of two that is `count` or more, but `most` at most: as csrc/shm/layout.h pads plans."""
    return min(1 << (count - 1).bit_length(), most)


def neighbours(points: Sequence[Point], x: float) -> tuple[Point, Point]:
    """Return the two points, of at least two ascending ones, between which x lies; the outermost two beyond them."""
    at = bisect.bisect_left(points, x, key=lambda point: point[0])
    at = min(max(at, 1), len(points) - 1)
    return points[at - 1], points[at]


def on_line(low: Point, high: Point, x: float) -> float:
    """Return what the line through two points has at x."""
    return low[1] + (high[1] - low[1]) * (x - low[0]) / (high[0] - low[0])
