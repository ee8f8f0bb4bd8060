"""Statements about offloading, on real engines in float32."""

from __future__ import annotations

import asyncio
import random
import time
from pathlib import Path

import aiohttp
import pytest

from tests.engine.conftest import BLOCK, Client, Fleet, Plain, Work, eventually, run, tokens, watched, workload

RATIOS = [0, 0.5, 1]
LAYERS = 2
PROMPTS = [1, 2, 31, 127, 128, 129, 200, 256, 300, 384, 511, 512, 513, 555, 599, 600]
OUTPUTS = [1, 2, 5, 20, 40, 80, 130, 200]


@pytest.fixture(scope="module")
def requests() -> list[Work]:
    return workload(32, seed=1, prompts=PROMPTS, outputs=OUTPUTS)


@pytest.mark.parametrize("ratio", RATIOS)
def test_every_request_has_the_tokens_of_plain_vllm(
    standard: Fleet, plain: Plain, requests: list[Work], ratio: float
) -> None:
    count = standard["decode"].counting()
    started = time.monotonic()
    assert tokens(standard.door("decode", ratio).complete(requests)) == plain.tokens(requests)
    spent = [count[f"{kind}_seconds"] for kind in ("local_attention", "remote_attention", "exposed_wait")]
    if ratio == 0:
        assert spent == [0, 0, 0]
        assert count["remote_attention_rows"] == 0
    else:
        assert min(spent) > 0
        assert max(spent) < time.monotonic() - started
    if ratio == 1:
        assert count["remote_attention_rows"] == LAYERS * sum(work.tokens for work in requests)
    assert count["offloaded_requests"] == ratio * len(requests)
    assert count["fallback_requests"] == 0


@pytest.mark.parametrize("ratio", RATIOS)
def test_seeded_sampling_has_the_tokens_of_plain_vllm(
    standard: Fleet, plain: Plain, requests: list[Work], ratio: float
) -> None:
    some, sampling = requests[:12], {"temperature": 0.8, "seed": 7}
    wanted = plain.tokens(some, **sampling)
    if ratio == 0:
        assert tokens(plain.engine.complete(some, **sampling)) == wanted, "vLLM itself differs"
    assert tokens(standard.door("decode", ratio).complete(some, **sampling)) == wanted


def test_logprobs_are_those_of_plain_vllm(standard: Fleet, plain: Plain, requests: list[Work]) -> None:
    some = requests[:12]
    for wanted, got in zip(
        plain.complete(some, logprobs=1), standard.door("decode", 1).complete(some, logprobs=1), strict=True
    ):
        assert got.tokens == wanted.tokens
        assert got.logprobs == pytest.approx(wanted.logprobs, abs=1e-4)


def test_an_offloaded_request_takes_no_local_block_and_moves_no_kv(standard: Fleet) -> None:
    decode = standard["decode"]
    count = decode.counting()
    work = workload(8, seed=2, prompts=[300], outputs=[150])
    _, usage, running = run(watched(decode, standard.door("decode", 1), work))
    assert running > 1
    assert usage == 0
    assert count["vllm:nixl_bytes_transferred_sum"] == 0


def test_local_requests_do_move_kv_so_that_the_test_above_can_fail(standard: Fleet) -> None:
    decode = standard["decode"]
    count = decode.counting()
    work = workload(4, seed=3, prompts=[300], outputs=[100])
    _, usage, _ = run(watched(decode, standard.door("decode", 0), work))
    assert usage > 0
    assert count["vllm:nixl_bytes_transferred_sum"] > 0


def test_a_shared_prefix_is_computed_once_and_shared_by_offloaded_requests(standard: Fleet, plain: Plain) -> None:
    prefix = workload(1, seed=5, prompts=[2 * BLOCK], outputs=[1])[0].prompt
    rests = workload(6, seed=6, prompts=[1, 40, 128, 200], outputs=[60])
    work = [Work(prefix + rest.prompt, rest.tokens) for rest in rests] + [Work(prefix, 60)]
    wanted = plain.tokens(work)
    door = standard.door("decode", 0.5)
    door.complete([Work([*prefix, 11], 1)])
    count = standard["prefill"].counting()
    assert tokens(door.complete(work)) == wanted
    # The last one is the prefix itself: vLLM recomputes the last block of a prompt it has in full.
    assert count["vllm:prefix_cache_hits_total"] == 2 * BLOCK * len(rests) + BLOCK
    assert tokens(standard.door("decode", 1).complete(work)) == wanted, "a shared block was changed"


def test_an_offloaded_request_grows_over_many_blocks(standard: Fleet, plain: Plain) -> None:
    count = standard["decode"].counting()
    work = [Work(workload(1, seed=8, prompts=[100], outputs=[1])[0].prompt, 800)]
    assert tokens(standard.door("decode", 1).complete(work)) == plain.tokens(work)
    assert count["fallback_requests"] == 0


async def abort_at_random(url: str, work: list[Work], seed: int) -> int:
    """Send all; let clients go away at random moments. Return how many ended in full."""
    rng = random.Random(seed)
    client = Client(url)

    async def one(session: aiohttp.ClientSession, item: Work, patience: float) -> bool:
        try:
            async with asyncio.timeout(patience):
                body = client.body(item, stream=True)
                async with session.post(f"{url}/v1/completions", json=body) as response:
                    async for _ in response.content:
                        pass
            return True
        except TimeoutError:
            return False

    ended = 0
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        for start in range(0, len(work), 25):
            batch = work[start : start + 25]
            # A third goes away almost at once, before or in its prefill; the rest somewhere on the way.
            patience = [rng.choice([rng.uniform(0, 0.1), rng.uniform(0, 1.5), rng.uniform(0, 4)]) for _ in batch]
            ended += sum(await asyncio.gather(*(one(session, w, p) for w, p in zip(batch, patience, strict=True))))
    return ended


def test_nothing_leaks_when_clients_go_away(standard: Fleet, plain: Plain) -> None:
    decode, prefill, door = standard["decode"], standard["prefill"], standard.door("decode", 0.5)
    door.complete(workload(8, seed=9, prompts=[200], outputs=[20]))
    assert prefill.settle() == decode.settle() == 0
    shared_memory = set(Path("/dev/shm").iterdir())
    processes, files = standard.processes(), standard.open_files()
    ended = run(abort_at_random(door.url, workload(200, 10, PROMPTS, [20, 150, 200]), seed=11))
    assert 0 < ended < 200, "requests must both end and be aborted for this test to say anything"
    assert eventually(lambda: prefill.settle() == decode.settle() == 0)
    assert standard.processes() == processes
    assert set(Path("/dev/shm").iterdir()) == shared_memory

    def more_files() -> dict[int, int]:
        return {pid: now - files[pid] for pid, now in standard.open_files().items() if now > files[pid] + 3}

    assert eventually(lambda: not more_files(), seconds=30), more_files()  # connections are kept for some seconds
    work = workload(4, seed=12, prompts=[300], outputs=[40])
    assert tokens(door.complete(work)) == plain.tokens(work)
