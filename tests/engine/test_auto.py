"""Load-aware placement and migration on real engines: the tokens stay those of plain vLLM, whatever is decided."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.engine.conftest import Fleet, fleet, kv_bytes, workload
from vllm_adrenaline.launch.status import of_engine

COMMON = ["--dtype", "float32", "--max-model-len", "1024"]
LOCAL_BLOCKS, PREFILL_BLOCKS = 17, 21
# Believed costs, not real ones: local attention is said to be dear, so that offloading shortens every step.
DEAR = {"key": {}, "costs": {"step": [[1, 0.001]], "local": 1e-3, "remote": [1e-9], "exchange": 0.0}}


@pytest.fixture(scope="module")
def engines(model: Path, short_tmp: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    profile = tmp_path_factory.mktemp("profile") / "dear.json"
    profile.write_text(json.dumps(DEAR))
    wanted = {
        "plain": ("plain", ["--kv-cache-memory-bytes", kv_bytes(100)]),
        # Prompts take several steps, seeded ones as well.
        "prefill": (
            "prefill",
            ["--kv-cache-memory-bytes", kv_bytes(PREFILL_BLOCKS), "--max-num-batched-tokens", "128"],
        ),
        "auto": ("decode", ["--kv-cache-memory-bytes", kv_bytes(LOCAL_BLOCKS)]),
        "dear": ("decode", ["--kv-cache-memory-bytes", kv_bytes(100), "--adrenaline-profile", str(profile)]),
    }
    with fleet(short_tmp, tmp_path_factory.mktemp("logs"), model, COMMON, wanted) as started:
        yield started


def decisions(engines: Fleet, name: str) -> dict[tuple[str, str], int]:
    status = of_engine("", engines[name].snapshot())
    return {(p["placement"], p["reason"]): p["count"] for p in status["placements"]}


def test_light_load_stays_local(engines: Fleet) -> None:
    work = workload(3, seed=51, prompts=[200], outputs=[30])
    wanted = [answer.tokens for answer in engines["plain"].complete(work)]
    for item, tokens in zip(work, wanted, strict=True):
        assert [answer.tokens for answer in engines.door("auto").complete([item])] == [tokens]
    assert decisions(engines, "auto") == {("local", "fits"): 3}


def test_what_local_memory_does_not_hold_is_offloaded_and_nothing_is_preempted(engines: Fleet) -> None:
    work = workload(8, seed=52, prompts=[400], outputs=[100])  # 4 blocks each at their end; 16 are there
    wanted = [answer.tokens for answer in engines["plain"].complete(work)]
    assert [answer.tokens for answer in engines.door("auto").complete(work)] == wanted
    decode = engines["auto"]
    made = decisions(engines, "auto")
    assert decode.metrics()["vllm:num_preemptions_total"] == 0, made
    assert made["offloaded", "local_full"] > 0
    assert sum(count for (kind, _), count in made.items() if kind != "wait") == 3 + len(work)
    assert engines["prefill"].settle() == decode.settle() == 0


def test_memory_the_prefill_engine_asks_back_is_given_back_by_moving_requests(engines: Fleet) -> None:
    work = workload(8, seed=53, prompts=[250], outputs=[600])  # 7 blocks each at their end; 20 are there
    sampling = {"temperature": 0.8, "seed": 5}
    wanted = [answer.tokens for answer in engines["plain"].complete(work, **sampling)]
    # Of its own the prefill engine has requests of 8 blocks each that last: one of them waits as long as others hold 5.
    decode, own = engines["dear"], workload(3, seed=54, prompts=[900], outputs=[100])
    with ThreadPoolExecutor() as pool:
        answers = pool.submit(engines.door("dear").complete, work, **sampling)
        while not answers.done() and not decode.counter("moved_requests"):
            engines["prefill"].complete(own)
        assert [answer.tokens for answer in answers.result()] == wanted
    assert decode.counter("moved_requests") > 0, "nothing moved: the test says nothing"
    moved = {reason for (kind, reason), count in decisions(engines, "dear").items() if kind == "moved" and count}
    assert moved <= {"recalled", "starved", "executor_slow"}
    assert decode.counter("offloaded_requests") >= decode.counter("moved_requests")
    assert engines["prefill"].settle() == decode.settle() == 0
