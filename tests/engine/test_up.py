"""`adrenaline up MODEL` with its defaults: it starts here, and nobody beyond this machine reaches what it opens."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.engine.conftest import Client, Engine, Work, listening_beyond_loopback
from vllm_adrenaline.launch.cluster import Cluster
from vllm_adrenaline.launch.process import group_members

WORK = [Work(list(range(5, 205)), 20)]


@pytest.mark.extended
@pytest.mark.parametrize("one_device", [False, True])
def test_a_cluster_starts_with_its_defaults_and_listens_on_loopback_only(
    model: Path, tmp_path: Path, one_device: bool
) -> None:
    with Cluster(model, one_device=one_device, logs=tmp_path) as cluster:
        processes = [pid for engine in cluster.processes.values() for pid in group_members(engine.pid)]
        assert len(processes) >= 6 - one_device, "with executors there is one more"
        assert listening_beyond_loopback(processes) == []
        client = Client(cluster.url)
        client.model = str(model)
        assert len(client.complete(WORK)[0].tokens) == 20
        decode = Engine(cluster.decode_url, cluster.processes["decode"].pid)
        assert decode.snapshot().value("vllm:adrenaline_mapped_requests_total") == one_device
