"""What every benchmark script has in common: --quick, --json FILE, and one JSON object as the last line it prints."""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vllm_adrenaline.system import machine


def parser(description: str, quick: str = "under a minute, with fewer repeats") -> argparse.ArgumentParser:
    """Return a parser with the common options; `quick` says what --quick does."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    made.add_argument("--quick", action="store_true", help=quick)
    made.add_argument("--json", type=Path, metavar="FILE", help="write the result there too")
    return made


def median(values: Sequence[float]) -> float:
    """Return the median."""
    return statistics.median(values)


def table(result: dict[str, float]) -> dict[str, float]:
    """Print the figures, one a line; return them rounded."""
    for name, value in result.items():
        print(f"{name:32}{value:10.3f}")
    return {name: round(value, 4) for name, value in result.items()}


def curve(title: str, points: dict[float, float], line: float, line_name: str) -> str:
    """Return an SVG picture: a curve over x from 0 to 1, and a level line beside it."""
    width, height, left, bottom = 560, 300, 60, 40
    most = 1.1 * max([*points.values(), line])

    def at(x: float, y: float) -> str:
        return f"{left + x * (width - left - 20):.1f},{height - bottom - y / most * (height - bottom - 40):.1f}"

    level = at(0, line).split(",")[1]
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" font-family="sans-serif">']
    parts.append(f'<rect width="{width}" height="{height}" fill="white"/><text x="{left}" y="20">{title}</text>')
    parts.append(
        f'<line x1="{left}" x2="{width - 20}" y1="{level}" y2="{level}" stroke="#1a73e8" stroke-dasharray="6"/>'
    )
    parts.append(f'<text x="{left + 6}" y="{float(level) - 6:.1f}" fill="#1a73e8" font-size="12">{line_name}</text>')
    path = " ".join(at(x, y) for x, y in sorted(points.items()))
    parts.append(f'<polyline points="{path}" fill="none" stroke="#202124" stroke-width="2"/>')
    for x, y in sorted(points.items()):
        px, py = at(x, y).split(",")
        parts.append(
            f'<circle cx="{px}" cy="{py}" r="4"/><text x="{px}" y="{float(py) + 20:.1f}" font-size="12" '
            f'text-anchor="middle">{y:.0f}</text>'
        )
        parts.append(f'<text x="{px}" y="{height - 20}" font-size="12" text-anchor="middle">{x:g}</text>')
    parts.append(
        f'<text x="{width / 2}" y="{height - 4}" font-size="12" text-anchor="middle">offload ratio</text></svg>'
    )
    return "\n".join(parts) + "\n"


def finish(result: dict[str, Any], file: Path | None) -> None:
    """Print the result as the last line, and write it to `file`."""
    text = json.dumps({**result, "machine": machine.description()})
    if file is not None:
        file.write_text(text + "\n")
    print(text, flush=True)
