"""What a decode step costs on the machine at hand: the numbers that placement, feedback and simulation share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import msgspec

from vllm_adrenaline.system.arithmetic import neighbours, on_line

Seconds = Annotated[float, msgspec.Meta(ge=0, le=1e6)]


def undisturbed(times: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    """Return the lower convex hull of (batch size, seconds), clamped to be non-decreasing.

    Interference only ever adds time, so points above the hull are noise.
    """
    hull: list[tuple[int, float]] = []
    for i, (rows, _) in enumerate(times):
        point = (rows, min(seconds for _, seconds in times[i:]))
        while len(hull) > 1 and _slope(hull[-2], hull[-1]) > _slope(hull[-2], point):
            hull.pop()
        hull.append(point)
    return hull


def _slope(a: tuple[int, float], b: tuple[int, float]) -> float:
    return (b[1] - a[1]) / (b[0] - a[0])


class Costs(msgspec.Struct, frozen=True):
    """Seconds. `step`: everything but attention, by rows of the batch, ascending. `local`: attention of the decode
    engine, all layers, by token of context. `remote`: the same of each executor. `exchange`: what the data plane takes
    for a row and step; `plan`: what a step takes longer for having any offloaded row. `link`: of each executor, how
    long a step's remote attention takes for nothing but being on another host; empty if none is.
    """

    step: Annotated[list[tuple[int, Seconds]], msgspec.Meta(min_length=1, max_length=256)]
    local: Seconds
    remote: list[Seconds]
    exchange: Seconds = 0.0
    plan: Seconds = 0.0
    link: Annotated[list[Seconds], msgspec.Meta(max_length=64)] = []

    def link_seconds(self, executor: int) -> float:
        """Return how long after its start a step's first output of an executor is there at the earliest: 0 on this
        host."""
        return self.link[executor] if self.link else 0.0

    def other(self, rows: float) -> float:
        """Return the seconds of a step without its attention: between measured sizes, and beyond them, on a line."""
        if len(self.step) == 1 or rows <= self.step[0][0]:
            return self.step[0][1]
        low, high = neighbours(self.step, rows)
        return max(low[1], on_line(low, high, rows))

    def remote_seconds(self, executor: int, rows: float, tokens: float) -> float:
        """Return how long after its start the output of `rows` offloaded rows with `tokens` of context is there."""
        return self.remote[executor] * tokens + self.exchange * rows + self.link_seconds(executor)

    def seconds(self, rows: float, local_tokens: float, remote: Sequence[tuple[float, float]]) -> float:
        """Return the seconds of a step: `remote` holds (rows, tokens) of each executor; the slowest side counts."""
        attended = [self.remote_seconds(e, r, tokens) for e, (r, tokens) in enumerate(remote) if r]
        return self.other(rows) + max([self.local * local_tokens, *attended]) + (self.plan if attended else 0.0)

    def most_rows(self, limit_s: float, attention_s: float, per_row_s: float, most: int) -> int:
        """Return the largest batch, up to `most`, whose step takes at most `limit_s` with `attention_s` of attention
        and `per_row_s` more of it for every row."""
        low, high = 0, most
        while low < high:
            middle = (low + high + 1) // 2
            fits = self.other(middle) + attention_s + per_row_s * middle <= limit_s
            low, high = (middle, high) if fits else (low, middle - 1)
        return low
