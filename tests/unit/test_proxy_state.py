"""The page of the proxy, and what it reads: bounded, asked of engines at most once a second, without addresses."""

from __future__ import annotations

import asyncio
import re

import aiohttp
from aiohttp import web

from tests.unit.page_cases import Busy, busy_decode, busy_prefill
from tests.unit.proxy_cases import FakeEngine, with_many, with_proxy
from vllm_adrenaline.proxy.state import MOST_ENGINES


def test_the_state_has_what_engines_say_and_no_addresses() -> None:
    async def test(client: aiohttp.ClientSession, p: FakeEngine, d: FakeEngine) -> None:
        async with client.get("/adrenaline/state") as answer:
            text = await answer.text()
            told = await answer.json()
        assert answer.status == 200
        assert answer.headers["Cache-Control"] == "no-store"
        prefill, decode = told["engines"]
        assert (prefill["name"], prefill["kind"], prefill["available"]) == ("prefill-0", "prefill", True)
        assert decode["state"]["offloaded_rows"] == 5
        assert decode["state"]["kv_blocks"] == 400
        assert {"placement": "local", "reason": "fits", "count": 30} in decode["state"]["placements"]
        assert told["proxy"]["requests_under_way"] == 1, "this one"
        assert not [each for each in ("127.0.0.1", p.url, d.url) if each in text]

    with_proxy(busy_prefill, busy_decode, test)


def test_a_flood_of_looks_asks_the_engines_once() -> None:
    async def test(client: aiohttp.ClientSession, p: FakeEngine, d: FakeEngine) -> None:
        assert isinstance(p, Busy)
        assert isinstance(d, Busy)

        async def look() -> bytes:
            async with client.get("/adrenaline/state") as answer:
                return await answer.read()

        began = asyncio.get_running_loop().time()
        found = await asyncio.gather(*(look() for _ in range(40)))
        seconds = asyncio.get_running_loop().time() - began
        assert max(p.looks, d.looks) <= 1 + seconds, "once a second at most"
        assert len(set(found)) <= 1 + seconds, "all were given the same"
        await asyncio.sleep(1.1)
        before = d.looks
        await look()
        assert d.looks == before + 1

    with_proxy(busy_prefill, busy_decode, test)


class Odd(FakeEngine):
    """An engine whose /metrics are not what they should be."""

    def __init__(self, page: bytes, status: int = 200) -> None:
        super().__init__({})
        self._page, self._code = page, status

    async def handle(self, request: web.Request) -> web.StreamResponse:
        return web.Response(body=self._page, status=self._code)


def test_engines_that_say_nonsense_or_nothing_have_no_state_and_the_others_have() -> None:
    async def test(client: aiohttp.ClientSession, ps: list[FakeEngine], ds: list[FakeEngine]) -> None:
        async with client.get("/adrenaline/state") as answer:
            engines = (await answer.json())["engines"]
        assert answer.status == 200
        assert [each["state"] is None for each in engines] == [True, True, True, False]

    odd = [
        lambda: Odd(b"vllm:num_requests_running{ 1 2 3\n"),
        lambda: Odd(b"\xff\xfe"),
        lambda: Odd(b"", status=500),
    ]
    with_many(odd, [busy_decode], test)


def test_so_many_engines_are_asked_and_the_others_are_counted() -> None:
    async def test(client: aiohttp.ClientSession, ps: list[FakeEngine], ds: list[FakeEngine]) -> None:
        async with client.get("/adrenaline/state") as answer:
            told = await answer.json()
        assert len(told["engines"]) == MOST_ENGINES
        assert told["more"] == 2

    with_many([busy_prefill], [busy_decode] * (MOST_ENGINES + 1), test)


def test_the_page_needs_no_key_and_what_it_shows_does() -> None:
    async def test(client: aiohttp.ClientSession, p: FakeEngine, d: FakeEngine) -> None:
        async with client.get("/") as page:
            assert page.status == 200
            text = await page.text()
        assert "secret" not in re.sub('id="secret"|at."secret".', "", text)
        async with client.get("/adrenaline/state") as answer:
            assert answer.status == 401
        async with client.get("/adrenaline/state", headers={"Authorization": "Bearer secret"}) as answer:
            assert answer.status == 200

    with_proxy(busy_prefill, busy_decode, test, api_key="secret")


def test_the_page_loads_nothing_from_elsewhere_and_browsers_are_told_so() -> None:
    async def test(client: aiohttp.ClientSession, p: FakeEngine, d: FakeEngine) -> None:
        async with client.get("/") as page:
            text, policy = await page.text(), page.headers["Content-Security-Policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        assert policy.count("sha256-") == 2 + 3, "the scripts and styles of the page, and no others"
        assert not [each for each in ("src=", "@import", "url(", 'href="h', 'href="/') if each in text]

    with_proxy(busy_prefill, busy_decode, test)
