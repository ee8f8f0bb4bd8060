"""Tensor parallel 2: two one-thread ranks per engine, an attention executor for each rank of the prefill engine.

Each rank of the decode engine also maps the memory of the same rank of the prefill engine.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.engine.conftest import (
    Fleet,
    Plain,
    Wanted,
    executors_of,
    fleet,
    kill_when,
    listening_beyond_loopback,
    tokens,
    workload,
)
from vllm_adrenaline.launch.process import group_members

pytestmark = pytest.mark.extended
"""Two engines of two ranks take a minute to start. What ranks must agree on is in tests/unit/test_ranks.py, too."""


@pytest.fixture(scope="module")
def engines(model: Path, plain: Plain, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    both = ["--adrenaline-pool", "both"]
    wanted = {"prefill": Wanted("prefill", 100, both), "decode": Wanted("decode", 100, both, ratio=1)}
    common = ["--dtype", "float32", "--tensor-parallel-size", "2"]
    with fleet(tmp_path_factory.mktemp("logs"), model, common, wanted, cores="0|1") as started:
        yield started


def test_two_ranks_give_the_tokens_of_plain_vllm(engines: Fleet, plain: Plain) -> None:
    count = engines["decode"].counting()
    work = workload(8, seed=31, prompts=[1, 100, 128, 300], outputs=[20, 60])
    assert tokens(engines.door("decode", 0.5).complete(work)) == plain.tokens(work)
    assert count["offloaded_requests"] == count["mapped_requests"] == 2
    assert min(count["remote_attention_rows"], count["mapped_attention_rows"]) > 0
    assert count["fallback_requests"] == 0


def test_an_executor_of_one_rank_that_dies_leaves_all_ranks_with_the_same_random_numbers(
    engines: Fleet, plain: Plain
) -> None:
    work = workload(4, seed=32, prompts=[100, 200], outputs=[200])
    sampling = {"temperature": 0.8, "seed": 3}
    wanted = plain.tokens(work, **sampling)
    count = engines["decode"].counting()
    last = executors_of(engines["prefill"].pid)[-1]
    with kill_when(last, lambda: count["remote_attention_rows"] > 40) as killed:
        assert tokens(engines.door("decode", 1).complete(work, **sampling)) == wanted
    assert killed
    assert count["executor_failures"] > 0


def test_nothing_that_ranks_open_can_be_reached_from_other_machines(engines: Fleet) -> None:
    ours = [pid for name in ("prefill", "decode") for pid in group_members(engines[name].pid)]
    assert listening_beyond_loopback(ours) == []
