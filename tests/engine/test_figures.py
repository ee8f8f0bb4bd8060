"""What routers and autoscalers read of our engines stays true: their load, their cache, and what they have cached."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec
import pytest
import requests
import zmq

from tests.engine.conftest import BLOCK, Client, Fleet, Wanted, Work, eventually, fleet, workload

pytestmark = pytest.mark.extended

WAITING, RUNNING, USED = "vllm:num_requests_waiting", "vllm:num_requests_running", "vllm:kv_cache_usage_perc"
SEATS, BLOCKS = 4, 60


@pytest.fixture(scope="module")
def events(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Where the prefill engine publishes what comes into its cache, and what leaves it."""
    return f"ipc://{tmp_path_factory.mktemp('events')}/kv"


@pytest.fixture(scope="module")
def engines(model: Path, events: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    publish = {"enable_kv_cache_events": True, "publisher": "zmq", "endpoint": events, "topic": "kv"}
    wanted = {
        "prefill": Wanted("prefill", BLOCKS, ["--kv-events-config", json.dumps(publish)]),
        "decode": Wanted("decode", BLOCKS, ["--max-num-seqs", str(SEATS), "--enable-prompt-tokens-details"], ratio=1),
    }
    with fleet(tmp_path_factory.mktemp("logs"), model, ["--dtype", "float32"], wanted) as started:
        yield started


def test_load_and_memory_count_what_is_offloaded(engines: Fleet) -> None:
    work = workload(SEATS + 3, seed=141, prompts=[300], outputs=[600])
    with ThreadPoolExecutor() as pool:
        answers = pool.submit(engines.door("decode", 1).complete, work)
        decode = engines["decode"]
        assert eventually(lambda: decode.metrics()[RUNNING] == SEATS and decode.metrics()[WAITING] == 3, poll_s=0.02)
        assert decode.metrics()[USED] == 0, "its own memory is free"
        lent = engines["prefill"].settle()  # one request, so that the gauge is fresh
        assert lent > SEATS * 3 / BLOCKS, "the blocks of four requests with three blocks or more are lent"
        answers.result()
    assert eventually(lambda: engines["prefill"].settle() == 0)
    assert (decode.metrics()[RUNNING], decode.metrics()[WAITING]) == (0, 0)


def test_cached_tokens_are_those_of_the_prefill_engine(engines: Fleet) -> None:
    (work,) = workload(1, seed=142, prompts=[3 * BLOCK + 20], outputs=[5])
    assert [cached_tokens(engines.door("decode", ratio), work) for ratio in (1, 1, 0)] == [0, 3 * BLOCK, 3 * BLOCK]


def cached_tokens(door: Client, work: Work) -> int:
    answer = requests.post(f"{door.url}/v1/completions", json=door.body(work), timeout=60).json()
    assert answer["usage"]["prompt_tokens"] == len(work.prompt)
    return (answer["usage"]["prompt_tokens_details"] or {}).get("cached_tokens") or 0


def test_prompts_of_offloaded_requests_are_told_to_who_routes_by_prefixes(engines: Fleet, events: str) -> None:
    count = engines["decode"].counting()
    asked: list[list[int]] = []
    with zmq.Context() as context, context.socket(zmq.SUB) as socket:
        socket.subscribe(b"kv")
        socket.connect(events)

        def is_told() -> bool:  # not of the first ones: a subscription takes a moment
            (work,) = workload(1, seed=143 + len(asked), prompts=[2 * BLOCK + 1], outputs=[20])
            asked.append(work.prompt)
            engines.door("decode", 1).complete([work])
            stored = []
            while socket.poll(200):
                _, _, batch = socket.recv_multipart()
                _, found, *_ = msgspec.msgpack.decode(batch)
                stored += [event["token_ids"] for event in found if event["type"] == "BlockStored"]
            return any(prompt[: 2 * BLOCK] in stored for prompt in asked)

        assert eventually(is_told, 30)
    assert count["offloaded_requests"] == len(asked)
