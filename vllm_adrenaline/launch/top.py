"""`adrenaline top`: what engines do, live, in a terminal."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from vllm_adrenaline.errors import AdrenalineError
from vllm_adrenaline.launch.engine_metrics import EngineMetrics
from vllm_adrenaline.launch.status import engines_at, name_at
from vllm_adrenaline.proxy.snapshot import Recent

DESCRIPTION = """\
Show what engines do, again every few seconds until Ctrl-C: batches, KV memory, times in ms (TTFT, TPOT), the share of
time spent waiting for executors with nothing else to do (exposed), and what placement decides now. Reads what
`adrenaline status` reads. Where the output is no terminal, it is written once.
"""
HOT = 0.95
"""A share of KV memory in use from which it is shown in red."""
BAR = 8
MOST_REASONS = 12


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("engines", nargs="+", metavar="URL", help="engines, or a proxy in front of them")
    parser.add_argument(
        "--every", type=float, default=2.0, metavar="SECONDS", help="time between two looks (default: %(default)s)"
    )


@dataclass
class Watched:
    """An engine that is looked at again and again.

    `state` and `rates` are of the last look, `trouble` is why that failed, or empty. `decided` has how often placement
    decided what between the last two looks.
    """

    url: str
    state: dict[str, Any] = field(default_factory=dict)
    rates: dict[str, float | None] = field(default_factory=dict)
    decided: dict[tuple[str, str], int] = field(default_factory=dict)
    trouble: str = ""
    recent: Recent = field(default_factory=Recent)

    def look(self) -> None:
        """Read the engine's metrics."""
        try:
            metrics = EngineMetrics(self.url).read()
            found = metrics.state()
            rates = self.recent.rates(time.monotonic(), metrics.counters())
        except (AdrenalineError, ValueError) as error:
            self.trouble = str(error)
            return
        before = {(each["placement"], each["reason"]): each["count"] for each in self.state.get("placements", ())}
        self.decided = {
            key: each["count"] - before.get(key, 0)
            for each in found["placements"]
            if each["count"] > before.get(key := (each["placement"], each["reason"]), 0)
        }
        self.state, self.rates, self.trouble = found, rates, ""


def _table(words: Sequence[str], figures: Sequence[str]) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold")
    for name in words:
        table.add_column(name, no_wrap=True, max_width=15)
    for name in figures:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _figure(value: float | None, digits: int = 0) -> str:
    return "-" if value is None else f"{value:,.{digits}f}"


def _kv(state: dict[str, Any]) -> Text:
    used = state["kv_used"]
    filled = round(BAR * min(used, 1))
    colour = "red" if used >= HOT else "green"
    return Text.assemble(("█" * filled, colour), ("░" * (BAR - filled), "dim"), f" {100 * used:3.0f} %")


def _name(url: str) -> str:
    """Return the name of an engine behind a proxy, or the address of one that stands alone."""
    return name_at(url).removeprefix("http://")


def render(engines: Sequence[Watched]) -> Group:
    """Return all engines as a table of at most 80 columns, and what placement decided as another one."""
    shown = _table(
        ["engine", "KV used"],
        ["run", "wait", "local", "offl.", "map.", "tok/s", "TTFT", "TPOT", "exposed"],
    )
    for each in engines:
        if each.trouble or not each.state:
            continue
        state, rates = each.state, each.rates
        exposed = rates["exposed_share"]
        shown.add_row(
            _name(each.url),
            _kv(state),
            *(_figure(state[name]) for name in ("running", "waiting")),
            *(_figure(state.get(name)) for name in ("local_rows", "offloaded_rows", "mapped_rows")),
            _figure(rates["output_tok_s"]),
            _figure(rates["ttft_ms"]),
            _figure(rates["tpot_ms"], 1),
            "-" if exposed is None else f"{100 * exposed:.0f} %",
        )
    return Group(shown, *_troubles(engines), "", _decisions(engines))


def _troubles(engines: Sequence[Watched]) -> list[Text]:
    found = [Text(each.trouble, "red") for each in engines if each.trouble]
    for each in engines:
        if gone := each.state.get("unavailable_executors"):
            text = f"{_name(each.url)}: {gone:.0f} executor(s) failed and are not used at present"
            found.append(Text(text, "red"))
    return found


def _decisions(engines: Sequence[Watched]) -> Table:
    table = _table(["placement", "reason"], ["now", "so far"])
    totals: dict[tuple[str, str], list[int]] = {}
    for engine in engines:
        for each in engine.state.get("placements", ()):
            key = each["placement"], each["reason"]
            total = totals.setdefault(key, [0, 0])
            total[0] += engine.decided.get(key, 0)
            total[1] += each["count"]
    for (placement, reason), (now, so_far) in sorted(totals.items(), key=lambda each: -each[1][1])[:MOST_REASONS]:
        table.add_row(placement, reason, str(now) if now else "", str(so_far))
    return table


def run(options: argparse.Namespace) -> int:
    """Show the engines until a signal ends the command; once, and return 0, where the output is no terminal.

    Raises AdrenalineError if none of them answers at first.
    """
    if not options.every > 0:
        raise AdrenalineError("--every must be more than 0 seconds")
    engines = [Watched(engine) for url in options.engines for engine in engines_at(url)]
    for each in engines:
        each.look()
    if all(each.trouble for each in engines):
        raise AdrenalineError(engines[0].trouble)
    console = Console()
    if not console.is_terminal:
        console.print(render(engines))
        return 0
    with Live(render(engines), console=console, screen=True, auto_refresh=False) as live:
        while True:
            time.sleep(options.every)
            for each in engines:
                each.look()
            live.update(render(engines), refresh=True)
