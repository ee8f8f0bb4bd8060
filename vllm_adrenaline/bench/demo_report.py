"""The demonstration's table and verdict."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from vllm_adrenaline.bench.demo_load import Measured

HEADER = (
    "system",
    "requests",
    "offloaded",
    "tokens",
    "same as plain vLLM",
    "seconds",
    "TTFT s mean/p50/p90",
    "TPOT ms mean/p50/p90",
    "peak KV blocks (decode)",
)


@dataclass(frozen=True)
class Result:
    """One system's figures."""

    system: str
    offloaded: int | None
    measured: Measured
    blocks: int


def spread(values: Sequence[float], digits: int) -> str:
    """Return mean, median and 90th percentile."""
    ordered = sorted(values)
    p90 = ordered[min(len(ordered) - 1, int(0.9 * len(ordered)))]
    return "/".join(f"{value:.{digits}f}" for value in (statistics.mean(ordered), statistics.median(ordered), p90))


def same_tokens(result: Result, reference: Result) -> int:
    """Count the tokens up to the first one, in each answer, that differs from the reference's."""
    same = 0
    for mine, its in zip(result.measured.answers, reference.measured.answers, strict=True):
        for one, other in zip(mine.tokens, its.tokens, strict=False):
            if one != other:
                break
            same += 1
    return same


def token_count(result: Result) -> int:
    """Count all tokens of a system's answers."""
    return sum(len(answer.tokens) for answer in result.measured.answers)


def table(results: Sequence[Result]) -> str:
    """Return all systems as aligned columns; the first one is the reference."""
    rows = [HEADER]
    for result in results:
        answers = result.measured.answers
        rows.append(
            (
                result.system,
                str(len(answers)),
                "-" if result.offloaded is None else str(result.offloaded),
                str(token_count(result)),
                f"{same_tokens(result, results[0])} of {token_count(results[0])}",
                f"{result.measured.seconds:.1f}",
                spread([answer.ttft for answer in answers], 2),
                spread([1000 * answer.tpot for answer in answers], 0),
                f"{round(result.measured.peak_usage * result.blocks)} of {result.blocks}",
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEADER))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(lines)


def problems(results: Sequence[Result]) -> list[str]:
    """Return what went wrong, one sentence each; an empty list is success."""
    found = []
    for result in results[1:]:
        differing = token_count(results[0]) - same_tokens(result, results[0])
        if differing:
            found.append(f"{result.system}: {differing} tokens differ from plain vLLM's")
    if not results[-1].offloaded:
        found.append(f"{results[-1].system}: no request was offloaded")
    return found
