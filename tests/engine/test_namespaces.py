"""Statements about engines of one host in PID namespaces of their own, as two containers with a folder in common have.

Neither sees a process of the other by its number. Memory is shared all the same, and either notices the other's end.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.engine.conftest import (
    Fleet,
    Plain,
    Wanted,
    Work,
    eventually,
    executors_of,
    fleet,
    kill_when,
    offloads_again,
    tokens,
    workload,
)
from tests.engine.test_mapped import MIXED, mapped_weights
from tests.engine.test_offload import OUTPUTS, PROMPTS
from tests.unit.test_process_spaces import can_be_apart
from vllm_adrenaline.launch.process import group_members

pytestmark = [
    pytest.mark.extended,
    pytest.mark.skipif(not can_be_apart(), reason="PID namespaces take CAP_SYS_ADMIN and unshare"),
]


@pytest.fixture(scope="module")
def engines(plain: Plain, model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    lease = ["--adrenaline-lease-seconds", "60"]
    wanted = {
        "prefill": Wanted("prefill", 200, lease, apart=True),
        "decode": Wanted("decode", 100, ["--adrenaline-pool", "both"], ratio=MIXED, apart=True),
    }
    common = ["--dtype", "float32", "--max-num-seqs", "64", "--adrenaline-share-weights", "auto"]
    with fleet(tmp_path_factory.mktemp("apart"), model, common, wanted) as started:
        yield started


@pytest.fixture(scope="module")
def requests() -> list[Work]:
    return workload(24, seed=1, prompts=PROMPTS, outputs=OUTPUTS)


LONG = workload(4, seed=61, prompts=[100, 300], outputs=[300])


def test_offloaded_mapped_and_local_requests_have_the_tokens_of_plain_vllm(
    engines: Fleet, plain: Plain, requests: list[Work]
) -> None:
    ours = os.stat("/proc/self/ns/pid").st_ino
    spaces = [
        {os.stat(f"/proc/{pid}/ns/pid").st_ino for pid in group_members(each.pid)} - {ours}
        for each in engines.engines.values()
    ]
    assert [len(each) for each in spaces] == [1, 1]
    assert spaces[0] != spaces[1]
    count = engines["decode"].counting()
    assert tokens(engines.door("decode", MIXED).complete(requests)) == plain.tokens(requests)
    kinds = [count[f"{kind}_requests"] for kind in ("offloaded", "mapped", "local")]
    assert min(kinds) >= len(requests) // 3
    assert min(count["remote_attention_rows"], count["mapped_attention_rows"]) > 0
    assert count["fallback_requests"] == 0


def test_they_have_one_copy_of_the_weights(engines: Fleet) -> None:
    offered, taken = (mapped_weights(engines[name]) for name in ("prefill", "decode"))
    assert taken.inode == offered.inode
    assert taken.kib["Size"] >= 0.4 * offered.kib["Size"] > 400
    assert taken.kib["Private_Dirty"] == 0


def test_a_decode_engine_that_is_killed_gives_back_what_it_had_long_before_its_lease_ends(
    engines: Fleet, plain: Plain
) -> None:
    decode, prefill = engines["decode"], engines["prefill"]
    killed, count = decode.pid, decode.counting()
    with engines.recovering():
        with ThreadPoolExecutor() as pool:
            answers = pool.submit(engines.door("decode", 1).complete, LONG)
            # Who may be offloaded and mapped is so by turns, and it was so as often till now.
            assert eventually(lambda: count["mapped_attention_rows"] > 0 and count["remote_attention_rows"] > 0)
            assert prefill.settle() > 0
            os.killpg(killed, signal.SIGKILL)
            assert eventually(lambda: prefill.settle() == 0, seconds=20)
            assert answers.exception() is not None
        assert eventually(lambda: engines.has_begun_anew("decode", after=killed), seconds=400, poll_s=0.5)
    assert tokens(engines.door("decode", 1).complete(LONG)) == plain.tokens(LONG)


def test_an_executor_that_is_killed_is_noticed_by_its_end_and_costs_a_recomputation(
    engines: Fleet, plain: Plain
) -> None:
    decode = engines["decode"]
    count = decode.counting()
    (executor,) = executors_of(engines["prefill"].pid)
    with kill_when(executor, lambda: count["remote_attention_rows"] > 20) as killed:
        assert tokens(engines.door("decode", 1).complete(LONG)) == plain.tokens(LONG)
    assert killed
    assert count["executor_failures"] >= 1
    assert 0 < count["fallback_requests"] < len(LONG), "of those that are offloaded, and none that is mapped"
    assert offloads_again(engines, "decode")


def test_an_executor_that_is_stopped_is_given_up_and_used_again(engines: Fleet, plain: Plain) -> None:
    decode = engines["decode"]
    count = decode.counting()
    (executor,) = executors_of(engines["prefill"].pid)
    with ThreadPoolExecutor() as pool:
        answers = pool.submit(engines.door("decode", 1).complete, LONG)
        assert eventually(lambda: count["remote_attention_rows"] > 20, poll_s=0.01)
        os.kill(executor, signal.SIGSTOP)
        try:
            assert tokens(answers.result()) == plain.tokens(LONG)
        finally:
            os.kill(executor, signal.SIGCONT)
    assert count["executor_failures"] >= 1
    assert offloads_again(engines, "decode")
