"""When the prefill engine has no block to give, when its executor dies, and when a peer does not fit."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.engine.conftest import (
    Fleet,
    executors_of,
    fleet,
    kill_when,
    kv_bytes,
    listening_beyond_loopback,
    serve,
    workload,
)
from vllm_adrenaline.launch.process import group_members

PREFILL_BLOCKS = 17  # 16 and vLLM's null block


@pytest.fixture(scope="module")
def engines(model: Path, short_tmp: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    common = ["--dtype", "float32", "--max-model-len", "1024"]
    wanted = {
        "plain": ("plain", ["--kv-cache-memory-bytes", kv_bytes(100)]),
        "prefill": (
            "prefill",
            ["--kv-cache-memory-bytes", kv_bytes(PREFILL_BLOCKS), "--adrenaline-prefill-reserve", "0"],
        ),
        "remote": ("decode", ["--kv-cache-memory-bytes", kv_bytes(100), "--adrenaline-offload-ratio", "1"]),
    }
    with fleet(short_tmp, tmp_path_factory.mktemp("logs"), model, common, wanted) as started:
        yield started


def test_nothing_that_an_engine_opens_can_be_reached_from_other_machines(engines: Fleet) -> None:
    ours = [pid for name in ("prefill", "remote") for pid in group_members(engines[name].pid)]
    assert listening_beyond_loopback(ours) == []
    with socket.create_server(("", 0)):
        assert len(listening_beyond_loopback([os.getpid()])) == 1, "so that the line above can fail"


def test_requests_that_cannot_grow_on_the_prefill_engine_finish_with_the_same_tokens(engines: Fleet) -> None:
    work = workload(5, seed=41, prompts=[300], outputs=[300])  # 5 x 5 blocks of 16
    wanted = [answer.tokens for answer in engines["plain"].complete(work)]
    assert [answer.tokens for answer in engines.door("remote").complete(work)] == wanted
    decode = engines["remote"]
    gone = decode.counter("fallback_requests") + decode.counter("moved_requests")
    assert gone > 0, "nothing ran out: the test says nothing"
    assert engines["prefill"].settle() == 0


def test_a_killed_executor_costs_a_recomputation_and_no_token(engines: Fleet) -> None:
    decode, (pid,) = engines["remote"], executors_of(engines["prefill"].pid)
    before = decode.counter("executor_failures")
    work = workload(3, seed=42, prompts=[100], outputs=[300])
    wanted = [a.tokens for a in engines["plain"].complete(work, temperature=0.8, seed=3)]
    rows = decode.counter("remote_attention_rows")
    with kill_when(pid, lambda: decode.counter("remote_attention_rows") > rows) as killed:
        got = [a.tokens for a in engines.door("remote").complete(work, temperature=0.8, seed=3)]
    assert killed
    assert got == wanted
    assert decode.counter("executor_failures") > before
    # It comes back, and requests are offloaded again.
    deadline = time.monotonic() + 90
    offloaded = decode.counter("offloaded_requests")
    while decode.counter("offloaded_requests") == offloaded and time.monotonic() < deadline:
        engines.door("remote").complete(workload(1, seed=43, prompts=[40], outputs=[5]))
        time.sleep(1)
    assert decode.counter("offloaded_requests") > offloaded
    assert engines["prefill"].settle() == 0


def test_a_decode_engine_that_does_not_fit_is_refused_with_both_values(
    engines: Fleet, model: Path, short_tmp: Path
) -> None:
    flags = ["--plugin", "adrenaline", "--adrenaline-role", "decode", "--adrenaline-peers", f"ipc://{short_tmp}/p"]
    code, output = serve(
        "--model", str(model), "--dtype", "bfloat16", "--block-size", "64", "--max-model-len", "1024", *flags
    )
    assert code != 0
    assert "dtype is float32 on the prefill engine and bfloat16 on the decode engine" in output
    assert "block size is 128 on the prefill engine and 64 on the decode engine" in output
    assert "Traceback" not in output
