"""In bfloat16 the last bit depends on the batch, so: one request at a time, all local against all offloaded."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.engine.conftest import Fleet, fleet, kv_bytes, workload


@pytest.fixture(scope="module")
def engines(model: Path, short_tmp: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    common = ["--dtype", "bfloat16", "--max-model-len", "1024", "--kv-cache-memory-bytes", kv_bytes(100)]
    wanted = {
        "prefill": ("prefill", []),
        "local": ("decode", ["--adrenaline-offload-ratio", "0"]),
        "remote": ("decode", ["--adrenaline-offload-ratio", "1"]),
    }
    with fleet(short_tmp, tmp_path_factory.mktemp("logs"), model, common, wanted) as started:
        yield started


def test_local_and_offloaded_requests_have_the_same_tokens(engines: Fleet) -> None:
    # 128 and 256: the last token of the prompt lies in a full block, which is shared and must not be written again.
    work = workload(10, seed=21, prompts=[1, 50, 128, 255, 256, 400], outputs=[60, 120])
    local = [engines.door("local").complete([item])[0].tokens for item in work]
    remote = [engines.door("remote").complete([item])[0].tokens for item in work]
    assert remote == local
    assert engines["remote"].counter("offloaded_requests") == len(work)
    assert len({token for tokens in local for token in tokens}) > 20, "a collapsed model would make this test easy"
