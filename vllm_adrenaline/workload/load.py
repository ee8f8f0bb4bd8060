"""Workloads: which requests are sent when. Their prompts are random tokens, their answers have exact lengths."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from vllm_adrenaline.workload import trace
from vllm_adrenaline.workload.trace import Arrival, Scale

TRACE = Path(__file__).parent / "data" / "azure_conv_400.csv"
FIRST_TOKEN = 5
"""Smaller token ids are special in the models of the benchmarks (tiny_model.py)."""


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
    """One workload of `count` requests.

    `about` says in words what it stands for. `arrivals(count, seed)` makes its times and lengths. All prompts begin
    with the same `shared` tokens.
    """

    name: str
    about: str
    count: int
    arrivals: Callable[[int, int], list[Arrival]]
    shared: int = 0

    def requests(self, vocabulary: int, seed: int, count: int = 0) -> list[Request]:
        """Return the first `count` requests, or all for 0, with token ids below `vocabulary`."""
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
    """Return arrivals(count, seed) that are a slice of the real trace, from its request number `first` on.

    They come at `rate` requests a second. Lengths are multiplied by `prompt` and `output`, then kept within the limits
    `prompts` and `outputs`, in tokens.
    """

    def arrivals(count: int, seed: int) -> list[Arrival]:
        scale = Scale(prompt, output, prompts[1], outputs[1], rate)
        return [
            Arrival(a.at, max(a.prompt, prompts[0]), max(a.output, outputs[0]))
            for a in trace.read(TRACE, count, scale, first)
        ]

    return arrivals


def evenly(rate: float, prompts: tuple[int, int], outputs: tuple[int, int]) -> Callable[[int, int], list[Arrival]]:
    """Return arrivals(count, seed) that come at equal distances, `rate` a second.

    Their lengths in tokens are drawn evenly from the ranges `prompts` and `outputs`.
    """

    def arrivals(count: int, seed: int) -> list[Arrival]:
        rng = random.Random(seed)
        return [Arrival(i / rate, rng.randint(*prompts), rng.randint(*outputs)) for i in range(count)]

    return arrivals
