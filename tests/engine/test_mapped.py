"""Statements about mapped memory, on real engines in float32: one KV cache that two engines use.

`mapped` attends everything itself in the prefill engine's memory. `both` has requests of every kind in one batch.
"""

from __future__ import annotations

import os
import signal
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.engine.conftest import (
    BLOCK,
    SMALL_BLOCKS,
    Engine,
    Fleet,
    Plain,
    Wanted,
    Work,
    eventually,
    fleet,
    run,
    tokens,
    watched,
    workload,
)
from tests.engine.test_offload import LAYERS, OUTPUTS, PROMPTS, abort_at_random
from vllm_adrenaline.launch.process import group_members
from vllm_adrenaline.weights import sharing

MIXED = 0.67
"""Share of requests whose KV stays: of `both` a third is remote, a third mapped and a third local."""


@pytest.fixture(scope="module")
def engines(plain: Plain, model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    wanted = {
        "prefill": Wanted("prefill", 200, ["--adrenaline-lease-seconds", "30"]),
        "mapped": Wanted("decode", SMALL_BLOCKS, ["--adrenaline-pool", "mapped"], ratio="auto"),
        "both": Wanted("decode", 100, ["--adrenaline-pool", "both"], ratio=MIXED),
    }
    common = ["--dtype", "float32", "--max-num-seqs", "64", "--adrenaline-share-weights", "auto"]
    with fleet(tmp_path_factory.mktemp("mapped"), model, common, wanted) as started:
        yield started


@dataclass
class MappedWeights:
    """The memory file with the weights as an engine's worker has it mapped: its number, and sizes of smaps in KiB."""

    inode: str = ""
    kib: Counter[str] = field(default_factory=Counter)


def mapped_weights(engine: Engine) -> MappedWeights:
    found, ours = MappedWeights(), False
    for pid in group_members(engine.pid):
        for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
            words = line.split()
            if not words[0].endswith(":"):
                if ours := f"memfd:{sharing.NAME}" in line:
                    found.inode = words[4]
            elif ours and words[-1] == "kB":
                found.kib[words[0][:-1]] += int(words[1])
    return found


@pytest.fixture(scope="module")
def requests() -> list[Work]:
    return workload(32, seed=1, prompts=PROMPTS, outputs=OUTPUTS)


def test_every_mapped_request_has_the_tokens_of_plain_vllm_and_nothing_is_sent_or_moved(
    engines: Fleet, plain: Plain, requests: list[Work]
) -> None:
    decode = engines["mapped"]
    count = decode.counting()
    assert tokens(engines.door("mapped", 1).complete(requests)) == plain.tokens(requests)
    assert count["mapped_requests"] == len(requests)
    assert count["mapped_attention_rows"] == LAYERS * sum(work.tokens for work in requests)
    assert count["remote_attention_rows"] == count["vllm:nixl_bytes_transferred_sum"] == 0
    assert count["fallback_requests"] == 0
    assert count.placements() == {("mapped", "ratio"): len(requests)}


def test_by_load_requests_go_where_more_memory_is_to_spare(engines: Fleet, plain: Plain, requests: list[Work]) -> None:
    count = engines["mapped"].counting()
    assert tokens(engines.door("mapped", "auto").complete(requests)) == plain.tokens(requests)
    assert count["mapped_requests"] > len(requests) // 2
    assert count["mapped_requests"] + count["local_requests"] == len(requests)
    assert set(count.placements()) <= {
        ("mapped", "no_transfer"),
        ("mapped", "local_full"),
        ("local", "fits"),
        ("wait", "executor_full"),
    }


def test_all_engines_have_one_copy_of_the_weights(engines: Fleet) -> None:
    """The tokens of every other test here are computed with it."""
    offered, *taken = (mapped_weights(engines[name]) for name in ("prefill", "mapped", "both"))
    assert offered.kib["Size"] > 1000
    for each in taken:
        assert each.inode == offered.inode
        # Weights of less than a MiB may fit into free memory of the heap, where they begin anywhere in a page.
        assert each.kib["Size"] >= 0.4 * offered.kib["Size"]
        assert each.kib["Pss"] <= 0.5 * each.kib["Size"], "half of it or a third: two or three engines have it"
        assert each.kib["Private_Dirty"] == 0, "nobody has written into weights"


def test_a_mapped_request_takes_no_local_block(engines: Fleet) -> None:
    work = workload(8, seed=2, prompts=[300], outputs=[150])  # more than the decode engine's own memory could hold
    _, usage, running = run(watched(engines["mapped"], engines.door("mapped", "auto"), work))
    assert running > 4
    assert usage == 0


def test_local_remote_and_mapped_requests_in_one_batch_have_the_tokens_of_plain_vllm(
    engines: Fleet, plain: Plain, requests: list[Work]
) -> None:
    count = engines["both"].counting()
    assert tokens(engines.door("both", MIXED).complete(requests)) == plain.tokens(requests)
    kinds = [count[f"{kind}_requests"] for kind in ("offloaded", "mapped", "local")]
    assert min(kinds) >= len(requests) // 3
    assert sum(kinds) == len(requests)
    assert min(count["remote_attention_rows"], count["mapped_attention_rows"]) > 0
    assert count["vllm:nixl_bytes_transferred_sum"] > 0


@pytest.mark.parametrize("decode", ["mapped", "both"])
def test_seeded_sampling_has_the_tokens_of_plain_vllm(
    engines: Fleet, plain: Plain, requests: list[Work], decode: str
) -> None:
    some, sampling = requests[:12], {"temperature": 0.8, "seed": 7}
    door = engines.door(decode, MIXED if decode == "both" else "auto")
    assert tokens(door.complete(some, **sampling)) == plain.tokens(some, **sampling)


def test_a_shared_prefix_is_computed_once_and_shared_by_all_kinds_of_requests(engines: Fleet, plain: Plain) -> None:
    prefix = workload(1, seed=5, prompts=[2 * BLOCK], outputs=[1])[0].prompt
    rests = workload(6, seed=6, prompts=[1, 40, 128, 200], outputs=[60])
    work = [Work(prefix + rest.prompt, rest.tokens) for rest in rests] + [Work(prefix, 60)]
    wanted = plain.tokens(work)
    assert tokens(engines.door("mapped", "auto").complete(work)) == wanted
    count = engines["prefill"].counting()
    assert tokens(engines.door("both", MIXED).complete(work)) == wanted, "a shared block was changed"
    assert count["vllm:prefix_cache_hits_total"] > 2 * BLOCK * len(rests)
    assert tokens(engines.door("mapped", "auto").complete(work)) == wanted, "a shared block was changed"


def test_a_mapped_request_grows_over_many_blocks(engines: Fleet, plain: Plain) -> None:
    count = engines["mapped"].counting()
    work = [Work(workload(1, seed=8, prompts=[100], outputs=[1])[0].prompt, 800)]
    assert tokens(engines.door("mapped", "auto").complete(work)) == plain.tokens(work)
    assert count["fallback_requests"] == 0


@pytest.mark.extended  # as test_offload.py has it
def test_nothing_leaks_when_clients_go_away(engines: Fleet, plain: Plain) -> None:
    prefill = engines["prefill"]
    for decode, ratio in (("mapped", "auto"), ("both", MIXED)):
        door = engines.door(decode, ratio)  # type: ignore[arg-type]
        ended = run(abort_at_random(door.url, workload(100, 10, PROMPTS, [20, 150, 200]), seed=11))
        assert 0 < ended < 100, "requests must both end and be aborted for this test to say anything"
    assert eventually(lambda: prefill.settle() == engines["mapped"].settle() == engines["both"].settle() == 0)
    work = workload(4, seed=12, prompts=[300], outputs=[40])
    assert tokens(engines.door("mapped", "auto").complete(work)) == plain.tokens(work)


def test_more_than_the_shared_memory_holds_waits_or_is_recomputed_with_the_same_tokens(
    engines: Fleet, plain: Plain
) -> None:
    work = workload(48, seed=14, prompts=[500, 600], outputs=[200])  # 6 or 7 blocks each of 200
    prefill, decode = engines["prefill"], engines["mapped"]
    assert tokens(engines.door("mapped", "auto").complete(work)) == plain.tokens(work)
    assert eventually(lambda: prefill.settle() == decode.settle() == 0)


def test_a_decode_engine_that_is_killed_gives_back_what_it_had_mapped(engines: Fleet, plain: Plain) -> None:
    work = workload(4, seed=61, prompts=[100, 300], outputs=[300])
    killed, prefill = engines["both"], engines["prefill"]
    count, other = killed.counting(), engines["mapped"].counting()
    with ThreadPoolExecutor() as pool:
        answers = pool.submit(engines.door("both", 1).complete, work)
        assert eventually(lambda: count["mapped_attention_rows"] > 0)
        os.killpg(killed.pid, signal.SIGKILL)
        assert tokens(engines.door("mapped", "auto").complete(work)) == plain.tokens(work)
        assert eventually(lambda: prefill.settle() == 0)
        assert answers.exception() is not None
    assert other["fallback_requests"] == 0


def test_when_the_prefill_engine_is_killed_mapped_requests_go_on_and_no_token_is_lost(
    engines: Fleet, plain: Plain
) -> None:
    """What they hold is still there. What they cannot grow into is recomputed in the decode engine's own memory."""
    work = workload(3, seed=71, prompts=[130, 250], outputs=[700])
    decode, prefill = engines["mapped"], engines["prefill"]
    wanted = plain.tokens(work)
    count = decode.counting()
    with ThreadPoolExecutor() as pool:
        answers = pool.submit(engines.door("mapped", "auto").complete, work)
        assert eventually(lambda: count["mapped_requests"] == len(work), poll_s=0.01)
        assert eventually(lambda: count["mapped_attention_rows"] >= LAYERS * 30, poll_s=0.01)
        os.killpg(prefill.pid, signal.SIGKILL)
        assert tokens(answers.result()) == wanted
    assert count["fallback_requests"] == len(work), "growth that nobody can lease any more is recomputed here"
    assert count["vllm:nixl_bytes_transferred_sum"] == 0
    assert decode.settle() == 0
    assert tokens(decode.complete(work)) == wanted, "it serves alone"
