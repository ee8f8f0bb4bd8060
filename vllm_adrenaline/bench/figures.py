"""The figures of a run: throughput in tokens a second, latencies in milliseconds, goodput, equal tokens."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Sequence

from vllm_adrenaline.system.statistics import percentile
from vllm_adrenaline.workload.client import Answer

PERCENTILES = (50, 90, 99)


def ttft_ms(answer: Answer) -> float:
    """Return the milliseconds from sending a request to its first token."""
    return 1000 * (answer.times[0] - answer.sent)


def tpot_ms(answer: Answer) -> float:
    """Return the mean milliseconds between two tokens, 0 for an answer of one token."""
    steps = len(answer.times) - 1
    return 1000 * (answer.times[-1] - answer.times[0]) / steps if steps else 0.0


def of(answers: Sequence[Answer], prompt_tokens: int = 0) -> dict[str, float]:
    """Return the run's seconds, its throughput, and the mean and percentiles of TTFT, TPOT, ITL and E2E latency.

    `output_tok_s` counts the answers' tokens, `total_tok_s` the prompts' too.
    """
    took = max(a.times[-1] for a in answers) - min(a.sent for a in answers)
    made = sum(len(a.times) for a in answers)
    result = {"output_tok_s": made / took, "total_tok_s": (made + prompt_tokens) / took, "seconds": took}
    series = {
        "ttft_ms": [ttft_ms(a) for a in answers],
        "tpot_ms": [tpot_ms(a) for a in answers if len(a.times) > 1],
        "itl_ms": [1000 * (end - begin) for a in answers for begin, end in itertools.pairwise(a.times)],
        "e2e_ms": [1000 * (a.times[-1] - a.sent) for a in answers],
    }
    for name, values in series.items():
        result[f"{name}_mean"] = statistics.mean(values) if values else 0.0
        result |= {f"{name}_p{p}": percentile(values, p / 100) for p in PERCENTILES}
    return result


def attended_tokens(answers: Sequence[Answer], prompts: Sequence[int]) -> int:
    """Return how many tokens of context all decode steps read together, for answers to prompts of these lengths.

    What was computed twice counts once.
    """
    return sum(
        len(answer.tokens[1:]) * prompt + len(answer.tokens) * (len(answer.tokens) - 1) // 2
        for answer, prompt in zip(answers, prompts, strict=True)
    )


def goodput_share(answers: Sequence[Answer], ttft_slo_ms: float, tpot_slo_ms: float) -> float:
    """Return the share of requests, 0 to 1, that met both objectives."""
    return statistics.mean(ttft_ms(a) <= ttft_slo_ms and tpot_ms(a) <= tpot_slo_ms for a in answers)


def same_token_count(answers: Sequence[Sequence[int]], reference: Sequence[Sequence[int]]) -> int:
    """Return how many tokens come before the first, in each answer, that differs from the reference's."""
    same = 0
    for mine, its in zip(answers, reference, strict=True):
        pairs = enumerate(zip(mine, its, strict=True))
        same += next((i for i, (a, b) in pairs if a != b), len(its))
    return same


def same_tokens(answers: Sequence[Sequence[int]], reference: Sequence[Sequence[int]]) -> float:
    """Return the same as a share of the reference's tokens, 0 to 1."""
    return same_token_count(answers, reference) / max(sum(map(len, reference)), 1)


def seconds_by_rows(answers: Sequence[Answer], at_least: int = 30) -> dict[int, float]:
    """Return the median seconds between two tokens by the number of requests that were decoding.

    Numbers with fewer than `at_least` samples are left out.
    """
    spans = sorted((a.times[0], a.times[-1]) for a in answers)
    found: dict[int, list[float]] = {}
    for answer in answers:
        for begin, end in itertools.pairwise(answer.times):
            rows = sum(first <= begin and end <= last for first, last in spans)
            found.setdefault(rows, []).append(end - begin)
    return {rows: statistics.median(times) for rows, times in sorted(found.items()) if len(times) >= at_least}
