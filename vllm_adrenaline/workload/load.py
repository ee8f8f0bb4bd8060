"""Workloads: which requests are sent when. Prompts are random tokens; outputs have exactly the length asked for."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from vllm_adrenaline.workload import trace
from vllm_adrenaline.workload.trace import Arrival, Scale

TRACE = Path(__file__).parent / "data" / "azure_conv_400.csv"
FIRST_TOKEN = 5
"""Token ids below are special in the models of the benchmarks (tiny_model.py)."""


@dataclass(frozen=True)
class Request:
    """One request, due `at` seconds after the start of the run. The answer has exactly `tokens` tokens.

    The prompt is text, or token ids. `chat` sends text as the message of a chat.
    """

    at: float
    prompt: list[int] | str
    tokens: int
    chat: bool = False


@dataclass(frozen=True)
class Load:
    """One workload; `about` says in words what it stands for. `arrivals(count, seed)` makes its lengths and times;
    `shared`: tokens that all prompts of a session begin with."""

    name: str
    about: str
    count: int
    arrivals: Callable[[int, int], list[Arrival]]
    shared: int = 0

    def requests(self, vocabulary: int, seed: int, count: int = 0) -> list[Request]:
        """Return its requests, `count` of them (0: all)."""
        rng = random.Random(seed)
        prefix = _tokens(rng, vocabulary, self.shared)
        return [
            Request(a.at, prefix[: a.prompt] + _tokens(rng, vocabulary, a.prompt - self.shared), a.output)
            for a in self.arrivals(count or self.count, seed)
        ]


def _tokens(rng: random.Random, vocabulary: int, count: int) -> list[int]:
    return [rng.randrange(FIRST_TOKEN, vocabulary) for _ in range(max(count, 0))]


def from_trace(
    rate: float, prompt: float, prompts: tuple[int, int], output: float, outputs: tuple[int, int], first: int = 0
) -> Callable[[int, int], list[Arrival]]:
    """Return a slice of the real trace: lengths multiplied, then kept within limits, at `rate` requests a second."""

    def arrivals(count: int, seed: int) -> list[Arrival]:
        scale = Scale(prompt, output, prompts[1], outputs[1], rate)
        return [
            Arrival(a.at, max(a.prompt, prompts[0]), max(a.output, outputs[0]))
            for a in trace.read(TRACE, count, scale, first)
        ]

    return arrivals


def evenly(rate: float, prompts: tuple[int, int], outputs: tuple[int, int]) -> Callable[[int, int], list[Arrival]]:
    """Return requests at equal distances, with lengths drawn evenly from ranges."""

    def arrivals(count: int, seed: int) -> list[Arrival]:
        rng = random.Random(seed)
        return [Arrival(i / rate, rng.randint(*prompts), rng.randint(*outputs)) for i in range(count)]

    return arrivals
