"""The table and the verdict of `adrenaline demo`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from vllm_adrenaline.bench import figures
from vllm_adrenaline.workload.client import Answer

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
PLAIN = 0
"""The position of plain vLLM among the results: the other systems are compared with it."""


@dataclass(frozen=True)
class Result:
    """The figures of one system: requests that it offloaded, their answers, and the KV cache of whoever decodes.

    `peak_usage` is the share, 0 to 1, of its `blocks` KV blocks that were in use at most.
    """

    system: str
    offloaded: int
    answers: list[Answer]
    peak_usage: float
    blocks: int

    @property
    def tokens(self) -> list[list[int]]:
        """Return the token ids of each answer."""
        return [answer.tokens for answer in self.answers]

    @property
    def token_count(self) -> int:
        """Return the number of tokens of all answers."""
        return sum(map(len, self.tokens))


def _spread(found: dict[str, float], name: str, scale: float, digits: int) -> str:
    return "/".join(f"{scale * found[f'{name}_{kind}']:.{digits}f}" for kind in ("mean", "p50", "p90"))


def table(results: Sequence[Result]) -> str:
    """Return all systems as aligned columns, plain vLLM first."""
    plain = results[PLAIN]
    rows = [HEADER]
    for position, result in enumerate(results):
        found = figures.of(result.answers)
        rows.append(
            (
                result.system,
                str(len(result.answers)),
                "-" if position == PLAIN else str(result.offloaded),
                str(result.token_count),
                f"{figures.same_token_count(result.tokens, plain.tokens)} of {plain.token_count}",
                f"{found['seconds']:.1f}",
                _spread(found, "ttft_ms", 0.001, 2),
                _spread(found, "tpot_ms", 1, 0),
                f"{round(result.peak_usage * result.blocks)} of {result.blocks}",
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEADER))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(lines)


def problems(results: Sequence[Result]) -> list[str]:
    """Return what went wrong, one sentence each; an empty list is success."""
    plain, found = results[PLAIN], []
    for result in results[PLAIN + 1 :]:
        differing = plain.token_count - figures.same_token_count(result.tokens, plain.tokens)
        if differing:
            found.append(f"{result.system}: {differing} tokens differ from plain vLLM's")
    if not results[-1].offloaded:
        found.append(f"{results[-1].system}: no request was offloaded")
    return found
