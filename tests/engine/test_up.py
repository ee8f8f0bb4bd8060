"""`adrenaline up MODEL` with no other option: it starts here, and nobody beyond this machine reaches what it opens."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.engine.conftest import Client, Work, listening_beyond_loopback
from vllm_adrenaline.launch.cluster import Cluster
from vllm_adrenaline.launch.process import group_members


@pytest.mark.extended
def test_a_cluster_starts_with_its_defaults_and_listens_on_loopback_only(model: Path, tmp_path: Path) -> None:
    with Cluster(model, logs=tmp_path) as cluster:
        processes = [pid for engine in cluster.processes.values() for pid in group_members(engine.pid)]
        assert len(processes) >= 6
        assert listening_beyond_loopback(processes) == []
        client = Client(cluster.url)
        client.model = str(model)
        assert len(client.complete([Work(list(range(5, 205)), 20)])[0].tokens) == 20
