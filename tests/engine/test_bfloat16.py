"""In bfloat16 the last bit depends on the batch, so: one request at a time, all local against all offloaded."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.engine.conftest import Fleet, Wanted, fleet, tokens, workload


@pytest.fixture(scope="module")
def engines(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    wanted = {"prefill": Wanted("prefill", 200), "decode": Wanted("decode", 200, ratio=0)}
    with fleet(tmp_path_factory.mktemp("logs"), model, ["--dtype", "bfloat16"], wanted) as started:
        yield started


def test_local_and_offloaded_requests_have_the_same_tokens(engines: Fleet) -> None:
    # 128 and 256: the last token of the prompt lies in a full block, which is shared and must not be written again.
    work = workload(10, seed=21, prompts=[1, 50, 128, 255, 256, 400], outputs=[60, 120])
    count = engines["decode"].counting()
    local = [tokens(engines.door("decode", 0).complete([item])) for item in work]
    assert count["offloaded_requests"] == 0
    remote = [tokens(engines.door("decode", 1).complete([item])) for item in work]
    assert remote == local
    assert count["offloaded_requests"] == len(work)
    assert len({token for (answer,) in local for token in answer}) > 20, "a collapsed model would make this test easy"
