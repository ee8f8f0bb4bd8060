"""The tables in docs/ that are made from code: options, commands, metrics.

    python tools/docs.py             # write them anew
    python tools/docs.py --check     # exit with 1 if one is not as the code says; `make test` runs this

A table stands between two comments, `<!-- made by tools/docs.py: NAME -->` and `<!-- end -->`.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from vllm_adrenaline import cli, config  # noqa: E402

DOCS = ROOT / "docs"
PLACE = re.compile(r"(<!-- made by tools/docs\.py: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table. A bar within a cell does not end it."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |\n" for cells in lines)


def sentence(text: str) -> str:
    """Return a text that begins with a capital letter."""
    return text[:1].upper() + text[1:]


def options() -> str:
    """Return the table of an engine's options, from config.py."""
    rows = []
    for name, flag, arguments in config.flags():
        role = config.role_of(name)
        text = sentence(arguments["help"].removeprefix(f"{role} engine: ".capitalize()))
        value = ", ".join(arguments.get("choices", ())) or arguments.get("metavar") or ""
        rows.append((f"`{flag}`", f"`{value}`" if value else "", role or "both", text))
    return table(("flag of `vllm serve`", "value", "engine", "meaning"), rows)


def command(name: str) -> str:
    """Return the table of the options of a command of `adrenaline`, from its parser."""
    commands = cli.make_parser([name])._subparsers
    assert commands is not None
    parser = commands._group_actions[0].choices[name]  # type: ignore[index, call-overload]
    formatter = parser._get_formatter()
    rows = []
    for action in parser._actions:
        if action.help is argparse.SUPPRESS or "--help" in action.option_strings:
            continue
        value = action.metavar or ("" if action.nargs == 0 else action.dest.upper())
        words = f"{action.option_strings[-1]} {value}".strip() if action.option_strings else str(value)
        rows.append((f"`{words}`", formatter._expand_help(action).replace("\n", " ")))
    return table(("option", "meaning"), rows)


UNITS = {"params": "requests", "prefill": "requests", "refused": "requests, connections", "way": "requests"}
"""Units of metrics whose names do not end in them."""


def _metric(name: str, kind: str, labels: Sequence[str], text: str) -> tuple[str, ...]:
    from vllm_adrenaline.engine.metrics import ADVICE

    meaning, _, advice = text.partition(ADVICE)
    last = name.removesuffix("_total").removesuffix("_per_token").rsplit("_", 1)[-1]
    unit = "seconds" if "_seconds" in name else UNITS.get(last, last)
    by = f" by {', '.join(f'`{label}`' for label in labels)}" if labels else ""
    return f"`{name}`", kind, unit + by, meaning, sentence(advice)


HEADS = ("metric", "type", "unit and labels", "meaning", "if it is high")


def engine_metrics() -> str:
    """Return the table of an engine's metrics, from engine/metrics.py."""
    from vllm_adrenaline.engine.metrics import COUNTERS, GAUGES, PLACED

    rows = [_metric(f"vllm:adrenaline_{name}_total", "counter", (), text) for name, text in COUNTERS.items()]
    rows += [_metric("vllm:adrenaline_placements_total", "counter", ("placement", "reason"), PLACED)]
    rows += [_metric(f"vllm:adrenaline_{name}", "gauge", (), text) for name, text in GAUGES.items()]
    return table(HEADS, rows)


def gpu_metrics() -> str:
    """Return the table of the metrics of an engine's GPUs, from engine/metrics.py."""
    from vllm_adrenaline.engine.metrics import GPU_GAUGES

    return table(
        HEADS, [_metric(f"vllm:adrenaline_{name}", "gauge", ("gpu",), text) for name, text in GPU_GAUGES.items()]
    )


def proxy_metrics() -> str:
    """Return the table of the proxy's metrics, from proxy/counts.py."""
    from prometheus_client.metrics import MetricWrapperBase

    from vllm_adrenaline.proxy.counts import Counts

    rows = []
    for metric in vars(Counts()).values():
        if isinstance(metric, MetricWrapperBase):
            name = metric._name + ("_total" if metric._type == "counter" else "")
            rows.append(_metric(name, metric._type, metric._labelnames, metric._documentation))
    return table(HEADS, rows)


TABLES: dict[str, Callable[[], str]] = {
    "options": options,
    "up": lambda: command("up"),
    "proxy": lambda: command("proxy"),
    "engine_metrics": engine_metrics,
    "gpu_metrics": gpu_metrics,
    "proxy_metrics": proxy_metrics,
}


def renewed(text: str) -> str:
    """Return the text of a page with its tables as the code says."""
    return PLACE.sub(lambda found: f"{found[1]}\n{TABLES[found[2]]()}\n{found[3]}", text)


def main(words: Sequence[str]) -> int:
    """Write the tables or, with --check, name the pages that are stale; return the exit status."""
    stale = [page for page in sorted(DOCS.glob("*.md")) if renewed(page.read_text()) != page.read_text()]
    for page in stale:
        if "--check" not in words:
            page.write_text(renewed(page.read_text()))
        print(f"{'stale' if '--check' in words else 'written'}: {page.name}")
    return int("--check" in words and bool(stale))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
