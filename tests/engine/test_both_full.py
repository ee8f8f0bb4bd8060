"""When neither side has room: requests wait, leases are recalled, and everybody is served, in turn."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.engine.conftest import Fleet, Plain, Wanted, Work, eventually, fleet, run, workload
from tests.engine.test_faults import Stream, stream_all
from tests.engine.test_pressure import DEAR

pytestmark = pytest.mark.extended

PREFILL_BLOCKS, DECODE_BLOCKS = 21, 13  # with vLLM's null block
REQUESTS = 32


@pytest.fixture(scope="module")
def engines(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    profile = tmp_path_factory.mktemp("profile") / "dear.json"
    profile.write_text(json.dumps(DEAR))
    wanted = {
        "prefill": Wanted("prefill", PREFILL_BLOCKS, ["--max-num-batched-tokens", "256"]),
        "decode": Wanted("decode", DECODE_BLOCKS, ["--adrenaline-profile", str(profile)], ratio="auto"),
    }
    with fleet(tmp_path_factory.mktemp("logs"), model, ["--dtype", "float32"], wanted) as started:
        yield started


@pytest.mark.parametrize("ratio", ["auto", 1, 0], ids=["placed by load", "all offloaded", "none offloaded"])
def test_when_both_sides_are_full_everybody_is_served_in_turn(engines: Fleet, plain: Plain, ratio: float | str) -> None:
    work = workload(
        REQUESTS, seed=91, prompts=[250], outputs=[300]
    )  # 5 blocks each at the end, 160 in all; there are 32
    wanted = plain.tokens(work)
    # Of its own the prefill engine has two requests of 8 blocks each at any time, for which it recalls what it lent.
    own = workload(2, seed=92, prompts=[900], outputs=[60])
    count, streams = engines["decode"].counting(), [Stream() for _ in work]
    began, served = time.monotonic(), [0, 0]
    with ThreadPoolExecutor() as pool:
        door = engines.door("decode", ratio)  # type: ignore[arg-type]
        answers = pool.submit(lambda: run(stream_all(door, work, streams)))

        def again_and_again(number: int, item: Work) -> None:
            while not answers.done():
                engines["prefill"].complete([item])
                served[number] += 1

        assert eventually(lambda: any(each.tokens for each in streams) or answers.done())
        asking = [pool.submit(again_and_again, number, item) for number, item in enumerate(own)]
        answers.result()
        lasted = time.monotonic() - began
        assert [each.result() for each in asking] == [None] * len(own)
    assert [each.tokens for each in streams] == wanted
    first = sorted(each.times[0] - began for each in streams)
    gap = max(now - then for each in streams for then, now in zip(each.times, each.times[1:], strict=False))
    print(
        f"{lasted:.1f} s in all; first tokens after {first[len(first) // 2]:.1f} s, the last {first[-1]:.1f} s;"
        f" longest gap {gap:.1f} s; served meanwhile {served}; {dict(count.placements())};"
        f" preempted {count['vllm:num_preemptions_total']:.0f}, recomputed {count['fallback_requests']:.0f}"
    )
    assert all(served), "the prefill engine's own requests are not starved either"
    # Who comes last waits until there is room, but not until all others have ended.
    ended = sorted(each.times[-1] - began for each in streams)
    assert first[-1] < ended[-3]
    assert gap < lasted / 2
    assert engines["prefill"].settle() == engines["decode"].settle() == 0
