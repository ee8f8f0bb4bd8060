"""A data plane that delays, doubles, reorders and loses messages: tokens are equal, or the request falls back to equal
tokens. Never a wrong one."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.engine.conftest import Fleet, fleet, kv_bytes, workload

LOSE = 2


@pytest.fixture(scope="module")
def faults(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("faults") / "done.json"


@pytest.fixture(scope="module")
def engines(
    model: Path,
    short_tmp: Path,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch_module: pytest.MonkeyPatch,
    faults: Path,
) -> Iterator[Fleet]:
    monkeypatch_module.setenv("PYTHONPATH", str(Path(__file__).parent / "faults"))
    monkeypatch_module.setenv("ADRENALINE_FAULTS", str(faults))
    monkeypatch_module.setenv("ADRENALINE_FAULTS_LOSE", str(LOSE))
    common = ["--dtype", "float32", "--max-model-len", "1024", "--kv-cache-memory-bytes", kv_bytes(200)]
    wanted = {
        "plain": ("plain", []),
        "prefill": ("prefill", []),
        "half": ("decode", ["--adrenaline-offload-ratio", "0.5", "--adrenaline-executor-timeout", "1"]),
    }
    with fleet(short_tmp, tmp_path_factory.mktemp("logs"), model, common, wanted) as started:
        yield started


def test_messages_late_twice_reordered_or_lost_change_no_token(engines: Fleet, faults: Path) -> None:
    work = workload(24, seed=51, prompts=[1, 100, 128, 300, 500], outputs=[20, 100, 200])
    wanted = [answer.tokens for answer in engines["plain"].complete(work)]
    decode = engines["half"]
    deadline = time.monotonic() + 120
    done: Counter[str] = Counter()
    while done["lost"] < LOSE and time.monotonic() < deadline:  # after a loss, until the executor is back, all is local
        assert [answer.tokens for answer in engines.door("half").complete(work)] == wanted
        done = Counter(json.loads(faults.read_text()))
    assert done["lost"] == LOSE
    assert min(done[kind] for kind in ("late", "twice", "reordered", "stale")) > 5
    assert decode.counter("remote_attention_rows") > 0
    assert decode.counter("executor_failures") >= LOSE
    assert decode.counter("fallback_requests") > 0
