"""Two decode engines on one prefill engine: what happens to one is not noticed by the other."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.engine.conftest import Fleet, executors_of, fleet, kv_bytes, workload

LEASE_S = 6


@pytest.fixture(scope="module")
def engines(model: Path, short_tmp: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    common = ["--dtype", "float32", "--max-model-len", "1024", "--kv-cache-memory-bytes", kv_bytes(100)]
    remote = ["--adrenaline-offload-ratio", "1"]
    wanted = {
        "plain": ("plain", []),
        "prefill": ("prefill", ["--adrenaline-lease-seconds", str(LEASE_S)]),
        "one": ("decode", remote),
        "other": ("decode", remote),
    }
    with fleet(short_tmp, tmp_path_factory.mktemp("logs"), model, common, wanted) as started:
        yield started


def test_a_decode_engine_that_is_killed_costs_the_other_nothing(engines: Fleet) -> None:
    work = workload(4, seed=61, prompts=[100, 300], outputs=[300])
    wanted = [answer.tokens for answer in engines["plain"].complete(work)]
    other, executors = engines["other"], executors_of(engines["prefill"].pid)
    with ThreadPoolExecutor() as pool:
        lost = pool.submit(engines.door("one").complete, work)
        while not engines["one"].counter("remote_attention_rows"):
            time.sleep(0.1)
        os.killpg(engines["one"].pid, signal.SIGKILL)
        killed = time.monotonic()
        while time.monotonic() - killed < LEASE_S + 3:
            assert [answer.tokens for answer in engines.door("other").complete(work)] == wanted
        assert lost.exception() is not None
    assert other.counter("executor_failures") == 0
    assert other.counter("fallback_requests") == 0
    assert other.counter("remote_attention_rows") > 0
    assert executors_of(engines["prefill"].pid) == executors
    assert engines["prefill"].settle() == 0, "what the killed one had is free"
