"""What every benchmark script has in common: --quick, --json FILE, and one JSON object as the last line it prints."""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def parser(description: str, quick: str = "under a minute, with fewer repeats") -> argparse.ArgumentParser:
    """Return a parser with the common options; `quick` says what --quick does."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    made.add_argument("--quick", action="store_true", help=quick)
    made.add_argument("--json", type=Path, metavar="FILE", help="write the result there too")
    return made


def percentile(values: Sequence[float], share: float) -> float:
    """Return the value below which `share` of all lie."""
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


def median(values: Sequence[float]) -> float:
    """Return the median."""
    return statistics.median(values)


def machine() -> dict[str, Any]:
    """Return what the figures depend on."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")
    return {"cpu": model, "cores_count": os.cpu_count(), "kernel": platform.release()}


def table(result: dict[str, float]) -> dict[str, float]:
    """Print the figures, one a line; return them rounded."""
    for name, value in result.items():
        print(f"{name:32}{value:10.3f}")
    return {name: round(value, 4) for name, value in result.items()}


def finish(result: dict[str, Any], file: Path | None) -> None:
    """Print the result as the last line, and write it to `file`."""
    text = json.dumps({**result, "machine": machine()})
    if file is not None:
        file.write_text(text + "\n")
    print(text, flush=True)
