"""Several engines behind the proxy: which one gets a request, what happens when one fails, and a list that changes."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from tests.unit.proxy_cases import BODY, FakeEngine, Slow, command, good_decode, good_prefill, with_many
from vllm_adrenaline.proxy import room, upstream
from vllm_adrenaline.system.ports import reserve_ports

LONG = "x" * 1000
Client = aiohttp.ClientSession
Many = list[FakeEngine]


async def complete(client: Client, status: int = 200, headers: dict[str, str] | None = None, **more: Any) -> str:
    async with client.post("/v1/completions", json=BODY | more, headers=headers) as answer:
        assert answer.status == status, await answer.text()
        return await answer.text()


def seen(engines: Many) -> list[int]:
    return [len(each.seen) for each in engines]


async def metric(client: Client, name: str) -> float:
    async with client.get("/metrics") as answer:
        lines = [line for line in (await answer.text()).splitlines() if line.startswith(f"adrenaline_proxy_{name} ")]
    return float(lines[0].split()[-1]) if lines else 0.0


class Resetting(FakeEngine):
    """An engine that dies of every request that it is to answer."""

    async def handle(self, request: web.Request) -> web.StreamResponse:
        if request.path == "/health":
            return web.Response()
        self.seen.append((request.path, await request.json(), {}))
        assert request.transport is not None
        request.transport.abort()
        return web.Response()


def failing(status: int) -> FakeEngine:
    return FakeEngine({"error": "secret"}, status=status)


# Which one


def test_prompts_with_the_same_beginning_go_to_the_same_prefill_engine() -> None:
    async def test(client: Client, ps: Many, ds: Many) -> None:
        for number in range(12):
            await complete(client, prompt=f"{LONG} {number}")
        assert sorted(seen(ps)) == [0, 0, 12]
        messages = [{"role": "user", "content": "y" * 2000}]
        for _ in range(6):
            async with client.post("/v1/chat/completions", json={"model": "m", "messages": messages}) as answer:
                assert answer.status == 200
            messages += [{"role": "assistant", "content": "a"}, {"role": "user", "content": "b"}]
        turns = [[path for path, _, _ in engine.seen].count("/v1/chat/completions") for engine in ps]
        assert sorted(turns) == [0, 0, 6]

    with_many([good_prefill] * 3, [good_decode], test)


def test_a_prefill_engine_that_is_clearly_busier_does_not_get_what_it_knows() -> None:
    async def test(client: Client, ps: Many, ds: Many) -> None:
        await complete(client, prompt=LONG)
        home, other = ps if ps[0].seen else ps[::-1]
        home.wait = True
        busy = asyncio.create_task(complete(client, prompt=LONG + "z" * 50_000))
        while len(home.seen) < 2:
            await asyncio.sleep(0.01)
        await complete(client, prompt=LONG)
        assert len(other.seen) == 1
        busy.cancel()

    with_many([good_prefill] * 2, [good_decode], test)


def test_a_session_keeps_its_engines() -> None:
    async def test(client: Client, ps: Many, ds: Many) -> None:
        homes = set()
        for session in range(8):
            before = seen(ps), seen(ds)
            for number in range(4):
                await complete(client, headers={"X-Session-Id": f"s{session}"}, prompt=f"{number} {LONG}")
            grown = [
                [now - then for now, then in zip(seen(engines), past, strict=True)]
                for engines, past in zip((ps, ds), before, strict=True)
            ]
            assert [sorted(each) for each in grown] == [[0, 0, 4], [0, 0, 4]]
            homes.add((grown[0].index(4), grown[1].index(4)))
        assert len(homes) > 1
        assert not any("x-session-id" in headers for engine in (*ps, *ds) for _, _, headers in engine.seen)

    with_many([good_prefill] * 3, [good_decode] * 3, test)


def test_the_decode_engine_with_less_to_do_gets_the_request() -> None:
    async def test(client: Client, ps: Many, ds: Many) -> None:
        for engine in ds:
            engine.wait = True
        busy = asyncio.create_task(complete(client, max_tokens=500))
        while not any(seen(ds)):
            await asyncio.sleep(0.01)
        home, other = ds if ds[0].seen else ds[::-1]
        other.wait = False
        for _ in range(5):
            await complete(client)
        assert (len(home.seen), len(other.seen)) == (1, 5)
        name = f"decode-{ds.index(home)}"
        assert await metric(client, f'engine_outstanding_tokens{{engine="{name}"}}') == 500 + len('"hello"') // 4
        assert await metric(client, f'engine_requests_total{{engine="{name}"}}') == 1
        busy.cancel()
        await home.cancelled.wait()
        while await metric(client, f'engine_outstanding_tokens{{engine="{name}"}}'):
            await asyncio.sleep(0.01)

    with_many([good_prefill], [good_decode] * 2, test)


class Roomy(FakeEngine):
    """A decode engine with 100 blocks of 16 tokens, half of them in use, and what prefill engines would lend it."""

    def __init__(self, lendable: int) -> None:
        super().__init__(good_decode().answer, wait=True)
        self.lendable = lendable

    async def handle(self, request: web.Request) -> web.StreamResponse:
        if request.path != "/metrics":
            return await super().handle(request)
        info = 'vllm:cache_config_info{block_size="16",num_gpu_blocks="100"} 1.0'
        lends = f"vllm:adrenaline_lendable_blocks {self.lendable}"
        return web.Response(text=f"{info}\nvllm:kv_cache_usage_perc 0.5\n{lends}\n")


def test_a_request_goes_where_executors_have_room_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "EVERY_S", 0.05)

    async def test(client: Client, ps: Many, ds: Many) -> None:
        under_way = [asyncio.create_task(complete(client, max_tokens=400)) for _ in range(2)]
        while seen(ds) != [1, 1]:  # 800 tokens fit both
            await asyncio.sleep(0.01)
        for engine in ds:
            engine.wait = False
        for _ in range(2):
            await asyncio.sleep(0.3)  # both have said how much room they have
            await complete(client, max_tokens=1500)
        assert seen(ds) == [1, 3]
        for task in under_way:
            task.cancel()

    with_many([good_prefill], [lambda: Roomy(0), lambda: Roomy(100)], test)


def test_what_an_engine_said_of_its_room_holds_until_it_answers_again() -> None:
    while_asked: list[int | None] = []

    class Slowly(upstream.Engine):
        async def get(self, path: str, *_: Any) -> tuple[int, upstream.Headers, bytes]:
            while_asked.append(self.room)
            return 200, [], b'vllm:cache_config_info{block_size="16",num_gpu_blocks="100"} 1.0\n'

    engine = Slowly("decode", "http://engine")
    for _ in range(2):
        asyncio.run(room.ask(engine))
    assert (while_asked, engine.room) == ([None, 1600], 1600)


# When one fails


@pytest.mark.parametrize("bad", [Resetting, lambda: failing(500), lambda: failing(503)])
def test_another_decode_engine_answers_for_one_that_failed_before_the_first_byte(bad: Any) -> None:
    async def test(client: Client, ps: Many, ds: Many) -> None:
        while len(ds[0].seen) < 2:
            assert "secret" not in await complete(client)
        whats = ("error", "unreachable")
        counts = [await metric(client, f'engine_failures_total{{kind="decode",what="{what}"}}') for what in whats]
        assert sum(counts) == 2

    with_many([good_prefill], [bad, good_decode], test)


def test_a_request_that_kills_engines_kills_two_of_them() -> None:
    async def test(client: Client, ps: Many, ds: Many) -> None:
        text = await complete(client, status=503)
        assert "does not answer" in text
        assert sum(seen(ds)) == 2

    with_many([good_prefill], [Resetting] * 4, test)


def test_prefill_engines_that_fail_are_passed_over_and_without_any_the_decode_engine_does_it_all() -> None:
    async def test(client: Client, ps: Many, ds: Many) -> None:
        for _ in range(6):
            await complete(client)
        assert len(ps[2].seen) == 6
        ps[2].status = 500
        await complete(client)
        assert ds[0].seen[-1][1] == BODY
        assert await metric(client, "without_prefill_total") == 1

    with_many([Resetting, lambda: failing(500), good_prefill], [good_decode], test)


# A list that changes


def test_engines_come_and_go_with_the_file_and_what_runs_on_one_that_goes_ends_there(tmp_path: Path) -> None:
    async def run() -> None:
        file = tmp_path / "engines.json"
        p, old, new = good_prefill(), Slow({"choices": []}), good_decode()

        def names(*decode: FakeEngine) -> None:
            lists = {"prefill": [{"url": p.url}], "decode": [{"url": each.url} for each in decode]}
            file.with_suffix(".new").write_text(json.dumps(lists))
            file.with_suffix(".new").rename(file)

        async with p.serve(), old.serve(), new.serve():
            names(old)
            async with command("--engines", str(file)) as (client, _):
                posted = client.post("/v1/completions", json=BODY | {"stream": True})
                async with posted as stream:
                    assert await stream.content.readline() == b"data: 1\n"
                    names(new)
                    while not new.seen:
                        await complete(client)
                        await asyncio.sleep(0.05)
                    before = len(old.seen)
                    for _ in range(4):
                        await complete(client)
                    assert len(old.seen) == before
                    file.write_text("nonsense")
                    await asyncio.sleep(1.2)
                    await complete(client)
                    async with client.get("/engines") as answer:
                        assert [each["name"] for each in await answer.json()] == ["prefill-0", "decode-0"]
                    old.go.set()
                    assert b"data: 2" in await stream.read()

    asyncio.run(asyncio.wait_for(run(), 40))


def test_the_connections_of_an_engine_that_is_gone_are_closed_when_its_last_request_has_ended(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def run() -> None:
        monkeypatch.setattr(upstream, "LEAVE_S", 0.01)
        engines = upstream.Engines("decode")
        engines.replace([("a", "http://a"), ("b", "http://b")])
        a, b = engines.all
        with a.carrying(1):
            engines.replace([("c", "http://b")])
            assert engines.all == [b]
            assert b.name == "c"
            await asyncio.sleep(0.1)
            assert not a.session.closed
        await asyncio.sleep(0.1)
        assert a.session.closed
        assert not b.session.closed
        engines.replace([("a", "http://a")])
        await engines.close()
        assert b.session.closed

    asyncio.run(run())


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (["--engines", "x.toml", "--decode", "http://a"], "do not go with it"),
        (["--decode", "http://a"], "--engines FILE"),
        (["--engines", "/nowhere/x.toml"], "No such file"),
        (["--prefill", "http://a", "--decode", "http://b,http://b"], "named twice"),
    ],
)
def test_engines_that_cannot_be_meant_are_one_sentence(
    options: list[str], why: str, capsys: pytest.CaptureFixture[str]
) -> None:
    from vllm_adrenaline import cli

    assert cli.main(["proxy", "--port", str(reserve_ports(1)[0]), *options]) == 1
    assert why in capsys.readouterr().err
