"""Arrivals of requests: from a trace of times and lengths, or random ones."""

from __future__ import annotations

import csv
import datetime
import random
from dataclasses import dataclass
from pathlib import Path

from vllm_adrenaline.errors import AdrenalineError

COLUMNS = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")


@dataclass(frozen=True)
class Arrival:
    """One request: its time in seconds since the first one, and the tokens of its prompt and of its output."""

    at: float
    prompt: int
    output: int


@dataclass(frozen=True)
class Scale:
    """How a trace is fitted to a model.

    Lengths are multiplied by `prompt` and `output`, then kept at or below `max_prompt` and `max_output` tokens. Times
    are stretched to a mean of `rate` requests a second, or kept for 0.
    """

    prompt: float = 1.0
    output: float = 1.0
    max_prompt: int = 1 << 20
    max_output: int = 1 << 20
    rate: float = 0.0

    def lengths(self, prompt: float, output: float) -> tuple[int, int]:
        """Return a prompt's and an output's scaled length in tokens, each at least 1."""
        return (
            int(min(max(prompt * self.prompt, 1), self.max_prompt)),
            int(min(max(output * self.output, 1), self.max_output)),
        )


def read(path: Path, count: int, scale: Scale, first: int = 0) -> list[Arrival]:
    """Return `count` requests of a trace, from its request number `first` on.

    The file has the format of the Azure LLM inference dataset. Raises AdrenalineError when it cannot be read or has no
    such requests.
    """
    try:
        with path.open(newline="") as file:
            rows = list(csv.DictReader(file))[first : first + count]
        found = [
            (datetime.datetime.fromisoformat(r[COLUMNS[0]][:26]), int(r[COLUMNS[1]]), int(r[COLUMNS[2]])) for r in rows
        ]
    except (OSError, KeyError, ValueError, TypeError) as error:
        raise AdrenalineError(
            f"cannot read the trace {path}, which needs columns {', '.join(COLUMNS)}: {error}"
        ) from None
    if not found:
        raise AdrenalineError(f"the trace {path} has no requests from number {first} on")
    begin, end = found[0][0], found[-1][0]
    lasted = max((end - begin).total_seconds(), 1e-9)
    stretch = len(found) / scale.rate / lasted if scale.rate else 1.0
    return [
        Arrival((when - begin).total_seconds() * stretch, *scale.lengths(tokens, made)) for when, tokens, made in found
    ]


def poisson(count: int, scale: Scale, seed: int, mean_prompt: int = 1000, mean_output: int = 200) -> list[Arrival]:
    """Return random requests: Poisson arrivals at `scale.rate` a second (1 if that is 0), and exponential lengths.

    The means are those of lengths in tokens before they are scaled.
    """
    rng, at, made = random.Random(seed), 0.0, []
    for _ in range(count):
        lengths = scale.lengths(rng.expovariate(1 / mean_prompt), rng.expovariate(1 / mean_output))
        made.append(Arrival(at, *lengths))
        at += rng.expovariate(scale.rate or 1.0)
    return made
