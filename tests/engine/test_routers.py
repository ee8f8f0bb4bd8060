"""Other people's routers in front of our engines: the tokens of plain vLLM, and requests are offloaded all the same.

vllm-router runs for real, where it is installed. Of others, what they send is replayed (docs/routers.md).
"""

from __future__ import annotations

import copy
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import requests

from tests.engine.conftest import Client, Fleet, Plain, eventually, run, workload
from tests.engine.test_faults import Stream, stream_all
from vllm_adrenaline.proxy.server import ServerThread, bind, url_of
from vllm_adrenaline.system.ports import reserve_ports

pytestmark = pytest.mark.extended

Body = dict[str, Any]
SHORT, LONG, OTHER = (item.prompt for item in workload(3, seed=131, prompts=[20, 500, 130], outputs=[1]))
QUESTION = {"role": "user", "content": "How warm is it in Oslo? " * 20}
PLACE = {"type": "object", "properties": {"place": {"type": "string"}}}
TOOL = {"type": "function", "function": {"name": "weather", "description": "The weather.", "parameters": PLACE}}
COMMON = {"model": "m", "temperature": 0, "ignore_eos": True, "return_token_ids": True}


CHAT = {**COMMON, "messages": [QUESTION], "tools": [TOOL], "tool_choice": "none", "max_tokens": 30}


def body(prompt: Any, **more: Any) -> Body:
    """Return the body of a client's request."""
    return {**COMMON, "prompt": prompt, "max_tokens": 30, **more}


@dataclass(frozen=True)
class Case:
    """A client's request, and how many requests of it are offloaded at least if all that can be are."""

    body: Body
    offloaded: int


CASES = {
    "short": Case(body(SHORT), 1),
    "long": Case(body(LONG), 1),
    "sampled": Case(body(OTHER, temperature=0.8, seed=3), 1),
    "minimum": Case(body(OTHER, min_tokens=5), 1),
    "two answers": Case(body(OTHER, n=2, temperature=0.8, seed=3), 1),
    "two prompts": Case(body([OTHER, LONG]), 1),
    "one token": Case(body(SHORT, max_tokens=1), 0),
    "chat with tools": Case(CHAT, 1),
}


def post(url: str, what: Body, headers: dict[str, str] | None = None) -> Body:
    """Post to a completions API, or to the one of chats if it is one; return the answer."""
    path = "/v1/chat/completions" if "messages" in what else "/v1/completions"
    answer = requests.post(url + path, json=what, headers=headers, timeout=120)
    assert answer.status_code == 200, answer.text
    return answer.json()


def tokens(answer: Body) -> list[list[int]]:
    """Return the tokens of all answers in one."""
    return [choice["token_ids"] for choice in sorted(answer["choices"], key=lambda choice: choice["index"])]


def stopped_at_once(plain: Plain) -> Case:
    """Return a request whose first token ends it."""
    ((first, *_),) = tokens(post(plain.engine.url, body(SHORT)))
    return Case(body(SHORT, stop_token_ids=[first]), 0)


def nothing_is_kept(engines: Fleet) -> bool:
    """Say whether no block stays: a prompt that no router passed on is let go after --adrenaline-claim-seconds."""
    return eventually(lambda: engines["prefill"].settle() == engines["decode"].settle() == 0, seconds=60, poll_s=1)


# What other routers send


def capped(asked: Body) -> Body:
    """Return what a prefill engine is asked for: one token. (vLLM refuses a larger minimum, which production-stack
    leaves as it is: its clients get that error.)"""
    return asked | {"max_tokens": 1, **({"min_tokens": 1} if "min_tokens" in asked else {})}


def toy_proxy(prefill: str, decode: str, asked: Body) -> Body:
    """vLLM's own: one request id on both sides, all parameters named."""
    headers = {"X-Request-Id": "toy-1"}
    first = capped(asked) | {"stream": False, "kv_transfer_params": KEEP | dict.fromkeys(WHERE)}
    return post(decode, asked | {"kv_transfer_params": post(prefill, first, headers)["kv_transfer_params"]}, headers)


def llm_d(prefill: str, decode: str, asked: Body) -> Body:
    """The sidecar: all of a client's headers, and a request id that is appended to the client's."""
    headers = {"X-Request-Id": "client-1, sidecar-1", "x-prefiller-host-port": "prefill:8000"}
    first = capped(asked) | {"max_completion_tokens": 1, "stream": False}
    first["kv_transfer_params"] = KEEP | dict.fromkeys(WHERE)
    return post(decode, asked | {"kv_transfer_params": post(prefill, first, headers)["kv_transfer_params"]}, headers)


def production_stack(prefill: str, decode: str, asked: Body) -> Body:
    """The host is the one of the prefill engine's URL, as Kubernetes has it."""
    first = capped(asked) | {"stream": False, "kv_transfer_params": KEEP | dict.fromkeys(WHERE)}
    params = post(prefill, first)["kv_transfer_params"]
    return post(decode, asked | {"kv_transfer_params": params | {"remote_host": "prefill.default.svc"}})


