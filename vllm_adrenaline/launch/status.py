"""`adrenaline status`: what engines do now, and all placement decisions so far by kind and reason."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from vllm_adrenaline.launch.engine_metrics import EngineMetrics, get_page
from vllm_adrenaline.proxy.snapshot import Snapshot


def of_engine(url: str, metrics: Snapshot) -> dict[str, Any]:
    """Return the status of one engine as plain data."""
    return {"url": url} | metrics.state()


def table(status: dict[str, Any]) -> str:
    """Return the status of one engine as text for people."""
    lines = [
        f"{status['url']}: {status['running']:.0f} running, {status['waiting']:.0f} waiting, "
        f"{100 * status['kv_used']:.0f} % of its KV blocks used"
    ]
    if "local_rows" in status:
        bound = f"{status['bound']:.2f}" if status["bound"] else "none"
        lines += [
            f"  batch       {status['local_rows']:.0f} local, {status['offloaded_rows']:.0f} offloaded (bound {bound})",
            f"  attention   {status['local_us_per_token']:.2f} us a token here, "
            f"{status['remote_us_per_token']:.2f} us in the slowest executor; "
            f"{status['exposed_wait_s']:.1f} s waited for executors so far",
            f"  moved       {status['moved']:.0f} offloaded requests pulled, {status['recomputed']:.0f} recomputed",
            f"  executors   {status['executor_failures']:.0f} failures so far, "
            f"{status['unavailable_executors']:.0f} not used at present",
        ]
    for each in status["placements"]:
        lines.append(f"  {each['placement']:10}  {each['reason']:16} {each['count']:8}")
    return "\n".join(lines)


def engines_at(url: str) -> list[str]:
    """Return where the metrics of engines are: of those behind a proxy, or of the one at this address itself."""
    url = url.rstrip("/")
    try:
        return [f"{url}/engines/{each['name']}" for each in json.loads(get_page(url, "/engines"))]
    except (OSError, ValueError):  # no proxy; if there is no engine either, its own metrics will say it in words
        return [url]


def name_at(url: str) -> str:
    """Return the name of an engine behind a proxy, of `engines_at`; of one that stands alone, its address."""
    return url.rpartition("/engines/")[2]


def run(urls: Sequence[str], as_json: bool) -> int:
    """Print the status of the engines at or behind `urls` and return 0.

    Raises AdrenalineError for one that does not answer.
    """
    engines = [engine for url in urls for engine in engines_at(url)]
    found = [of_engine(url, EngineMetrics(url).read()) for url in engines]
    print(json.dumps(found) if as_json else "\n".join(table(status) for status in found))
    return 0
