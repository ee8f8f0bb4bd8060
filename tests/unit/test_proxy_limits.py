"""Clients that misuse the proxy, and engines that are alive but silent: what each may take, and what others notice."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from tests.unit.proxy_cases import BODY, FakeEngine, good_decode, good_prefill, with_proxy
from vllm_adrenaline.errors import AdrenalineError
from vllm_adrenaline.proxy import limits as proxy_limits
from vllm_adrenaline.proxy.limits import Limits

LONG_S = 20.0
"""No limit that a test is about is so long."""
SHORT_S = 0.2
LIMITS = Limits(
    head_seconds=LONG_S,
    body_seconds=LONG_S,
    idle_seconds=LONG_S,
    reading_seconds=LONG_S,
    first_byte_seconds=LONG_S,
    drain_seconds=LONG_S,
    token_seconds=LONG_S,
)
HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
Pair = tuple[asyncio.StreamReader, asyncio.StreamWriter]


@pytest.fixture(autouse=True)
def short_linger(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a client may still send of a body that nobody wants."""
    monkeypatch.setattr("vllm_adrenaline.proxy.connections.LINGER_S", SHORT_S)


async def connect(client: aiohttp.ClientSession) -> Pair:
    url = client._base_url
    assert url is not None
    return await asyncio.open_connection(url.host, url.port)


async def until_closed(reader: asyncio.StreamReader) -> bytes:
    """Return what came before the proxy closed the connection."""
    received = b""
    try:
        async with asyncio.timeout(LONG_S):
            while part := await reader.read(65536):
                received += part
    except ConnectionResetError:
        pass
    return received


def error_of(answer: bytes) -> dict[str, Any]:
    head, _, body = answer.partition(b"\r\n\r\n")
    assert b"x-request-id" in head.lower()
    return dict(json.loads(body)["error"])


async def serves(client: aiohttp.ClientSession) -> None:
    async with client.post("/v1/completions", json=BODY) as answer:
        assert answer.status == 200


async def count(client: aiohttp.ClientSession, name: str) -> float:
    async with client.get("/metrics") as answer:
        lines = [line for line in (await answer.text()).splitlines() if line.startswith(f"adrenaline_proxy_{name} ")]
    return float(lines[0].split()[-1]) if lines else 0.0


def run(test: Callable[[aiohttp.ClientSession], Awaitable[None]], **short: float) -> None:
    async def body(client: aiohttp.ClientSession, p: FakeEngine, d: FakeEngine) -> None:
        await test(client)

    with_proxy(good_prefill, good_decode, body, replace(LIMITS, **short))  # type: ignore[arg-type]


# Headers


@pytest.mark.parametrize("size", [40 << 10, 4 << 20])
def test_headers_that_are_too_large_are_refused_while_they_come(size: int) -> None:
    async def test(client: aiohttp.ClientSession) -> None:
        reader, writer = await connect(client)
        answer = asyncio.create_task(until_closed(reader))
        sent = 0
        try:
            writer.write(HEAD)
            while sent < size:
                writer.write(b"X-Filler: " + b"x" * 1014 + b"\r\n")
                await writer.drain()
                sent += 1026
            writer.write(b"Content-Length: 2\r\nConnection: close\r\n\r\n{}")
        except ConnectionError:
            pass
        got = await answer
        if got:  # a client that goes on sending may lose the answer
            assert error_of(got)["code"] in (400, 431)
        else:
            assert sent < size
        await serves(client)

    run(test)


def test_a_head_that_comes_in_one_piece_is_measured_too() -> None:
    async def test(client: aiohttp.ClientSession) -> None:
        async with client.post("/v1/completions", json=BODY, headers={"X-Filler": "x" * 7000}) as answer:
            assert (answer.status, (await answer.json())["error"]["code"]) == (431, 431)

    run(test, max_header_bytes=6000)


