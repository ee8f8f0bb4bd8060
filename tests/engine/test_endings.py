"""Engines that are killed and started again, or sleep: nobody has a wrong token, and others do not notice."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import requests

from tests.engine.conftest import (
    Fleet,
    Plain,
    Wanted,
    engine_core_of,
    eventually,
    fleet,
    offloads_again,
    tokens,
    workload,
)
from tests.engine.test_faults import SOON_S, load
from tests.engine.test_routers import vllm_router_before

pytestmark = pytest.mark.extended

LEASE_S = 10.0
START_S = 180.0
"""An engine takes half a minute to start where nothing else runs."""
BLOCKS = 100


@pytest.fixture(scope="module")
def engines(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    wanted = {
        "prefill": Wanted("prefill", BLOCKS, ["--adrenaline-lease-seconds", str(LEASE_S)]),
        "decode": Wanted("decode", BLOCKS, ratio=1),
        "other": Wanted("decode", BLOCKS, ratio=1),
    }
    common = ["--dtype", "float32", "--max-num-seqs", "64"]
    with fleet(tmp_path_factory.mktemp("logs"), model, common, wanted) as started, started.recovering():
        yield started


@pytest.mark.parametrize("victim", ["its core", "all of it"])
def test_requests_of_a_prefill_engine_that_is_killed_go_on_and_the_next_one_serves_at_once(
    engines: Fleet, plain: Plain, victim: str
) -> None:
    work = workload(6, seed=63, prompts=[100, 300], outputs=[100])
    wanted = plain.tokens(work)
    pid = engines["prefill"].pid
    with load(engines, plain) as under:
        under.strike()
        if victim == "its core":
            os.kill(engine_core_of(pid), signal.SIGKILL)
        else:
            os.killpg(pid, signal.SIGKILL)
        noticed = under.seconds_until(lambda: under.count["fallback_requests"] == len(under.offloaded))
    assert offloads_again(engines, "decode", START_S)
    under.report(f"recomputed after {noticed:.2f} s, offloads again {time.monotonic() - under.struck_at:.0f} s")
    assert noticed < SOON_S
    assert engines["prefill"].pid != pid
    count = engines["decode"].counting()
    assert tokens(engines.door("decode", 1).complete(work)) == wanted
    assert count["offloaded_requests"] == len(work)
    assert count["fallback_requests"] == 0, "nothing is computed twice"


def test_a_decode_engine_that_is_killed_disturbs_no_other_and_serves_again(engines: Fleet, plain: Plain) -> None:
    work = workload(4, seed=64, prompts=[100, 300], outputs=[400])
    wanted = plain.tokens(work)
    assert offloads_again(engines, "other", START_S)
    count, pid = engines["other"].counting(), engines["other"].pid
    with load(engines, plain) as under, ThreadPoolExecutor() as pool:
        cut = pool.submit(engines.door("other", 1).complete, work)
        assert eventually(lambda: count["remote_attention_rows"] > 0, poll_s=0.01)
        under.strike()
        os.killpg(pid, signal.SIGKILL)
        with pytest.raises((AssertionError, OSError)):
            cut.result()
    assert (under.count["executor_failures"], under.count["fallback_requests"]) == (0, 0)
    assert eventually(lambda: engines["prefill"].settle() == 0), "what it had comes free"
    free = time.monotonic() - under.struck_at
    assert eventually(lambda: engines.has_begun_anew("other", pid), START_S)
    assert offloads_again(engines, "other", START_S)
    under.report(
        f"all blocks free after at most {free:.1f} s, offloads again {time.monotonic() - under.struck_at:.0f} s"
    )
    assert tokens(engines.door("other", 1).complete(work)) == wanted


def test_a_decode_engine_that_slept_over_its_lease_recomputes_what_others_have_overwritten(
    engines: Fleet, plain: Plain
) -> None:
    work = workload(4, seed=65, prompts=[100, 300], outputs=[500])
    filling = workload(2 * BLOCKS // 8, seed=66, prompts=[900], outputs=[5])
    wanted, filled = plain.tokens(work), plain.tokens(filling)
    assert offloads_again(engines, "other", START_S)
    count, core = engines["other"].counting(), engine_core_of(engines["other"].pid)
    with ThreadPoolExecutor() as pool:
        with load(engines, plain) as under:
            answers = pool.submit(engines.door("other", 1).complete, work)
            assert eventually(lambda: count["offloaded_requests"] == len(work), poll_s=0.01)
            under.strike()
            os.kill(core, signal.SIGSTOP)
        try:
            assert eventually(lambda: engines["prefill"].settle() == 0, 3 * LEASE_S), "what it had comes free"
            free = time.monotonic() - under.struck_at
            assert tokens(engines["prefill"].complete(filling)) == filled
        finally:
            os.kill(core, signal.SIGCONT)
        assert tokens(answers.result()) == wanted
    under.report(f"its blocks came free after at most {free:.1f} s")
    assert free > LEASE_S
    assert (under.count["executor_failures"], under.count["fallback_requests"]) == (0, 0)
    assert count["fallback_requests"] == len(work)
    assert offloads_again(engines, "other")
    assert eventually(lambda: engines["prefill"].settle() == 0 == engines["other"].settle())


def test_under_vllm_router_the_end_of_the_prefill_engine_is_a_clean_error_until_it_is_back(
    engines: Fleet, plain: Plain, tmp_path: Path
) -> None:
    (work,) = workload(1, seed=67, prompts=[200], outputs=[30])
    wanted = plain.tokens([work])
    pid = engines["prefill"].pid
    assert offloads_again(engines, "decode", START_S)
    with vllm_router_before(engines, tmp_path / "log") as router:
        assert tokens(router.complete([work])) == wanted
        os.killpg(pid, signal.SIGKILL)
        answer = requests.post(f"{router.url}/v1/completions", json=router.body(work), timeout=60)
        assert answer.status_code >= 500
        assert eventually(lambda: engines.has_begun_anew("prefill", pid), START_S)

        def again() -> bool:
            answer = requests.post(f"{router.url}/v1/completions", json=router.body(work), timeout=60)
            return answer.status_code == 200 and answer.json()["choices"][0]["token_ids"] == wanted[0]

        assert eventually(again, 60, poll_s=1)
        count = engines["decode"].counting()
        assert eventually(lambda: again() and count["offloaded_requests"] > 0, 60, poll_s=1)
