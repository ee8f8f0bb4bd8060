"""examples/monitoring: what the dashboard and the alerts ask for is what engines and proxy have."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from vllm_adrenaline.engine.metrics import COUNTERS, GAUGES, GPU_GAUGES
from vllm_adrenaline.proxy.counts import Counts

FOLDER = Path(__file__).parents[2] / "examples" / "monitoring"
METRIC = re.compile(r"\b(?:vllm:|adrenaline_proxy_)\w+")
GROUPED = re.compile(r"by \(([^)]*)\)|{{\s*(?:\$labels\.)?(\w+)\s*}}|{(\w+)=")
LABELS = {"instance", "role", "le", "placement", "reason", "kind", "what", "gpu"}
"""Labels that metrics or the Prometheus configuration give."""


def expressions() -> list[str]:
    """Return every expression of the dashboard and the alerts."""
    panels = json.loads((FOLDER / "dashboard.json").read_text())["panels"]
    rules = yaml.safe_load((FOLDER / "alerts.yml").read_text())["groups"][0]["rules"]
    return [target["expr"] for panel in panels for target in panel["targets"]] + [rule["expr"] for rule in rules]


def asked() -> set[str]:
    """Return every metric that is asked for."""
    return {name for text in expressions() for name in METRIC.findall(text)}


def ours() -> set[str]:
    proxy = re.findall(r"^# TYPE (\w+) ", Counts().text().decode(), re.MULTILINE)
    return (
        {f"vllm:adrenaline_{name}_total" for name in (*COUNTERS, "placements")}
        | {f"vllm:adrenaline_{name}" for name in (*GAUGES, *GPU_GAUGES)}
        | set(proxy)
    )


def of_vllm() -> set[str]:
    """Return the metrics of the installed vLLM, under all names that they may have in a scrape."""
    found = importlib.util.find_spec("vllm")
    assert found is not None
    assert found.submodule_search_locations is not None
    source = (Path(found.submodule_search_locations[0]) / "v1" / "metrics" / "loggers.py").read_text()
    names = re.findall(r'name="(vllm:\w+)"', source)
    return {f"{name}{suffix}" for name in names for suffix in ("", "_total", "_bucket", "_sum", "_count")}


def test_every_metric_that_is_asked_for_exists() -> None:
    assert len(asked()) > 30
    assert asked() - ours() - of_vllm() == set()


def test_every_metric_of_the_plugin_that_can_be_drawn_is_drawn_or_left_out_on_purpose() -> None:
    drawn = {name for name in asked() if name.startswith("vllm:adrenaline_")}
    left_out = {
        *("offloaded_requests_total", "mapped_requests_total", "local_requests_total"),  # placements has them by reason
        *("remote_attention_rows_total", "mapped_attention_rows_total", "remote_attention_tokens_total"),
        *("unsigned_params_total", "step_seconds_without_attention"),
        "lendable_blocks",  # the same blocks for each decode engine: added up they would be too many
    }
    assert {name for name in ours() if name.startswith("vllm:adrenaline_")} - drawn == {
        f"vllm:adrenaline_{name}" for name in left_out
    }


def test_labels_are_those_that_there_are() -> None:
    texts = [*expressions(), (FOLDER / "dashboard.json").read_text(), (FOLDER / "alerts.yml").read_text()]
    used = {
        name.strip() for text in texts for found in GROUPED.findall(text) for part in found for name in part.split(",")
    }
    assert used - {""} - LABELS == set()


def test_panels_do_not_lie_on_each_other_and_have_their_own_numbers() -> None:
    panels = json.loads((FOLDER / "dashboard.json").read_text())["panels"]
    cells = [
        (x, y)
        for place in (panel["gridPos"] for panel in panels)
        for x in range(place["x"], place["x"] + place["w"])
        for y in range(place["y"], place["y"] + place["h"])
    ]
    assert len(set(cells)) == len(cells)
    assert max(x for x, _ in cells) < 24
    assert len({panel["id"] for panel in panels}) == len(panels)


def test_each_engine_is_a_target_with_its_name_and_role() -> None:
    jobs = {job["job_name"]: job for job in yaml.safe_load((FOLDER / "prometheus.yml").read_text())["scrape_configs"]}
    assert jobs["adrenaline-engines"]["static_configs"] == [{"targets": ["prefill-0", "decode-0"]}]
    given = {rule["target_label"] for rule in jobs["adrenaline-engines"]["relabel_configs"]}
    assert given == {"instance", "role", "__metrics_path__", "__address__"}


@pytest.mark.skipif(not shutil.which("promtool"), reason="there is no promtool (apt-get install prometheus)")
def test_prometheus_takes_configuration_alerts_and_every_expression(tmp_path: Path) -> None:
    texts = [text.replace("$__rate_interval", "1m") for text in expressions()]
    recorded = [{"record": f"x{number}", "expr": text} for number, text in enumerate(texts)]
    (tmp_path / "all.yml").write_text(yaml.safe_dump({"groups": [{"name": "all", "rules": recorded}]}))
    for what in (
        ["config", FOLDER / "prometheus.yml"],
        ["rules", FOLDER / "alerts.yml"],
        ["rules", tmp_path / "all.yml"],
    ):
        done = subprocess.run(["promtool", "check", *what], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
