"""Which engine does the work of the other: pure functions from the load of both sides to a decision.

A prefill engine decides about each prompt shortly before it would compute it. Computed here and decoded there is the
rule. Two things can be better: the decode side computes the prompt as well (it is handed over), or the prefill engine
decodes as well (the request stays). Work moves to the side that will be done sooner (docs/placement.md, Elastic).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from enum import Enum
from typing import Protocol

import msgspec

from vllm_adrenaline.placement.costs import Costs
from vllm_adrenaline.system.arithmetic import neighbours, on_line

SOONER = 0.8
"""What the other side may need at most, as a fraction of what this side needs, so that work moves. What is compared
are guesses, and the one about the other side is up to a heartbeat old."""
LEAST_CHUNK = 4
"""Tokens of prompts that a step computes at least, so that no prompt waits for ever beside decodes that are slow."""
LONGEST_S = 0.5
"""How long a step that only computes prompts takes at most: whoever is to decode has to wait for its end."""


class Outcome(Enum):
    """What becomes of a prompt that is not simply computed here and decoded there."""

    HANDED_OVER = "handed_over"
    STAYS = "stays"


class Cause(Enum):
    """Why; every pair of outcome and cause is counted."""

    TTFT = "ttft_slo"
    """Its first token would come too late here, and sooner there."""
    SOONER = "sooner"
    """The other side will be done with all it has to do clearly sooner."""
    DECODE_FULL = "decode_full"
    """Requests wait for memory of the decode side, and this engine has some."""


class Side(Protocol):
    """What a decode engine could take over, as it says itself (control/messages.py, Slack)."""

    @property
    def prompt_rate(self) -> float:
        """Tokens of prompts that it could compute in a second beside what it decodes; 0: none."""

    @property
    def prompt_backlog(self) -> int:
        """Tokens of prompts that it has to compute already."""

    @property
    def prompt_room(self) -> int:
        """Tokens of the longest prompt for which it has memory until everybody ends."""

    @property
    def work(self) -> float:
        """Seconds that all its requests take until the last one ends."""

    @property
    def is_full(self) -> bool:
        """Whether requests wait there for memory."""


def first_token_after(side: Side, tokens: int) -> float:
    """Return the seconds until a decode engine would have computed a prompt of which `tokens` are missing.

    inf: it will not.
    """
    return (side.prompt_backlog + tokens) / side.prompt_rate if side.prompt_rate > 0 else math.inf


class Prompt(msgspec.Struct, frozen=True):
    """A prompt on the prefill engine.

    Attributes:
        missing: Tokens that the other side would have to compute.
        tokens: All its tokens.
        waited: Seconds since its request came.
        ahead: Seconds of other prompts' work that come before it here.
        seconds: Seconds of its own work here.
        work: Seconds until all that is to be done here is done, with this prompt computed here.
    """

    missing: int
    tokens: int
    waited: float
    ahead: float
    seconds: float
    work: float


def hand_over(prompt: Prompt, sides: Sequence[Side], ttft_slo: float | None) -> Cause | None:
    """Return why the decode side is to compute what is missing of a prompt; None if it is not.

    Args:
        prompt: The prompt.
        sides: All decode engines: a router chooses among them, so the slowest counts.
        ttft_slo: Objective for the time to first token in seconds. While it is met here, nothing is handed over.
    """
    if not sides or any(prompt.tokens > side.prompt_room for side in sides):
        return None
    here = prompt.ahead + prompt.seconds
    there = max(first_token_after(side, prompt.missing) for side in sides)
    if there >= SOONER * here:
        return None
    if ttft_slo is not None:
        return Cause.TTFT if prompt.waited + here > ttft_slo else None
    # The first token is not all: who has more to do in all is to get nothing more.
    is_free = all(side.work + prompt.missing / side.prompt_rate < SOONER * prompt.work for side in sides)
    return Cause.SOONER if is_free else None


def stay(work: float, sides: Sequence[Side]) -> Cause | None:
    """Return why the prefill engine is to decode a request as well; None if it is not to.

    Args:
        work: Seconds until all that is to be done here is done, with the request decoded here.
        sides: All decode engines, with what decoding the request adds to their work. The best of them counts: if one
            will be done sooner, the request is to go there.
    """
    if not sides or any(work >= SOONER * side.work for side in sides):
        return None
    return Cause.DECODE_FULL if all(side.is_full for side in sides) else Cause.SOONER


def work_seconds(costs: Costs, rows: Sequence[tuple[int, int]]) -> float:
    """Return how long requests of (tokens, expected growth) take until the last one ends, if all decode together."""
    lengths = sorted(rows, key=lambda row: row[1])
    total = sum(tokens for tokens, _ in lengths)
    seconds, done = 0.0, 0
    for number, (tokens, growth) in enumerate(lengths):
        left, more = len(lengths) - number, growth - done
        if more > 0:
            middle = total + left * (done + more / 2)
            seconds += more * costs.seconds(left, middle, [])
            done = growth
        total -= tokens
    return seconds


def prompt_seconds(curve: Sequence[tuple[int, float]], tokens: int) -> float:
    """Return what a prompt of `tokens` takes, by (tokens, seconds) of some, ascending: on lines between and beyond."""
    if len(curve) == 1 or tokens <= curve[0][0]:
        return curve[0][1] * min(1.0, tokens / curve[0][0]) if tokens > 0 else 0.0
    return on_line(*neighbours(curve, tokens), tokens)


def chunk(step: float, per_token: float, limit: float, most: int) -> int:
    """Return how many tokens of prompts a step may compute beside its decodes.

    Args:
        step: Seconds of the step without prompts; 0 if it decodes nothing.
        per_token: Seconds that a token of a prompt adds.
        limit: Seconds that a step with decodes may take.
        most: Tokens that a step may compute in any case.
    """
    if per_token <= 0:
        return most
    if step <= 0:
        return max(1, min(most, int(LONGEST_S / per_token)))
    return max(min(LEAST_CHUNK, most), min(most, int((limit - step) / per_token)))


def chunk_rate(step: float, per_token: float, tokens: int) -> float:
    """Return the tokens of prompts that are computed in a second, by `chunk`'s arguments and result."""
    seconds = step + per_token * tokens
    return tokens / seconds if seconds > 0 else 0.0
