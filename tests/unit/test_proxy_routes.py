"""Every route of the proxy but completions: what each of vLLM's APIs is asked for, pages, and how the proxy ends."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import time
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from tests.unit.proxy_cases import BODY, PARAMS, FakeEngine, Slow, command, good_decode, good_prefill, with_proxy
from vllm_adrenaline.proxy import bodies
from vllm_adrenaline.proxy.apis import APIS
from vllm_adrenaline.proxy.limits import Limits

Body = dict[str, Any]
TOOLS = [{"name": "t", "input_schema": {"type": "object"}}]
RESPONSES = {"model": "m", "input": "hello", "unknown": {"deep": [1]}, "tools": TOOLS}
MESSAGES = {"model": "m", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 9, "system": "s"}


def asked(limit: int, sent: Body) -> Body:
    """Return what a prefill engine is told of the KV cache, with the ticket that it was sent."""
    return bodies.KEEP_KV_FOR_DECODE | {
        bodies.STAY: limit,
        bodies.TICKET: sent["kv_transfer_params"][bodies.TICKET],
    }


# The APIs


@pytest.mark.parametrize("stream", [False, True])
def test_responses_are_prefilled_for_one_token_that_nobody_stores(stream: bool) -> None:
    async def test(client: aiohttp.ClientSession, p: FakeEngine, d: FakeEngine) -> None:
        body = RESPONSES | {"stream": stream, "max_output_tokens": 5, "include": ["x"], "store": True, "stop": "x"}
        async with client.post("/v1/responses", json=body) as answer:
            assert answer.status == 200
        (path, sent, _), (to, to_decode, _) = p.seen[0], d.seen[0]
        assert path == to == "/v1/responses"
        prefill = {"max_output_tokens": 1, "stream": False, "store": False, "ignore_eos": True}
        assert sent == RESPONSES | prefill | {"kv_transfer_params": asked(5, sent)}
        assert to_decode == body | {"kv_transfer_params": PARAMS}

    with_proxy(good_prefill, good_decode, test)


@pytest.mark.parametrize(
    "extra", [{"background": True}, {"previous_response_id": "resp_1"}, {"truncation": "auto"}], ids=str
)
def test_responses_that_only_the_engine_that_stores_them_can_make_go_there_alone_and_are_counted(extra: Body) -> None:
    async def test(client: aiohttp.ClientSession, p: FakeEngine, d: FakeEngine) -> None:
        async with client.post("/v1/responses", json=RESPONSES | extra) as answer:
            assert answer.status == 200
        assert not p.seen
        assert d.seen[0][1] == RESPONSES | extra
        async with client.get("/metrics") as answer:
            assert "adrenaline_proxy_not_disaggregated_total 1.0" in await answer.text()

    with_proxy(good_prefill, good_decode, test)


def test_messages_are_prefilled_for_one_token() -> None:
    async def test(client: aiohttp.ClientSession, p: FakeEngine, d: FakeEngine) -> None:
        body = MESSAGES | {"stop_sequences": ["x"], "thinking": {"type": "enabled", "budget_tokens": 5}}
        headers = {"x-api-key": "k", "anthropic-version": "2023-06-01", "anthropic-beta": "b"}
        async with client.post("/v1/messages?beta=true", json=body, headers=headers) as answer:
            assert answer.status == 200
        (path, sent, seen), (_, to_decode, decode_seen) = p.seen[0], d.seen[0]
        assert path == "/v1/messages"
        thinking = {"thinking": body["thinking"], "max_tokens": 1, "stream": False}
        assert sent == MESSAGES | thinking | {"kv_transfer_params": asked(9, sent)}
        assert to_decode == body | {"kv_transfer_params": PARAMS}
        for got in (seen, decode_seen):
            assert got["authorization"] == "Bearer k", "vLLM looks there"
            assert not any(name.startswith(("anthropic", "x-api")) for name in got)

    with_proxy(good_prefill, good_decode, test)


def test_a_prefill_engine_that_keeps_nothing_of_a_message_says_nothing_of_it() -> None:
    async def test(client: aiohttp.ClientSession, p: FakeEngine, d: FakeEngine) -> None:
        async with client.post("/v1/messages", json=MESSAGES) as answer:
            assert answer.status == 200
        assert d.seen[0][1] == MESSAGES

    with_proxy(lambda: FakeEngine({"id": "msg_1"}), good_decode, test)


@pytest.mark.parametrize("path", ["/tokenize", "/detokenize", "/v1/messages/count_tokens"])
def test_what_generates_nothing_goes_to_a_decode_engine_as_it_is(path: str) -> None:
    async def test(client: aiohttp.ClientSession, p: FakeEngine, d: FakeEngine) -> None:
        async with client.post(path, data=b'{"prompt":  "x"}') as answer:
            assert await answer.json() == {"choices": [{"text": "x"}]}
        assert d.seen[0][:2] == (path, {"prompt": "x"})
        assert not p.seen

    with_proxy(good_prefill, good_decode, test)


@pytest.mark.parametrize("path", ["/v1/responses", "/v1/messages"])
def test_streams_of_named_events_end_with_an_error_event_that_has_a_name(path: str) -> None:
    async def test(client: aiohttp.ClientSession, p: FakeEngine, d: FakeEngine) -> None:
        async with client.post(path, json=MESSAGES | {"input": "x", "stream": True}) as answer:
            _, last = (await answer.text()).removesuffix("\n\n").split("\n\n")
        name, data = last.split("\n")
        assert name == "event: error"
        error = json.loads(data.removeprefix("data: "))
        assert (error["type"], error["error"]["code"]) == ("error", 503)

    with_proxy(good_prefill, lambda: FakeEngine(cut=True), test)


@pytest.mark.parametrize("path", ["/v1/responses", "/v1/messages", "/tokenize"])
def test_limits_and_refusals_hold_for_every_route(path: str) -> None:
    async def test(client: aiohttp.ClientSession, p: FakeEngine, d: FakeEngine) -> None:
        for body, status in ({"kv_transfer_params": {}}, 400), ({"input": "x" * 2000}, 413):
            async with client.post(path, json=body, headers={"x-api-key": "right"}) as answer:
                error = await answer.json()
                assert (answer.status, error["type"], error["error"]["code"]) == (status, "error", status)
        async with client.post(path, json=MESSAGES, headers={"x-api-key": "wrong"}) as answer:
            assert answer.status == 401
        assert not p.seen
        assert not d.seen

    with_proxy(good_prefill, good_decode, test, Limits(max_body_bytes=1000), "right")


@pytest.mark.parametrize("path", APIS)
@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_a_client_that_leaves_aborts_the_engine_within_a_second(path: str, phase: str) -> None:
    async def test(client: aiohttp.ClientSession, p: FakeEngine, d: FakeEngine) -> None:
        engine = p if phase == "prefill" else d
        request = asyncio.create_task(client.post(path, json=MESSAGES | {"input": "x", "prompt": "x"}))
        await engine.started.wait()
        request.cancel()
        began = time.monotonic()
        await asyncio.wait_for(engine.cancelled.wait(), 1)
        print(f"{1000 * (time.monotonic() - began):.0f} ms")

    engines = (lambda: FakeEngine(wait=True)), good_decode
    with_proxy(*(engines if phase == "prefill" else (good_prefill, engines[0])), test)


# Pages


def test_pages_of_the_proxy_and_of_its_engines_by_name() -> None:
    async def test(client: aiohttp.ClientSession, p: FakeEngine, d: FakeEngine) -> None:
        async with client.get("/version") as answer:
            assert await answer.json() == {"version": "0.32.0"}
        async with client.get("/engines") as answer:
            engines = await answer.json()
        assert [(each["name"], each["kind"], each["available"]) for each in engines] == [
            ("prefill-0", "prefill", True),
            ("decode-0", "decode", True),
        ]
        assert "127.0.0.1" not in json.dumps(engines)
        for name in ("prefill-0", "decode-0"):
            async with client.get(f"/engines/{name}/metrics") as answer:
                assert "vllm:num_requests_running" in await answer.text()
        for path in ("/engines/decode-1/metrics", "/engines/decode-0/v1/models", "/engines/decode-0"):
            async with client.get(path) as answer:
                assert answer.status == 404
        async with client.get("/metrics") as answer:
            assert 'adrenaline_proxy_engines{kind="decode"} 1.0' in await answer.text()

    with_proxy(good_prefill, good_decode, test)


def test_ready_without_a_prefill_engine_and_not_without_a_decode_engine() -> None:
    def ill() -> FakeEngine:
        return FakeEngine(status=503)

    async def without_prefill(client: aiohttp.ClientSession, p: FakeEngine, d: FakeEngine) -> None:
        async with client.get("/ready") as ready, client.get("/health") as health:
            assert (ready.status, health.status) == (200, 503)

    async def without_decode(client: aiohttp.ClientSession, p: FakeEngine, d: FakeEngine) -> None:
        async with client.get("/ready") as ready, client.get("/live") as live:
            assert (ready.status, "Retry-After" in ready.headers, live.status) == (503, True, 200)

    with_proxy(ill, good_decode, without_prefill)
    with_proxy(good_prefill, ill, without_decode)


def test_what_an_engine_says_of_its_failure_is_on_no_page(caplog: pytest.LogCaptureFixture) -> None:
    class Broken(FakeEngine):
        async def handle(self, request: web.Request) -> web.StreamResponse:
            return web.Response(status=500, text="cannot open /home/me/secret")

    async def test(client: aiohttp.ClientSession, p: FakeEngine, d: FakeEngine) -> None:
        for path in ("/v1/models", "/version", "/engines/decode-0/metrics"):
            async with client.get(path) as answer:
                assert (answer.status, "secret" in await answer.text()) == (500, False)

    with_proxy(good_prefill, Broken, test)


# The end


def test_on_sigterm_what_runs_may_end_within_a_limit_and_nothing_else_begins() -> None:
    async def run(limit_s: float) -> None:
        p, d, limit = good_prefill(), Slow(), f"--drain-seconds={limit_s}"
        async with p.serve(), d.serve(), command("--prefill", p.url, "--decode", d.url, limit) as (client, proxy):
            async with client.post("/v1/completions", json=BODY | {"stream": True}) as answer:
                assert await answer.content.readline() == b"data: 1\n"
                os.kill(proxy.pid, signal.SIGTERM)
                if limit_s < 1:
                    with pytest.raises(aiohttp.ClientError):
                        await answer.read()
                else:
                    await asyncio.sleep(0.3)
                    for path in ("/v1/completions", "/v1/messages"):
                        async with client.post(path, json=BODY) as refused:
                            assert (refused.status, "Retry-After" in refused.headers) == (503, True)
                    async with client.get("/ready") as ready, client.get("/live") as live:
                        assert (ready.status, live.status) == (503, 200)
                    assert proxy.returncode is None
                    d.go.set()
                    assert b"data: 2" in await answer.read()
            await asyncio.wait_for(proxy.wait(), 10)
            assert len(d.seen) == 1

    async def both() -> None:
        await asyncio.gather(run(30), run(0.5))

    asyncio.run(asyncio.wait_for(both(), 60))
