"""When the prefill engine has no block to give or wants some back, when its executor dies, and when a peer does not
fit."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.engine.conftest import (
    Fleet,
    Plain,
    Server,
    Wanted,
    Work,
    eventually,
    executors_of,
    fleet,
    kill_when,
    kv_bytes,
    listening_beyond_loopback,
    offloads_again,
    tokens,
    workload,
)
from vllm_adrenaline.launch.process import group_members

PREFILL_BLOCKS = 21  # 20 and vLLM's null block
# Believed costs, not real ones: local attention is said to be dear, so that offloading shortens every step. Observation
# corrects them within a thousand steps: the test that needs them comes before the others.
DEAR = {"key": {}, "costs": {"step": [[1, 0.001]], "local": 1e-3, "remote": [1e-9], "exchange": 0.0}}


@pytest.fixture(scope="module")
def engines(model: Path, plain: Plain, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    profile = tmp_path_factory.mktemp("profile") / "dear.json"
    profile.write_text(json.dumps(DEAR))
    wanted = {
        # Prompts take several steps, seeded ones as well.
        "prefill": Wanted("prefill", PREFILL_BLOCKS, ["--max-num-batched-tokens", "128"]),
        "decode": Wanted("decode", 100, ["--adrenaline-profile", str(profile)], ratio="auto"),
    }
    with fleet(tmp_path_factory.mktemp("logs"), model, ["--dtype", "float32"], wanted) as started:
        yield started


def test_nothing_that_an_engine_opens_can_be_reached_from_other_machines(engines: Fleet) -> None:
    ours = [pid for name in ("prefill", "decode") for pid in group_members(engines[name].pid)]
    assert listening_beyond_loopback(ours) == []
    with socket.create_server(("", 0)):
        assert len(listening_beyond_loopback([os.getpid()])) == 1, "so that the line above can fail"


def test_memory_the_prefill_engine_asks_back_is_given_back_by_moving_requests(engines: Fleet, plain: Plain) -> None:
    decode = engines["decode"]
    count = decode.counting()
    work = workload(8, seed=53, prompts=[250], outputs=[600])  # 7 blocks each at their end; 20 are there
    sampling = {"temperature": 0.8, "seed": 5}
    wanted = plain.tokens(work, **sampling)
    # Of its own the prefill engine has three requests of 8 blocks each at any time: one of them always waits.
    own = workload(3, seed=54, prompts=[900], outputs=[100])
    with ThreadPoolExecutor() as pool:
        answers = pool.submit(engines.door("decode", "auto").complete, work, **sampling)

        def again_and_again(item: Work) -> None:
            while not answers.done() and not count["moved_requests"]:
                engines["prefill"].complete([item])

        assert eventually(lambda: count["offloaded_requests"] > 0 or answers.done())
        asking = [pool.submit(again_and_again, item) for item in own]
        assert tokens(answers.result()) == wanted
        assert [each.result() for each in asking] == [None] * len(own)
    assert count["moved_requests"] > 0, "nothing moved: the test says nothing"
    moved = {reason for kind, reason in count.placements() if kind == "moved"}
    assert moved <= {"recalled", "starved", "executor_slow"}
    assert count["offloaded_requests"] >= count["moved_requests"]
    assert engines["prefill"].settle() == decode.settle() == 0


def test_requests_that_cannot_grow_on_the_prefill_engine_finish_with_the_same_tokens(
    engines: Fleet, plain: Plain
) -> None:
    count = engines["decode"].counting()
    work = workload(6, seed=41, prompts=[300], outputs=[300])  # 6 x 5 blocks of 20
    assert tokens(engines.door("decode", 1).complete(work)) == plain.tokens(work)
    assert count["fallback_requests"] + count["moved_requests"] > 0, "nothing ran out: the test says nothing"
    assert engines["prefill"].settle() == 0


def test_a_killed_executor_costs_a_recomputation_and_no_token(engines: Fleet, plain: Plain) -> None:
    (pid,) = executors_of(engines["prefill"].pid)
    work = workload(3, seed=42, prompts=[100], outputs=[300])
    sampling = {"temperature": 0.8, "seed": 3}
    wanted = plain.tokens(work, **sampling)
    count = engines["decode"].counting()
    with kill_when(pid, lambda: count["remote_attention_rows"] > 0) as killed:
        got = tokens(engines.door("decode", 1).complete(work, **sampling))
    assert killed
    assert got == wanted
    assert count["executor_failures"] > 0
    assert offloads_again(engines, "decode")
    assert engines["prefill"].settle() == 0


def test_a_decode_engine_that_does_not_fit_is_refused_with_both_values(
    engines: Fleet, server: Server, model: Path
) -> None:
    flags = ["--plugin", "adrenaline", "--adrenaline-role", "decode", "--adrenaline-peers", engines.address]
    ended = server.run(
        *("--model", str(model), "--dtype", "bfloat16", "--block-size", "64", "--max-model-len", "1024"),
        *("--kv-cache-memory-bytes", kv_bytes(20), *flags),
    )
    assert ended.code != 0
    assert "dtype is float32 on the prefill engine and bfloat16 on the decode engine" in ended.output
    assert "block size is 128 on the prefill engine and 64 on the decode engine" in ended.output
    assert "Traceback" not in ended.output
