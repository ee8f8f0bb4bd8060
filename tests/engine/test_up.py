"""`adrenaline up MODEL`: it starts here, nobody beyond this machine or user reaches it, and what ends comes back."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import aiohttp
import pytest

from tests.engine.conftest import Client, Engine, Plain, Work, kv_bytes, listening_beyond_loopback, workload
from vllm_adrenaline.launch.cluster import Cluster
from vllm_adrenaline.launch.process import group_members
from vllm_adrenaline.launch.supervisor import is_ready

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


@contextmanager
def watched(cluster: Cluster) -> Iterator[None]:
    """Watch over the cluster, as the command does."""
    stop = threading.Event()

    def watch() -> None:
        while not stop.wait(0.5):
            cluster.recover()

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


@pytest.mark.extended
def test_each_process_that_is_killed_comes_back_and_the_rest_serves_meanwhile(
    model: Path, tmp_path: Path, plain: Plain
) -> None:
    work = workload(4, 3, (150, 300), (20, 30))
    expected = plain.tokens(work)
    args = ["--dtype", "float32", "--enforce-eager", "--max-model-len", "1024", "--kv-cache-memory-bytes", kv_bytes(64)]
    before = os.umask(0)
    try:
        with Cluster(model, offload_ratio=0.5, args=args, logs=tmp_path) as cluster, watched(cluster):
            client = Client(cluster.url)
            client.model = str(model)

            def tokens() -> list[list[int]] | None:
                """Return the answers, or None if they are a clean error or the proxy itself is away."""
                try:
                    return [answer.tokens for answer in client.complete(work)]
                except AssertionError as error:
                    if "does not answer (request " not in str(error):
                        raise
                except aiohttp.ClientError:
                    assert victim == "proxy"
                return None

            for victim in ("prefill", "decode", "proxy"):
                assert tokens() == expected
                killed = cluster.processes[victim]
                os.kill(killed.pid, signal.SIGKILL)
                began, answered, failed = time.monotonic(), 0, 0
                while cluster.processes[victim] is killed or not is_ready(cluster.url):
                    found = tokens()
                    assert found in (None, expected)
                    answered, failed = answered + (found is not None), failed + (found is None)
                    assert time.monotonic() - began < 240, "it did not come back"
                    time.sleep(0.2)
                assert tokens() == expected
                print(f"{victim}: back after {time.monotonic() - began:.0f} s; {answered} answered, {failed} failed")
                if victim == "prefill":
                    assert answered
                    assert not failed, "the decode engine computes prompts meanwhile"
                if victim == "decode":
                    assert failed, "nobody else can"
    finally:
        os.umask(before)
