"""Tensor parallel 2: two one-thread ranks per engine, an attention executor for each rank of the prefill engine."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.engine.conftest import Fleet, executors_of, fleet, kill_when, kv_bytes, listening_beyond_loopback, workload
from vllm_adrenaline.launch.process import group_members


@pytest.fixture(scope="module")
def engines(
    model: Path, short_tmp: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch_module: pytest.MonkeyPatch
) -> Iterator[Fleet]:
    monkeypatch_module.setenv("ADRENALINE_TEST_CORES", "0|1")
    common = ["--dtype", "float32", "--max-model-len", "1024", "--kv-cache-memory-bytes", kv_bytes(100)]
    two = ["--tensor-parallel-size", "2"]
    wanted = {
        "plain": ("plain", []),
        "prefill": ("prefill", two),
        "half": ("decode", [*two, "--adrenaline-offload-ratio", "0.5"]),
        "remote": ("decode", [*two, "--adrenaline-offload-ratio", "1"]),
    }
    with fleet(short_tmp, tmp_path_factory.mktemp("logs"), model, common, wanted) as started:
        yield started


def test_two_ranks_give_the_tokens_of_plain_vllm(engines: Fleet) -> None:
    work = workload(8, seed=31, prompts=[1, 100, 128, 300], outputs=[20, 60])
    wanted = [answer.tokens for answer in engines["plain"].complete(work)]
    assert [answer.tokens for answer in engines.door("half").complete(work)] == wanted
    assert engines["half"].counter("offloaded_requests") == 4
    assert engines["half"].counter("remote_attention_rows") > 0
    assert engines["half"].counter("fallback_requests") == 0


def test_an_executor_of_one_rank_that_dies_leaves_all_ranks_with_the_same_random_numbers(engines: Fleet) -> None:
    work = workload(4, seed=32, prompts=[100, 200], outputs=[200])
    sampling = {"temperature": 0.8, "seed": 3}
    wanted = [answer.tokens for answer in engines["plain"].complete(work, **sampling)]
    decode = engines["remote"]
    rows = decode.counter("remote_attention_rows")
    last = executors_of(engines["prefill"].pid)[-1]
    with kill_when(last, lambda: decode.counter("remote_attention_rows") > rows + 40) as killed:
        assert [answer.tokens for answer in engines.door("remote").complete(work, **sampling)] == wanted
    assert killed
    assert decode.counter("executor_failures") > 0


def test_nothing_that_ranks_open_can_be_reached_from_other_machines(engines: Fleet) -> None:
    ours = [pid for name in ("prefill", "remote") for pid in group_members(engines[name].pid)]
    assert listening_beyond_loopback(ours) == []
