"""From runs to a report: medians, ratios to vLLM's own disaggregation with their spread, tables and plots."""

from __future__ import annotations

import html
import json
import statistics
from collections.abc import Sequence
from typing import Any

from vllm_adrenaline.bench import systems
from vllm_adrenaline.bench.figures import same_tokens
from vllm_adrenaline.bench.run import Run
from vllm_adrenaline.bench.workloads import LOADS, MODELS

SHOWN = {
    "output_tok_s": "output tok/s",
    "ttft_ms_p50": "TTFT p50, ms",
    "ttft_ms_p90": "TTFT p90, ms",
    "tpot_ms_p50": "TPOT p50, ms",
    "tpot_ms_p99": "TPOT p99, ms",
    "goodput_share": "within objectives",
    "kv_prefill_used_share": "KV used, prefill",
    "kv_decode_used_share": "KV used, decode",
    "busy_prefill_share": "cores busy, prefill",
    "busy_decode_share": "cores busy, decode",
    "preemptions": "preempted",
    "offloaded": "offloaded",
    "exposed_wait_s": "exposed wait, s",
    "same_tokens": "tokens as vllm_pd's",
}


def summary(results: Sequence[Run], machine: dict[str, Any]) -> dict[str, Any]:
    """Return the report as plain data: per model and workload, `systems` and `ratios`.

    A ratio is the median over repeats of the ratio within a repeat; `spread` is half the range of those. Where the
    spread is larger than the effect, `ratio` is None: the runs do not tell.
    """
    by_place: dict[tuple[str, str], dict[str, dict[int, Run]]] = {}
    for run in results:
        by_place.setdefault((run.model, run.load), {}).setdefault(run.system, {})[run.repeat] = run
    cells = []
    for (model, load), found in by_place.items():
        baseline = found.get(systems.BASELINE, {})
        cell: dict[str, Any] = {"model": model, "workload": load, "about": LOADS[load].about}
        cell |= {"systems": {}, "ratios": {}}
        for name, runs in found.items():
            figures = {
                key: statistics.median(run.figures[key] for run in runs.values())
                for key in next(iter(runs.values())).figures
            }
            same = [
                same_tokens(run.tokens, baseline[repeat].tokens) for repeat, run in runs.items() if repeat in baseline
            ]
            if same:
                figures["same_tokens"] = min(same)
            figures["requests"] = next(iter(runs.values())).count
            cell["systems"][name] = {key: round(value, 4) for key, value in figures.items()}
            if name != systems.BASELINE and baseline:
                cell["ratios"][f"{name}_over_{systems.BASELINE}"] = {
                    key: _ratio(runs, baseline, key)
                    for key in ("output_tok_s", "tpot_ms_p50", "ttft_ms_p50", "kv_prefill_used_share")
                }
        cells.append(cell)
    return {"cells": cells, "models": {m: MODELS[m].about for m in {c["model"] for c in cells}}, "machine": machine}


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
    return {"ratio": round(ratio, 4) if told else None, "spread": round(spread, 4)}


def _shown(value: float | None, key: str) -> str:
    if value is None:
        return "-"
    if key.endswith("_share") or key == "same_tokens":
        return f"{100 * value:.0f} %"
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}"


def markdown(report: dict[str, Any]) -> str:
    """Return the report as Markdown."""
    lines = ["# adrenaline bench", "", f"Machine: {json.dumps(report['machine'])}", ""]
    for cell in report["cells"]:
        lines += [
            f"## {cell['workload']}, {cell['model']}",
            "",
            f"{cell['about']}; {report['models'][cell['model']]}.",
            "",
        ]
        lines += ["| system | " + " | ".join(SHOWN.values()) + " |", "|---" * (len(SHOWN) + 1) + "|"]
        for name, figures in cell["systems"].items():
            lines.append(f"| {name} | " + " | ".join(_shown(figures.get(key), key) for key in SHOWN) + " |")
        lines.append("")
        for name, ratios in cell["ratios"].items():
            told = ", ".join(
                f"{SHOWN[key]} x {r['ratio']:.2f} ± {r['spread']:.2f}"
                if r["ratio"] is not None
                else f"{SHOWN[key]}: not told (spread {r['spread']})"
                for key, r in ratios.items()
            )
            lines.append(f"* {name}: {told}")
        lines.append("")
    names = sorted({name for cell in report["cells"] for name in cell["systems"]})
    lines += [f"* `{name}`: {systems.about(name)}" for name in names]
    return "\n".join(lines) + "\n"


BAR, ROW, LABEL, WIDTH = 14, 20, 150, 640
COLOURS = ("#9aa0a6", "#5f6368", "#bdc1c6", "#1a73e8", "#34a853", "#fbbc04", "#ea4335", "#a142f4")


def _bars(title: str, values: dict[str, float]) -> str:
    most = max(values.values()) or 1.0
    height = 30 + ROW * len(values)
    parts = [f'<svg width="{WIDTH}" height="{height}" role="img"><text x="0" y="15">{html.escape(title)}</text>']
    for i, (name, value) in enumerate(values.items()):
        y, length = 24 + ROW * i, (WIDTH - LABEL - 70) * value / most
        parts.append(
            f'<text x="0" y="{y + 11}" class="s">{html.escape(name)}</text>'
            f'<rect x="{LABEL}" y="{y}" width="{length:.1f}" height="{BAR}" fill="{COLOURS[i % len(COLOURS)]}"/>'
            f'<text x="{LABEL + length + 5:.1f}" y="{y + 11}" class="s">{value:.4g}</text>'
        )
    return "".join(parts) + "</svg>"


def page(report: dict[str, Any]) -> str:
    """Return the report as one self-contained HTML page with plots."""
    body = []
    for cell in report["cells"]:
        title = f"{cell['workload']}, {cell['model']}"
        body.append(f"<h2>{html.escape(title)}</h2><p>{html.escape(cell['about'])}</p>")
        for key in ("output_tok_s", "ttft_ms_p50", "tpot_ms_p50", "kv_prefill_used_share", "kv_decode_used_share"):
            body.append(_bars(SHOWN[key], {name: figures[key] for name, figures in cell["systems"].items()}))
    style = "body{font:14px sans-serif;margin:2em;max-width:60em}svg{display:block;margin:1em 0}.s{font-size:12px}"
    table = f"<pre>{html.escape(markdown(report))}</pre>"
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>adrenaline bench</title><style>{style}</style>'
        f"<h1>adrenaline bench</h1>{''.join(body)}<h2>All figures</h2>{table}</html>\n"
    )
