"""Statements about work that moves between a prefill and a decode engine, on real engines in float32."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.engine.conftest import Counting, Fleet, Plain, Wanted, eventually, fleet, run, tokens, workload
from tests.engine.test_offload import abort_at_random

pytestmark = pytest.mark.extended  # tests/schedulers has as much of it as is decided there

PROMPTS, OUTPUTS = (600, 130, 400, 300), (60, 5, 30, 90)
WORK = workload(40, seed=61, prompts=PROMPTS, outputs=OUTPUTS)
SLOW = {"key": {}, "costs": {"step": [[1, 0.05], [4096, 0.06]], "local": 1e-6, "remote": [1e-6]}}
"""What the decode engine believes to begin with: its steps take long, while prompts are cheap. So requests stay."""


@pytest.fixture(scope="module")
def engines(plain: Plain, model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    folder = tmp_path_factory.mktemp("elastic")
    (folder / "slow.json").write_text(json.dumps(SLOW))
    elastic = ["--adrenaline-elastic", "both"]
    wanted = {
        "prefill": Wanted("prefill", 100, [*elastic, "--max-num-batched-tokens", "192"], ends_early=True),
        "decode": Wanted("decode", 50, [*elastic, "--adrenaline-profile", f"{folder}/slow.json"]),
    }
    common = ["--dtype", "float32", "--max-num-seqs", "64"]
    with fleet(folder, model, common, wanted) as started:
        yield started


def moved(count: Counting) -> dict[str, float]:
    """Return how many requests of a prefill engine were moved, by outcome."""
    found: dict[str, float] = {}
    for (outcome, _), number in count.placements().items():
        found[outcome] = found.get(outcome, 0) + number
    return found


def test_wherever_prompts_and_decodes_go_the_tokens_are_those_of_plain_vllm(engines: Fleet, plain: Plain) -> None:
    prefill, decode = engines["prefill"].counting(), engines["decode"].counting()
    assert tokens(engines.doors["decode"].complete(WORK)) == plain.tokens(WORK)
    found = moved(prefill)
    assert found["handed_over"] > 0
    assert found["stays"] > 0
    assert decode["vllm:request_success_total"] == len(WORK) - found["stays"]
    assert decode["refused_params"] == decode["fallback_requests"] == 0


def test_seeded_sampling_is_the_same_wherever_a_request_is(engines: Fleet, plain: Plain) -> None:
    drawn = {"temperature": 1.0, "seed": 7}
    assert tokens(engines.doors["decode"].complete(WORK, **drawn)) == plain.tokens(WORK, **drawn)


def test_what_a_prompt_that_ended_early_has_is_used_and_the_rest_computed(engines: Fleet, plain: Plain) -> None:
    decode, alone = engines["decode"].counting(), workload(6, seed=62, prompts=[900, 600, 401], outputs=[20])
    for work in alone:
        assert tokens(engines.doors["decode"].complete([work])) == plain.tokens([work])
    assert decode.placements().get(("local", "unfinished_prompt"), 0) > 0
    assert decode["vllm:nixl_bytes_transferred_sum"] > 0


def test_requests_that_are_aborted_anywhere_leave_nothing(engines: Fleet) -> None:
    prefill = engines["prefill"].counting()
    run(abort_at_random(engines.doors["decode"].url, WORK * 2, seed=3))
    assert sum(moved(prefill).values()) > 0
    for name in ("prefill", "decode"):
        assert eventually(lambda name=name: engines[name].settle() == 0)  # type: ignore[misc]