@pytest.mark.parametrize("raw", [b"\x16\x03\x01\x02\x00\x01", b"GET\r\n\r\n", b"POST /v1/completions HTTP/9\r\n\r\n"])
def test_what_is_no_http_is_refused_in_the_shape_of_all_errors(raw: bytes) -> None:
    async def test(client: aiohttp.ClientSession) -> None:
        reader, writer = await connect(client)
        writer.write(raw + b"\r\n\r\n")
        assert error_of(await until_closed(reader))["code"] == 400
        assert await count(client, 'refused_total{reason="http"}') == 1

    run(test)


@pytest.mark.parametrize("drip", [b"", b"X", HEAD])
def test_connections_that_send_no_headers_in_time_are_closed(drip: bytes) -> None:
    async def test(client: aiohttp.ClientSession) -> None:
        many = [await connect(client) for _ in range(60)]
        began = time.monotonic()

        async def stays(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> float:
            closed = asyncio.create_task(until_closed(reader))
            while not closed.done():
                writer.write(drip)  # to go on sending is no way to stay
                await asyncio.wait([closed], timeout=0.1)
            return time.monotonic() - began

        assert max(await asyncio.gather(*(stays(*each) for each in many))) < LONG_S / 2
        assert await count(client, 'refused_total{reason="silent"}') == 60
        await serves(client)

    run(test, head_seconds=0.4)


def test_a_connection_without_a_further_request_is_closed() -> None:
    async def test(client: aiohttp.ClientSession) -> None:
        reader, writer = await connect(client)
        writer.write(b"GET /live HTTP/1.1\r\nHost: x\r\n\r\n")
        assert (await until_closed(reader)).endswith(b'{"status":"ok"}')

    run(test, idle_seconds=SHORT_S)


def test_clients_that_keep_their_connections_close_them_first() -> None:
    """Whoever closes may cross a request. aiohttp keeps them 15 s, httpx 5, nginx and AWS's load balancer 60."""
    assert Limits().idle_seconds > 60


def test_a_connection_that_is_used_again_and_again_stays() -> None:
    async def test(client: aiohttp.ClientSession) -> None:
        reader, writer = await connect(client)
        for _ in range(8):
            writer.write(b"GET /live HTTP/1.1\r\nHost: x\r\n\r\n")
            assert b"200" in await reader.readuntil(b'{"status":"ok"}')
            await asyncio.sleep(0.1)

    run(test, head_seconds=SHORT_S)


# Bodies


def test_a_body_that_does_not_come_in_time_is_408() -> None:
    async def test(client: aiohttp.ClientSession) -> None:
        reader, writer = await connect(client)
        writer.write(HEAD + b'Content-Length: 100\r\n\r\n{"prompt"')
        assert error_of(await until_closed(reader))["code"] == 408
        await serves(client)

    run(test, body_seconds=SHORT_S)


@pytest.mark.parametrize("length", [b"Content-Length: 1000000000", b"Transfer-Encoding: chunked"])
def test_a_body_that_is_too_large_is_413_and_its_client_cannot_go_on_for_ever(length: bytes) -> None:
    async def test(client: aiohttp.ClientSession) -> None:
        reader, writer = await connect(client)
        closed = asyncio.create_task(until_closed(reader))
        writer.write(HEAD + length + b"\r\n\r\n")
        while not closed.done():
            if not writer.is_closing():
                writer.write(b"400\r\n" + b" " * 1024 + b"\r\n")
            await asyncio.wait([closed], timeout=0.01)
        assert error_of(closed.result())["code"] == 413
        await serves(client)

    run(test, max_body_bytes=10_000)


def test_bodies_of_all_requests_are_bounded_together() -> None:
    async def test(client: aiohttp.ClientSession) -> None:
        held = [await connect(client) for _ in range(proxy_limits.BODIES)]
        for _, writer in held:
            writer.write(HEAD + b"Content-Length: 1000\r\n\r\n" + b" " * 999)
        await asyncio.sleep(0.3)
        async with client.post("/v1/completions", json=BODY) as answer:
            assert (answer.status, "Retry-After" in answer.headers) == (429, True)
        for _, writer in held:
            writer.close()
        await asyncio.sleep(0.3)
        await serves(client)

    run(test, max_body_bytes=1000)


# Connections and requests


def test_a_further_request_is_429_until_another_one_ends() -> None:
    async def test(client: aiohttp.ClientSession, p: FakeEngine, d: FakeEngine) -> None:
        under_way = [asyncio.create_task(client.post("/v1/completions", json=BODY)) for _ in range(2)]
        while len(d.seen) < 2:
            await asyncio.sleep(0.01)
        async with client.post("/v1/completions", json=BODY) as answer:
            assert (answer.status, "Retry-After" in answer.headers) == (429, True)
        async with client.get("/health") as answer:
            assert answer.status == 200
        for task in under_way:
            task.cancel()
        d.wait = False
        await asyncio.wait_for(d.cancelled.wait(), 5)
        await asyncio.sleep(0.2)
        await serves(client)

    limits = replace(LIMITS, max_requests=2)
    with_proxy(good_prefill, lambda: FakeEngine({"choices": []}, wait=True), test, limits)


def test_a_silent_connection_makes_room_for_a_further_one() -> None:
    async def test(client: aiohttp.ClientSession) -> None:
        silent = [await connect(client) for _ in range(3)]
        await asyncio.sleep(0.1)
        await serves(client)
        assert await until_closed(silent[0][0]) == b""
        assert not silent[1][0].at_eof()

    run(test, max_connections=3)


def test_a_connection_too_many_is_closed_when_all_others_have_requests() -> None:
    async def test(client: aiohttp.ClientSession, p: FakeEngine, d: FakeEngine) -> None:
        under_way = [asyncio.create_task(client.post("/v1/completions", json=BODY)) for _ in range(3)]
        while len(d.seen) < 3:
            await asyncio.sleep(0.01)
        reader, _ = await connect(client)
        assert await until_closed(reader) == b""
        assert not any(task.done() for task in under_way)
        for task in under_way:
            task.cancel()

    limits = replace(LIMITS, max_connections=3)
    with_proxy(good_prefill, lambda: FakeEngine(wait=True), test, limits)


def test_a_client_that_takes_nothing_of_its_answer_is_given_up() -> None:
    class Endless(FakeEngine):
        async def stream(self, request: web.Request) -> web.StreamResponse:
            response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
            await response.prepare(request)
            while True:
                await response.write(b"x" * 65536)

    async def test(client: aiohttp.ClientSession, p: FakeEngine, d: FakeEngine) -> None:
        _, writer = await connect(client)
        body = json.dumps(BODY | {"stream": True}).encode()
        writer.write(HEAD + b"Content-Length: %d\r\n\r\n" % len(body) + body)
        await asyncio.wait_for(d.cancelled.wait(), LONG_S)

    with_proxy(good_prefill, Endless, test, replace(LIMITS, reading_seconds=SHORT_S))


# Engines


@pytest.mark.parametrize("silent", ["prefill", "decode"])
def test_an_engine_that_is_alive_but_silent_is_504(silent: str) -> None:
    async def test(client: aiohttp.ClientSession, p: FakeEngine, d: FakeEngine) -> None:
        async with client.post("/v1/completions", json=BODY) as answer:
            error = (await answer.json())["error"]
            assert (answer.status, error["code"]) == (504, 504)
            assert error["message"].startswith(f"the {silent} engine is silent (request ")
        await asyncio.wait_for((p if silent == "prefill" else d).cancelled.wait(), 5)
        assert await count(client, f'engine_failures_total{{kind="{silent}",what="silent"}}') == 1

    engines: dict[str, Callable[[], FakeEngine]] = {"prefill": good_prefill, "decode": good_decode}
    engines[silent] = lambda: FakeEngine(wait=True)
    with_proxy(engines["prefill"], engines["decode"], test, replace(LIMITS, first_byte_seconds=0.5))


def test_a_stream_that_stands_still_ends_with_an_error_event() -> None:
    async def test(client: aiohttp.ClientSession, p: FakeEngine, d: FakeEngine) -> None:
        async with client.post("/v1/completions", json=BODY | {"stream": True}) as answer:
            assert answer.status == 200
            first, last = (await answer.text()).removesuffix("\n\n").split("\n\n")
        assert first == 'data: {"a":  1}'
        assert "error" in json.loads(last.removeprefix("data: "))
        await asyncio.wait_for(d.cancelled.wait(), 5)

    with_proxy(good_prefill, lambda: FakeEngine(wait=True), test, replace(LIMITS, token_seconds=SHORT_S))


def test_a_stream_of_responses_begins_before_its_first_token_and_may_wait_for_that() -> None:
    class Queueing(FakeEngine):
        async def stream(self, request: web.Request) -> web.StreamResponse:
            response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
            await response.prepare(request)
            for event in ("response.created", "response.in_progress"):
                await response.write(f"event: {event}\ndata: {{}}\n\n".encode())
            await asyncio.sleep(5 * SHORT_S)
            await response.write(b"event: response.output_item.added\ndata: {}\n\n")
            if self.wait:
                await asyncio.sleep(LONG_S)
            return response

    async def test(client: aiohttp.ClientSession, p: FakeEngine, d: FakeEngine) -> None:
        for d.wait in (False, True):
            async with client.post("/v1/responses", json={"input": "x", "stream": True}) as answer:
                events = (await answer.text()).removesuffix("\n\n").split("\n\n")
            assert events[2] == "event: response.output_item.added\ndata: {}"
            assert [event.split("\n")[0] for event in events[3:]] == ["event: error"] * d.wait

    with_proxy(good_prefill, lambda: Queueing({}), test, replace(LIMITS, token_seconds=SHORT_S))


# The API key


@pytest.mark.parametrize("given", [None, "", "Bearer", "Bearer right ", "bearer right", "Bearer wrong", "Bearer ä"])
def test_without_the_right_key_nothing_but_health_is_answered(given: str | None) -> None:
    async def test(client: aiohttp.ClientSession, p: FakeEngine, d: FakeEngine) -> None:
        headers = {} if given is None else {"Authorization": given}
        if given != "Bearer right ":  # HTTP ends a value before its last blanks
            async with client.post("/v1/completions", json=BODY, headers=headers) as answer:
                assert (answer.status, (await answer.json())["error"]["code"]) == (401, 401)
            for path in ("/v1/models", "/metrics", "/version", "/engines", "/engines/decode-0/metrics", "/nothing"):
                async with client.get(path, headers=headers) as answer:
                    assert answer.status == 401
        assert not p.seen
        for path in ("/health", "/live", "/ready"):
            async with client.get(path, headers=headers) as answer:
                assert answer.status == 200
        async with client.post("/v1/completions", json=BODY, headers={"Authorization": "Bearer right"}) as answer:
            assert answer.status == 200

    with_proxy(good_prefill, good_decode, test, LIMITS, "right")


@pytest.mark.parametrize("key", ["", " ", "a\nb", "ä"])
def test_a_key_that_no_client_could_send_is_refused(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(AdrenalineError, match="is no key"):
        proxy_limits.api_key(key)
    monkeypatch.setenv(proxy_limits.API_KEY_ENV, key.replace("\n", ""))
    monkeypatch.setenv(proxy_limits.API_KEY_ENV, "other")
    assert proxy_limits.api_key("mine") == "mine"
    assert proxy_limits.api_key(None) == "other"


# Options


def test_limits_are_the_same_as_options() -> None:
    import argparse

    parser = argparse.ArgumentParser()
    proxy_limits.add_arguments(parser)
    assert proxy_limits.from_options(parser.parse_args([])) == Limits()
    assert Limits() != LIMITS
    assert proxy_limits.from_options(parser.parse_args(LIMITS.arguments())) == LIMITS
    with pytest.raises(AdrenalineError, match="--max-requests must be more than 0"):
        Limits(max_requests=0)
