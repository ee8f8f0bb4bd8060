"""What watches over a cluster, on real engines: dashboard, page, top, doctor and collect-env."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.engine.conftest import Client, Work
from tests.unit.test_monitoring import asked
from vllm_adrenaline import cli
from vllm_adrenaline.launch.cluster import Cluster
from vllm_adrenaline.launch.engine_metrics import get_page


def scraped(url: str) -> set[str]:
    """Return the names of all metrics at an address."""
    families = text_string_to_metric_families(get_page(url, "/metrics").decode())
    return {sample.name for family in families for sample in family.samples}


@pytest.mark.extended
def test_what_watches_over_a_cluster_finds_what_it_looks_for(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = ["--enforce-eager", "--num-gpu-blocks-override", "60"]
    with Cluster(model, offload_ratio=1, args=args, logs=tmp_path) as cluster:
        client = Client(cluster.url)
        client.model = str(model)
        assert len(client.complete([Work(list(range(5, 105)), 20)])[0].tokens) == 20

        there = scraped(cluster.url) | scraped(cluster.prefill_url) | scraped(cluster.decode_url)
        labelled = {"adrenaline_proxy_refused_total", "adrenaline_proxy_engine_failures_total"}  # there when they count
        assert asked() - there - labelled == set()

        told = json.loads(get_page(cluster.url, "/adrenaline/state"))
        engines = {each["name"]: each for each in told["engines"]}
        assert engines["decode-0"]["state"]["kv_blocks"] == engines["prefill-0"]["state"]["kv_blocks"] == 60
        assert engines["prefill-0"]["state"]["executor_share"] > 0
        placements = engines["decode-0"]["state"]["placements"]
        assert sum(each["count"] for each in placements if each["placement"] == "offloaded") == 1

        assert cli.main(["doctor", cluster.url]) == 0, capsys.readouterr().out
        assert cli.main(["top", cluster.url]) == 0
        assert cli.main(["collect-env", cluster.url]) == 0
        shown = capsys.readouterr().out
    assert "decode-0" in shown
    assert "prefill-0: running 0" in shown
    assert cluster.url.removeprefix("http://") not in shown
