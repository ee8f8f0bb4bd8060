"""The report of `adrenaline bench` as one HTML page: the comparison first, and the figures behind it."""

from __future__ import annotations

import html
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from vllm_adrenaline.bench import best, systems
from vllm_adrenaline.bench.report import NOT_ALIKE, PAPER, SHOWN, about_ceiling, shown, told
from vllm_adrenaline.system import web_page

COMPARED = {"output_tok_s": True, "tpot_ms_p50": False, "ttft_ms_p50": False, "kv_prefill_used_share": None}
"""Figures that have ratios, and whether more is better; None: neither."""
LEAST_EFFECT = 0.02
"""How far from 1 a ratio must be at least to be called better or worse, whatever the spread."""
LONGEST_BAR = 3.0
"""The ratio at which a bar is full."""
REPORT = "<!-- report -->"
"""Where page.html wants the report."""


def _cell(text: str, kind: str = "") -> str:
    """Return a cell of a table; `text` is HTML."""
    return f'<td class="{kind}">{text}</td>' if kind else f"<td>{text}</td>"


def _table(header: Sequence[str], rows: Iterable[Sequence[str]], words: int = 1) -> str:
    """Return a table of rows of cells. The first `words` columns are words, and the others are numbers."""
    kinds = ("" if i < words else ' class="n"' for i in range(len(header)))
    names = "".join(f"<th{kind}>{html.escape(name)}</th>" for kind, name in zip(kinds, header, strict=True))
    body = "".join(f"<tr>{''.join(row)}</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{names}</tr></thead><tbody>{body}</tbody></table></div>'


def _ratio(found: dict[str, float | None], more_is_better: bool | None) -> str:
    ratio, text = found["ratio"], html.escape(told(found))
    if ratio is None:
        return _cell(f'<span class="dim">{text}</span>')
    verdict = ""
    if more_is_better is not None and abs(ratio - 1) > max(found["spread"] or 0.0, LEAST_EFFECT):
        verdict = "better" if (ratio > 1) == more_is_better else "worse"
    full = 100 * min(ratio / LONGEST_BAR, 1)
    bar = f'<span class="ratio"><i style="width:{full:.0f}%"></i></span>'
    return _cell(f'<span class="{verdict}">{text}</span>{bar}')


def _comparison(report: dict[str, Any]) -> str:
    rows = [
        [
            _cell(html.escape(f"{cell['workload']}, {cell['model']}")),
            _cell(html.escape(name.removesuffix(f"_over_{systems.BASELINE}"))),
            *(_ratio(ratios[key], better) for key, better in COMPARED.items()),
        ]
        for cell in report["cells"]
        for name, ratios in cell["ratios"].items()
    ]
    if not rows:
        return f"<p>Nothing ran beside {systems.BASELINE}, so that there is nothing to compare.</p>"
    header = ["workload, model", "system", *(SHOWN[key] for key in COMPARED)]
    about = f"Each figure over that of {html.escape(systems.about(systems.BASELINE))} ({systems.BASELINE})."
    return f"<p>{about}</p>{_table(header, rows, words=len(header))}"


def _goodput(report: dict[str, Any]) -> str:
    found = report["goodput_req_s"]
    rows = [
        [_cell(html.escape(model)), _cell(html.escape(name)), _cell(f"{rate:g}", "n")]
        for model, rates in found.items()
        for name, rate in rates.items()
    ]
    if not rows:
        return ""
    table = _table(["model", "system", "requests a second"], rows, words=2)
    return f"<h3>Goodput</h3><p>{html.escape(report['about_goodput'])}.</p>{table}"


def _one_device(report: dict[str, Any]) -> str:
    """Return the throughput of systems on one device over that of the best other one, "" without any."""
    rows = [
        [
            *(_cell(html.escape(each)) for each in (f"{cell['workload']}, {cell['model']}", name, found["best"])),
            _cell(best.in_words(found), "n"),
        ]
        for cell in report["cells"]
        for name, found in cell["over_best"].items()
    ]
    rows += [
        [_cell("geometric mean"), _cell(html.escape(name)), _cell(""), _cell(f"{mean:.3f}", "n")]
        for name, mean in report["geometric_means"].items()
    ]
    if not rows:
        return ""
    return f"<h3>One device</h3>{_table(['workload, model', 'system', 'best other', 'output tok/s, x'], rows, words=3)}"


def _latencies(report: dict[str, Any]) -> str:
    """Return the mean latency of each system at each rate of the ramp, "" without any."""
    tables = []
    for model, by_rate in report["latencies_s"].items():
        header, found = best.latency_table(by_rate)
        rows = [[_cell(rate), *(_cell(latency, "n") for latency in latencies)] for rate, *latencies in found]
        tables.append(f"<h3>Mean latency, s, {html.escape(model)}</h3>{_table(header, rows)}")
    return "".join(tables)


def _figures(cell: dict[str, Any]) -> str:
    """Return all figures of a workload: one row each, one column a system."""
    rows = [
        [_cell(html.escape(text)), *(_cell(shown(figures.get(key), key), "n") for figures in cell["systems"].values())]
        for key, text in SHOWN.items()
    ]
    return _table(["", *cell["systems"]], rows)


def _placements(cell: dict[str, Any]) -> str:
    rows = [
        [_cell(html.escape(name)), _cell(html.escape(what)), _cell(f"{count:.0f}", "n")]
        for name, placements in cell["placements"].items()
        for what, count in sorted(placements.items(), key=lambda each: -each[1])
    ]
    return f"<h3>What placement decided</h3>{_table(['system', 'decision', 'times'], rows, words=2)}" if rows else ""


def _usage(cell: dict[str, Any]) -> str:
    charts = []
    for side in ("decode", "prefill"):
        series = {name: values[side] for name, values in cell["usage"].items() if values.get(side)}
        if series:
            data = html.escape(json.dumps(series))
            charts.append(f'<div><h3>KV blocks in use, {side} side</h3><div data-usage="{data}"></div></div>')
    return f'<div class="charts">{"".join(charts)}</div>'


def _paper(cell: dict[str, Any]) -> str:
    ours = cell["ratios"].get(f"adrenaline_auto_over_{systems.BASELINE}")
    if ours is None or (cell["model"], cell["workload"]) != ("mha", "reasoning"):
        return ""
    rows = [
        [_cell(html.escape(what)), _cell(f"{theirs:.2f} x", "n"), _cell(html.escape(told(ours[key])), "n")]
        for what, theirs, key in PAPER
    ]
    table = _table(["over disaggregated vLLM", "the paper, at most", "here"], rows)
    return f"<h3>Beside the paper</h3>{table}<p>{html.escape(NOT_ALIKE)}</p>"


def page(report: dict[str, Any]) -> str:
    """Return the report (report.summary) as a page that needs nothing else."""
    body = [
        f'<section class="card"><h2>Comparison</h2>{_comparison(report)}{_one_device(report)}{_goodput(report)}'
        f"{_latencies(report)}</section>"
    ]
    for cell in report["cells"]:
        body.append(
            f'<section class="card"><h2>{html.escape(cell["workload"])}, {html.escape(cell["model"])}</h2>'
            f"<p>{html.escape(cell['about'])}; {html.escape(report['models'][cell['model']]['about'])}.</p>"
            f"{_figures(cell)}{_usage(cell)}{_placements(cell)}{_paper(cell)}</section>"
        )
    for model, about in report["models"].items():
        if paragraphs := [f"<p>{html.escape(line)}</p>" for line in about_ceiling(about) if line]:
            body.append(f'<section class="card"><h2>Ceiling, {html.escape(model)}</h2>{"".join(paragraphs)}</section>')
    names = sorted({name for cell in report["cells"] for name in cell["systems"]})
    about_systems = [[_cell(html.escape(name)), _cell(html.escape(systems.about(name)), "t")] for name in names]
    machine = [
        [_cell(html.escape(str(key))), _cell(html.escape(str(value)), "t")] for key, value in report["machine"].items()
    ]
    body.append(
        f'<section class="card"><h2>Systems and machine</h2>{_table(["system", "what it is"], about_systems, words=2)}'
        f"<h3>Machine</h3>{_table(['', ''], machine, words=2)}</section>"
    )
    return web_page.complete(Path(__file__).with_name("page.html").read_text()).replace(REPORT, "\n".join(body))
