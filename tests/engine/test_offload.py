"""Statements about offloading, on real engines in float32: one plain vLLM, one prefill and four decode engines."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Iterator
from pathlib import Path

import aiohttp
import pytest

from tests.engine.conftest import BLOCK, Answer, Client, Engine, Fleet, Work, fleet, kv_bytes, run, workload

COMMON = ["--dtype", "float32", "--max-model-len", "1024", "--max-num-seqs", "64"]
RATIOS = {"local": 0.0, "half": 0.5, "remote": 1.0}
LAYERS = 2
PROMPTS = [1, 2, 31, 127, 128, 129, 200, 256, 300, 384, 511, 512, 513, 555, 599, 600]
OUTPUTS = [1, 2, 5, 20, 40, 80, 130, 200]
SMALL_BLOCKS = 17  # 16 and vLLM's null block


@pytest.fixture(scope="module")
def engines(model: Path, short_tmp: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    wanted = {
        "plain": ("plain", ["--kv-cache-memory-bytes", kv_bytes(400)]),
        "prefill": ("prefill", ["--kv-cache-memory-bytes", kv_bytes(400), "--adrenaline-lease-seconds", "30"]),
        "small": ("decode", ["--kv-cache-memory-bytes", kv_bytes(SMALL_BLOCKS), "--adrenaline-offload-ratio", "0.5"]),
    }
    for name, ratio in RATIOS.items():
        wanted[name] = ("decode", ["--kv-cache-memory-bytes", kv_bytes(400), "--adrenaline-offload-ratio", str(ratio)])
    with fleet(short_tmp, tmp_path_factory.mktemp("logs"), model, COMMON, wanted) as started:
        yield started


@pytest.fixture(scope="module")
def requests() -> list[Work]:
    return workload(32, seed=1, prompts=PROMPTS, outputs=OUTPUTS)


@pytest.fixture(scope="module")
def reference(engines: Fleet, requests: list[Work]) -> list[Answer]:
    return engines["plain"].complete(requests)


def tokens(answers: list[Answer]) -> list[list[int]]:
    return [answer.tokens for answer in answers]


@pytest.mark.parametrize("name", RATIOS)
def test_every_request_has_the_tokens_of_plain_vllm(
    engines: Fleet, requests: list[Work], reference: list[Answer], name: str
) -> None:
    decode = engines[name]
    before, rows = decode.counter("offloaded_requests"), decode.counter("remote_attention_rows")
    started = time.monotonic()
    answers = engines.door(name).complete(requests)
    assert tokens(answers) == tokens(reference)
    spent = [decode.counter(f"{kind}_seconds") for kind in ("local_attention", "remote_attention", "exposed_wait")]
    if name == "local":
        assert spent == [0, 0, 0]
    else:
        assert min(spent) > 0
        assert max(spent) < time.monotonic() - started
    offloaded = decode.counter("offloaded_requests") - before
    assert offloaded == RATIOS[name] * len(requests)
    if name == "remote":
        assert decode.counter("remote_attention_rows") - rows == LAYERS * sum(work.tokens for work in requests)
    if name == "local":
        assert decode.counter("remote_attention_rows") == rows == 0
    assert decode.counter("fallback_requests") == 0


@pytest.mark.parametrize("name", RATIOS)
def test_seeded_sampling_has_the_tokens_of_plain_vllm(engines: Fleet, requests: list[Work], name: str) -> None:
    some = requests[:12]
    wanted = engines["plain"].complete(some, temperature=0.8, seed=7)
    assert tokens(wanted) == tokens(engines["plain"].complete(some, temperature=0.8, seed=7)), "vLLM itself differs"
    assert tokens(engines.door(name).complete(some, temperature=0.8, seed=7)) == tokens(wanted)


def test_logprobs_are_those_of_plain_vllm(engines: Fleet, requests: list[Work]) -> None:
    some = requests[:12]
    for wanted, got in zip(
        engines["plain"].complete(some, logprobs=1), engines.door("remote").complete(some, logprobs=1), strict=True
    ):
        assert got.tokens == wanted.tokens
        assert got.logprobs == pytest.approx(wanted.logprobs, abs=1e-4)


async def peak(engine: Engine, done: asyncio.Event) -> tuple[float, float]:
    """Return the largest KV usage and the most running requests seen until `done`."""
    usage = running = 0.0
    while not done.is_set():
        metrics = await engine.read_metrics()
        usage = max(usage, metrics["vllm:kv_cache_usage_perc"])
        running = max(running, metrics["vllm:num_requests_running"])
        await asyncio.sleep(0.05)
    return usage, running


async def watched(engine: Engine, client: Client, work: list[Work]) -> tuple[list[Answer], float, float]:
    done = asyncio.Event()
    watcher = asyncio.create_task(peak(engine, done))
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        answers = await asyncio.gather(*(client.one(session, item) for item in work))
    done.set()
    return answers, *await watcher


def test_an_offloaded_request_takes_no_local_block_and_moves_no_kv(engines: Fleet) -> None:
    decode = engines["remote"]
    before = decode.metrics()["vllm:nixl_bytes_transferred_sum"]
    work = workload(8, seed=2, prompts=[300], outputs=[150])
    _, usage, running = run(watched(decode, engines.door("remote"), work))
    assert running > 1
    assert usage == 0
    assert decode.metrics()["vllm:nixl_bytes_transferred_sum"] == before


def test_local_requests_do_move_kv_so_that_the_test_above_can_fail(engines: Fleet) -> None:
    decode = engines["local"]
    before = decode.metrics()["vllm:nixl_bytes_transferred_sum"]
    _, usage, _ = run(watched(decode, engines.door("local"), workload(4, seed=3, prompts=[300], outputs=[100])))
    assert usage > 0
    assert decode.metrics()["vllm:nixl_bytes_transferred_sum"] > before


def test_twice_the_requests_that_local_memory_holds_run_without_a_preemption(engines: Fleet) -> None:
    decode = engines["small"]
    per_request = 4  # 400 + 100 tokens
    fitting = (SMALL_BLOCKS - 1) // per_request
    work = workload(2 * fitting, seed=4, prompts=[400], outputs=[100])
    wanted = engines["plain"].complete(work)
    answers, usage, running = run(watched(decode, engines.door("small"), work))
    assert tokens(answers) == tokens(wanted)
    # How many of them are seen at once depends on how fast they come and go; none is ever taken its memory.
    assert 1 < running <= 2 * fitting
    assert 0 < usage <= fitting * per_request / (SMALL_BLOCKS - 1)
    assert decode.metrics()["vllm:num_preemptions_total"] == 0
    assert decode.counter("offloaded_requests") == fitting
    assert decode.counter("local_requests") == len(work) - fitting


def test_a_shared_prefix_is_computed_once_and_shared_by_offloaded_requests(engines: Fleet) -> None:
    prefix = workload(1, seed=5, prompts=[2 * BLOCK], outputs=[1])[0].prompt
    rests = workload(6, seed=6, prompts=[1, 40, 128, 200], outputs=[60])
    work = [Work(prefix + rest.prompt, rest.tokens) for rest in rests] + [Work(prefix, 60)]
    wanted = engines["plain"].complete(work)
    door, prefill = engines.door("half"), engines["prefill"]
    door.complete([Work([*prefix, 11], 1)])
    before = prefill.metrics()["vllm:prefix_cache_hits_total"]
    assert tokens(door.complete(work)) == tokens(wanted)
    # The last one is the prefix itself: vLLM recomputes the last block of a prompt it has in full.
    assert prefill.metrics()["vllm:prefix_cache_hits_total"] - before == 2 * BLOCK * len(rests) + BLOCK
    assert tokens(engines.door("remote").complete(work)) == tokens(wanted), "a shared block was changed"


def test_an_offloaded_request_grows_over_many_blocks(engines: Fleet) -> None:
    work = [Work(workload(1, seed=8, prompts=[100], outputs=[1])[0].prompt, 800)]
    assert tokens(engines.door("remote").complete(work)) == tokens(engines["plain"].complete(work))
    assert engines["remote"].counter("fallback_requests") == 0


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


def eventually(check: object, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not check() and time.monotonic() < deadline:  # type: ignore[operator]
        time.sleep(0.5)


def test_nothing_leaks_when_clients_go_away(engines: Fleet) -> None:
    decode, prefill = engines["half"], engines["prefill"]
    engines.door("half").complete(workload(8, seed=9, prompts=[200], outputs=[20]))
    assert prefill.settle() == decode.settle() == 0
    shared_memory = set(Path("/dev/shm").iterdir())
    processes, files = engines.processes(), engines.open_files()
    ended = run(abort_at_random(engines.door("half").url, workload(200, 10, PROMPTS, [20, 150, 200]), seed=11))
    assert 0 < ended < 200, "requests must both end and be aborted for this test to say anything"
    # A client that goes away in its prefill may leave a prompt there: nobody claims it for --adrenaline-claim-seconds.
    eventually(lambda: prefill.settle() == 0 and decode.settle() == 0, seconds=60)
    assert (prefill.settle(), decode.settle()) == (0, 0)
    assert engines.processes() == processes
    assert set(Path("/dev/shm").iterdir()) == shared_memory
    now = engines.open_files()
    assert {pid: now[pid] for pid in files if now[pid] > files[pid] + 3} == {}
    work = workload(4, seed=12, prompts=[300], outputs=[40])
    assert tokens(engines.door("half").complete(work)) == tokens(engines["plain"].complete(work))
