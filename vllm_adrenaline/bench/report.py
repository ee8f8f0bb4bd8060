"""The report of `adrenaline bench`: medians, and ratios to vLLM's own disaggregation with their spread."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from typing import Any

from vllm_adrenaline.bench import best, systems
from vllm_adrenaline.bench.conditions import Conditions
from vllm_adrenaline.bench.figures import same_tokens
from vllm_adrenaline.bench.run import Run
from vllm_adrenaline.bench.workloads import LOADS, MODELS, rate_of

SHOWN = {
    "output_tok_s": "output tok/s",
    "ttft_ms_p50": "TTFT p50, ms",
    "ttft_ms_p90": "TTFT p90, ms",
    "tpot_ms_p50": "TPOT p50, ms",
    "tpot_ms_p99": "TPOT p99, ms",
    "e2e_ms_mean": "latency mean, ms",
    "goodput_share": "within objectives",
    "kv_prefill_used_share": "KV used, prefill",
    "kv_decode_used_share": "KV used, decode",
    "busy_prefill_share": "cores busy, prefill",
    "busy_decode_share": "cores busy, decode",
    "preemptions": "preempted",
    "offloaded": "offloaded",
    "attention_gb_s_prefill": "decode attention, prefill side, GB/s",
    "attention_gb_s_decode": "decode side, GB/s",
    "exposed_wait_s": "exposed wait, s",
    "same_tokens": "tokens as vllm_pd's",
}


PAPER = (
    ("output throughput", 1.68, "output_tok_s"),
    ("KV memory used on the prefill side", 2.28, "kv_prefill_used_share"),
)
"""The paper's figures (arXiv 2503.20552, evaluation) that are ratios of what is measured here too."""
NOT_ALIKE = """\
The paper has A100 GPUs, Llama-2 7B and 13B and its own engine; here are CPU cores, a model of 12 layers with random
weights and vLLM with this plugin. Its prefill-side bandwidth (2.07 x) counts what prompts read too, which is not
measured here: the table above has what decode attention reads. Its decode-side compute (1.67 x) is that of the GEMMs,
which is proportional to output tokens per second: the same ratio as throughput here, by definition."""


def summary(
    results: Sequence[Run],
    machine: dict[str, Any],
    ceilings: dict[str, dict[str, float]] | None = None,
    conditions: Conditions = Conditions(),  # noqa: B008 - frozen
) -> dict[str, Any]:
    """Return the report as plain data. It has one cell, with `systems` and `ratios`, per model and workload.

    A ratio is the median over repeats of the ratio within a repeat. Its `spread` is half the range of those, or None
    for a single one. Where the spread is larger than the effect, `ratio` is None: the runs do not tell. `ceilings` has
    what bench/ceiling.py measured, by model.
    """
    by_place: dict[tuple[str, str], dict[str, dict[int, Run]]] = {}
    for run in results:
        if rate_of(run.load) is None:
            by_place.setdefault((run.model, run.load), {}).setdefault(run.system, {})[run.repeat] = run
    cells = []
    for (model, load), found in by_place.items():
        baseline = found.get(systems.BASELINE, {})
        cell: dict[str, Any] = {"model": model, "workload": load, "about": LOADS[load].about}
        cell |= {"systems": {}, "ratios": {}, "usage": {}, "placements": {}, "over_best": best.over_best(found)}
        for name, runs in found.items():
            shown = next(iter(runs.values()))
            figures = {key: statistics.median(run.figures[key] for run in runs.values()) for key in shown.figures}
            same = [
                same_tokens(run.tokens, baseline[repeat].tokens) for repeat, run in runs.items() if repeat in baseline
            ]
            if same:
                figures["same_tokens"] = min(same)
            figures["requests"] = shown.count
            cell["usage"][name] = {side: [round(each, 3) for each in values] for side, values in shown.usage.items()}
            cell["placements"][name] = shown.placements
            cell["systems"][name] = {key: round(value, 4) for key, value in figures.items()}
            if name != systems.BASELINE and baseline:
                cell["ratios"][f"{name}_over_{systems.BASELINE}"] = {
                    key: _ratio(runs, baseline, key)
                    for key in ("output_tok_s", "tpot_ms_p50", "ttft_ms_p50", "kv_prefill_used_share")
                }
        cells.append(cell)
    models = {model: {"about": MODELS[model].about} | _ceiling(ceilings, model, cells) for model in _models(results)}
    return {
        "cells": cells,
        "models": models,
        "goodput_req_s": _goodput(results),
        "geometric_means": best.geometric_means(cells),
        "latencies_s": best.latencies(results),
        "about_goodput": conditions.about_ramp,
        "machine": machine | {"dtype": conditions.dtype},
    }


def _models(results: Sequence[Run]) -> list[str]:
    return list(dict.fromkeys(run.model for run in results))