def smg(prefill: str, decode: str, asked: Body) -> Body:
    """Two parameters only; min_tokens is taken off, and only the decode engine is told to give several answers."""
    first = {name: value for name, value in asked.items() if name not in ("min_tokens", "n")}
    params = post(prefill, first | {"max_tokens": 1, "kv_transfer_params": KEEP})["kv_transfer_params"]
    return post(decode, asked | ({"kv_transfer_params": params} if params else {}))


def dynamo(prefill: str, decode: str, asked: Body) -> Body:
    """Its parameters travel in its own plane, copied field by field."""
    params = post(prefill, capped(asked) | {"kv_transfer_params": KEEP})["kv_transfer_params"]
    return post(decode, asked | {"kv_transfer_params": copy.deepcopy(params)}, {"X-Request-Id": "dynamo-1"})


def nobody_kept_it(prefill: str, decode: str, asked: Body) -> Body:
    """As vllm-router passes on what a prefill engine answers that keeps nothing."""
    return post(decode, asked | {"kv_transfer_params": None})


KEEP = {"do_remote_decode": True, "do_remote_prefill": False}
WHERE = ("remote_engine_id", "remote_block_ids", "remote_host", "remote_port")
REPLAYED = [toy_proxy, llm_d, production_stack, smg, dynamo, nobody_kept_it]


@pytest.mark.parametrize("router", REPLAYED, ids=lambda router: router.__name__)
def test_what_other_routers_send_is_answered_as_plain_vllm_would(
    standard: Fleet, plain: Plain, router: Callable[[str, str, Body], Body]
) -> None:
    standard.door("decode", 1)
    for name, case in {**CASES, "ends at once": stopped_at_once(plain)}.items():
        count = standard["decode"].counting()
        got = tokens(router(standard["prefill"].url, standard["decode"].url, case.body))
        assert got == tokens(post(plain.engine.url, case.body)), name
        assert count["offloaded_requests"] >= (0 if router is nobody_kept_it else case.offloaded), name
        assert count["unsigned_params"] == 0, name
    assert nothing_is_kept(standard)


def test_our_proxy_shares_requests_between_two_decode_engines(standard: Fleet, plain: Plain) -> None:
    work = workload(16, seed=133, prompts=[20, 200], outputs=[20])
    standard.revive("small")  # other tests kill it
    decode = [standard["decode"], standard["small"]]
    with bind("127.0.0.1", 0) as listener:
        proxy = ServerThread(listener, [standard["prefill"].url], [engine.url for engine in decode])
        proxy.start()
        try:
            counts = [engine.counting() for engine in decode]
            answers = Client(url_of(listener)).complete(work)
            assert [answer.tokens for answer in answers] == plain.tokens(work)
            done = [count["vllm:request_success_total"] for count in counts]
            assert sum(done) == len(work)
            assert min(done) >= 4, "each has its share"
        finally:
            proxy.stop()


@contextmanager
def vllm_router_before(fleet: Fleet, log: Path) -> Iterator[Client]:
    """Run vllm-router in front of the engines `prefill` and `decode`."""
    command = shutil.which("vllm-router", path=str(Path(sys.executable).parent)) or shutil.which("vllm-router")
    if command is None:
        pytest.skip("vllm-router is not installed: pip install vllm-router==0.1.17")
    port, metrics = reserve_ports(2)
    engines = ["--prefill", fleet["prefill"].url, "--decode", fleet["decode"].url]
    listen = ["--host", "127.0.0.1", "--port", str(port), "--prometheus-port", str(metrics)]
    with log.open("w") as output:
        process = subprocess.Popen(
            [command, "--vllm-pd-disaggregation", *engines, *listen], stdout=output, stderr=subprocess.STDOUT
        )
    client = Client(f"http://127.0.0.1:{port}")
    try:
        assert eventually(lambda: is_up(client.url)), log.read_text()
        yield client
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def vllm_router(standard: Fleet, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    """vllm-router in front of a prefill and a decode engine."""
    with vllm_router_before(standard, tmp_path_factory.mktemp("router") / "log") as client:
        yield client


def is_up(url: str) -> bool:
    try:
        return requests.get(f"{url}/health", timeout=2).status_code == 200
    except requests.ConnectionError:
        return False


def test_vllm_router_in_front_of_our_engines(standard: Fleet, plain: Plain, vllm_router: Client) -> None:
    standard.door("decode", 1)
    for name, case in {**CASES, "ends at once": stopped_at_once(plain)}.items():
        count = standard["decode"].counting()
        assert tokens(post(vllm_router.url, case.body)) == tokens(post(plain.engine.url, case.body)), name
        assert count["offloaded_requests"] >= case.offloaded, name
    assert nothing_is_kept(standard)


def test_vllm_router_streams(standard: Fleet, plain: Plain, vllm_router: Client) -> None:
    standard.door("decode", 1)
    count = standard["decode"].counting()
    work = workload(6, seed=132, prompts=[20, 300], outputs=[40])
    streams = [Stream() for _ in work]
    run(stream_all(vllm_router, work, streams))
    assert [each.tokens for each in streams] == plain.tokens(work)
    assert count["offloaded_requests"] == len(work)
    assert all(len(each.times) > 5 for each in streams), "tokens come one by one"
