"""The systems on one device against the best of the others, and mean latency by the rate of the ramp."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from vllm_adrenaline.bench.run import Run
from vllm_adrenaline.bench.systems import POOLS
from vllm_adrenaline.bench.workloads import rate_of

FIGURE = "output_tok_s"


def over_best(systems: Mapping[str, Mapping[int, Run]]) -> dict[str, dict[str, Any]]:
    """Return the throughput of each system on one device over the best other one's: `best`, `ratio` and `ratios`.

    `systems` has the runs of a workload by system and repeat. The best other one is that with the highest median. A
    ratio is of one repeat, and `ratio` their median.
    """
    others = {name: runs for name, runs in systems.items() if name not in POOLS}
    if not others:
        return {}
    best = max(others, key=lambda name: statistics.median(run.figures[FIGURE] for run in others[name].values()))
    found = {}
    for name, runs in systems.items():
        if name in POOLS and (both := [repeat for repeat in runs if repeat in others[best]]):
            ratios = [runs[repeat].figures[FIGURE] / others[best][repeat].figures[FIGURE] for repeat in both]
            found[name] = {
                "best": best,
                "ratio": round(statistics.median(ratios), 4),
                "ratios": [round(each, 4) for each in ratios],
            }
    return found


def geometric_means(cells: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Return the geometric mean of these ratios over all workloads and models, by system."""
    found: dict[str, list[float]] = {}
    for cell in cells:
        for name, each in cell["over_best"].items():
            found.setdefault(name, []).append(each["ratio"])
    return {name: round(statistics.geometric_mean(ratios), 4) for name, ratios in found.items()}


def latencies(results: Sequence[Run]) -> dict[str, dict[str, dict[str, float]]]:
    """Return the mean latency of a request in seconds at each rate of the ramp, by model, rate and system."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    for run in sorted(results, key=lambda run: rate_of(run.load) or 0.0):
        if (rate := rate_of(run.load)) is not None:
            by_rate = found.setdefault(run.model, {}).setdefault(f"{rate:g}", {})
            by_rate[run.system] = round(run.figures["e2e_ms_mean"] / 1000, 3)
    return found


def in_words(found: Mapping[str, Any]) -> str:
    """Return a ratio of `over_best` and those of its repeats as text for people."""
    return f"{found['ratio']:.2f} ({', '.join(f'{ratio:.2f}' for ratio in found['ratios'])})"


def latency_table(by_rate: Mapping[str, Mapping[str, float]]) -> tuple[list[str], list[list[str]]]:
    """Return the header and the rows of a table of the latencies of a model, as text for people."""
    names = list(dict.fromkeys(name for found in by_rate.values() for name in found))
    rows = [
        [rate, *(f"{found[name]:.2f}" if name in found else "" for name in names)] for rate, found in by_rate.items()
    ]
    return ["requests a second", *names], rows


def markdown(report: Mapping[str, Any]) -> list[str]:
    """Return all that as lines of Markdown."""
    lines = []
    if means := report["geometric_means"]:
        lines += ["## One device, over the best other system", "", "| workload, model | system | best other | x |"]
        lines += ["|---|---|---|---|"]
        for cell in report["cells"]:
            for name, each in cell["over_best"].items():
                lines.append(f"| {cell['workload']}, {cell['model']} | {name} | {each['best']} | {in_words(each)} |")
        lines += [f"| geometric mean | {name} | | {mean:.3f} |" for name, mean in means.items()] + [""]
    for model, by_rate in report["latencies_s"].items():
        header, rows = latency_table(by_rate)
        lines += [f"## Mean latency, s, {model}", "", f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
        lines += [f"| {' | '.join(row)} |" for row in rows] + [""]
    return lines