def _ceiling(ceilings: dict[str, dict[str, float]] | None, model: str, cells: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the ceiling of a model, the share of attention in its step, and how near each system comes to it."""
    if not ceilings or model not in ceilings:
        return {}
    found, reached = ceilings[model], {}
    for cell in cells:
        if (cell["model"], cell["workload"]) == (model, "reasoning"):
            ratios = {name: each["output_tok_s"]["ratio"] for name, each in cell["ratios"].items()}
            reached = {
                name.removesuffix(f"_over_{systems.BASELINE}"): round(ratio / found["native_ratio"], 3)
                for name, ratio in ratios.items()
                if ratio is not None
            }
    share = round(found["local_attention_ms"] / found["local_ms"], 3)
    return {"ceiling": found, "attention_share": share, "reached_of_ceiling": reached}


def _goodput(results: Sequence[Run]) -> dict[str, dict[str, float]]:
    """Return the highest rate of the ramp that has its goodput, by model and system, 0 if there is none."""
    found: dict[str, dict[str, float]] = {}
    for run in results:
        if (rate := rate_of(run.load)) is not None:
            by_system = found.setdefault(run.model, {})
            by_system[run.system] = max(by_system.get(run.system, 0.0), rate if run.has_goodput else 0.0)
    return found


def _ratio(runs: dict[int, Run], baseline: dict[int, Run], key: str) -> dict[str, float | None]:
    pairs = [
        run.figures[key] / baseline[repeat].figures[key]
        for repeat, run in runs.items()
        if repeat in baseline and baseline[repeat].figures[key] > 0
    ]
    if not pairs:
        return {"ratio": None, "spread": None}
    ratio, spread = statistics.median(pairs), (max(pairs) - min(pairs)) / 2
    told = len(pairs) == 1 or spread <= abs(ratio - 1) or spread < 0.02
    return {"ratio": round(ratio, 4) if told else None, "spread": round(spread, 4) if len(pairs) > 1 else None}


def shown(value: float | None, key: str) -> str:
    """Return a figure as text for people; `key` is one of SHOWN."""
    if value is None:
        return "-"
    if key.endswith("_share") or key == "same_tokens":
        return f"{100 * value:.0f} %"
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}"


def told(found: dict[str, float | None]) -> str:
    """Return a ratio and its spread as text for people."""
    ratio, spread = found["ratio"], found["spread"]
    if ratio is None:
        return "not told" if spread is None else f"not told (spread {spread})"
    return f"x {ratio:.2f} (one run)" if spread is None else f"x {ratio:.2f} ± {spread:.2f}"


def markdown(report: dict[str, Any]) -> str:
    """Return the report as Markdown."""
    lines = ["# adrenaline bench", "", f"Machine: {json.dumps(report['machine'])}", ""]
    for model, about in report["models"].items():
        lines += [f"## Model {model}", "", f"{about['about']}.", *about_ceiling(about), ""]
        if goodput := report["goodput_req_s"].get(model):
            rates = ", ".join(f"{name} {rate:g}" for name, rate in goodput.items())
            lines += [f"{report['about_goodput']}: {rates}.", ""]
    for cell in report["cells"]:
        lines += [
            f"## {cell['workload']}, {cell['model']}",
            "",
            f"{cell['about']}; {report['models'][cell['model']]['about']}.",
            "",
        ]
        lines += ["| system | " + " | ".join(SHOWN.values()) + " |", "|---" * (len(SHOWN) + 1) + "|"]
        for name, figures in cell["systems"].items():
            lines.append(f"| {name} | " + " | ".join(shown(figures.get(key), key) for key in SHOWN) + " |")
        lines.append("")
        for name, ratios in cell["ratios"].items():
            said = ", ".join(f"{SHOWN[key]} {told(ratio)}" for key, ratio in ratios.items())
            lines.append(f"* {name}: {said}")
        for name, placements in cell["placements"].items():
            if placements:
                decided = ", ".join(f"{what} {count:.0f}" for what, count in sorted(placements.items()))
                lines.append(f"* {name} decided: {decided}")
        lines += ["", *_beside_the_paper(cell)]
    lines += best.markdown(report)
    names = sorted({name for cell in report["cells"] for name in cell["systems"]})
    lines += [f"* `{name}`: {systems.about(name)}" for name in names]
    return "\n".join(lines) + "\n"


def about_ceiling(about: dict[str, Any]) -> list[str]:
    """Return what bare operators can do, as paragraphs and empty lines between them."""
    if "ceiling" not in about:
        return []
    found = about["ceiling"]
    lines = [
        "",
        f"Bare operators, no engine: a step of {found['rows']:.0f} rows of {found['context']:.0f} tokens takes "
        f"{found['local_ms']:.1f} ms, {100 * about['attention_share']:.0f} % of it attention; twice the rows, half of "
        f"them attended on the other side, {found['twice_ms']:.1f} ms: {found['ratio']:.2f} x the rows a second. With "
        f"native attention in the latter, {found['native_ratio']:.2f} x: the ceiling where KV memory doubles.",
    ]
    if about["reached_of_ceiling"]:
        reached = ", ".join(f"{name} {100 * part:.0f} %" for name, part in about["reached_of_ceiling"].items())
        lines += ["", f"Ratio on the workload `reasoning` over that ceiling: {reached}."]
    return lines


def _beside_the_paper(cell: dict[str, Any]) -> list[str]:
    ours = cell["ratios"].get(f"adrenaline_auto_over_{systems.BASELINE}")
    if ours is None or (cell["model"], cell["workload"]) != ("mha", "reasoning"):
        return []
    lines = ["| over disaggregated vLLM | the paper, at most | here |", "|---|---|---|"]
    for what, theirs, key in PAPER:
        ratio = ours[key]["ratio"]
        lines.append(f"| {what} | {theirs:.2f} x | {'not told' if ratio is None else f'{ratio:.2f} x'} |")
    return [*lines, "", NOT_ALIKE, ""]
