"""The proxy in front of fake engines: what is sent where, and what happens when somebody fails or leaves."""

from __future__ import annotations

import asyncio
import json
import time
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from tests.unit.proxy_cases import BODY, PARAMS, FakeEngine, good_decode, good_prefill, with_proxy
from vllm_adrenaline.errors import AdrenalineError
from vllm_adrenaline.kv import stamp
from vllm_adrenaline.proxy import bodies
from vllm_adrenaline.proxy.apis import ANY_LENGTH, APIS
from vllm_adrenaline.proxy.app import create_app
from vllm_adrenaline.proxy.engine_file import of_addresses
from vllm_adrenaline.proxy.errors import Refused
from vllm_adrenaline.proxy.limits import Limits
from vllm_adrenaline.proxy.server import ServerThread, bind, url_of
from vllm_adrenaline.system.ports import reserve_ports


def test_prefill_first_then_decode_with_its_params() -> None:
    async def test(client: aiohttp.ClientSession, p: FakeEngine, d: FakeEngine) -> None:
        headers = {"Authorization": "Bearer k", "X-Request-Id": "r1"}
        body = BODY | {"stream_options": None, "min_tokens": 3, "logprobs": 2, "stop": ["x"]}
        async with client.post("/v1/completions", json=body, headers=headers) as answer:
            assert (answer.status, await answer.json()) == (200, {"choices": [{"text": "x"}]})
        (path, sent, seen), (_, to_decode, decode_seen) = p.seen[0], d.seen[0]
        assert path == "/v1/completions"
        ticket = sent["kv_transfer_params"].pop(bodies.TICKET)
        assert len(ticket) == 32
        assert sent == {
            "model": "m",
            "prompt": "hello",
            "max_tokens": 1,
            "stream": False,
            "ignore_eos": True,
            "kv_transfer_params": bodies.KEEP_KV_FOR_DECODE | {bodies.STAY: 7},
        }
        assert to_decode == body | {"kv_transfer_params": PARAMS}
        for headers_seen in (seen, decode_seen):
            assert headers_seen["x-request-id"] == "r1"
            assert headers_seen["authorization"] == "Bearer k"

    with_proxy(good_prefill, good_decode, test)


def test_request_id_is_made_and_the_same_for_both() -> None:
    async def test(client: aiohttp.ClientSession, p: FakeEngine, d: FakeEngine) -> None:
        async with client.post("/v1/chat/completions", json={"messages": [], "max_completion_tokens": 9}) as answer:
            assert answer.status == 200
        assert p.seen[0][2]["x-request-id"] == d.seen[0][2]["x-request-id"]
        assert p.seen[0][1]["max_completion_tokens"] == p.seen[0][1]["max_tokens"] == 1
        assert d.seen[0][1]["max_completion_tokens"] == 9

    with_proxy(good_prefill, good_decode, test)


def test_stream_goes_through_untouched() -> None:
    async def test(client: aiohttp.ClientSession, p: FakeEngine, d: FakeEngine) -> None:
        async with client.post("/v1/completions", json=BODY | {"stream": True}) as answer:
            assert answer.headers["Content-Type"] == "text/event-stream; charset=utf-8"
            assert answer.headers["X-Engine"] == "d"
            assert await answer.read() == b'data: {"a":  1}\n\ndata: [DONE]\n\n'

    with_proxy(good_prefill, good_decode, test)


def test_first_bytes_arrive_before_the_rest_exists() -> None:
    async def test(client: aiohttp.ClientSession, p: FakeEngine, d: FakeEngine) -> None:
        async with client.post("/v1/completions", json=BODY | {"stream": True}) as answer:
            assert await answer.content.readline() == b'data: {"a":  1}\n'
        await asyncio.wait_for(d.cancelled.wait(), 5)

    with_proxy(good_prefill, lambda: FakeEngine(wait=True), test)


@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_client_that_leaves_cancels_the_engine(phase: str) -> None:
    async def test(client: aiohttp.ClientSession, p: FakeEngine, d: FakeEngine) -> None:
        engine = p if phase == "prefill" else d
        request = asyncio.create_task(client.post("/v1/completions", json=BODY))
        await engine.started.wait()
        request.cancel()
        await asyncio.wait_for(engine.cancelled.wait(), 5)
        assert bool(d.seen) == (phase == "decode")

    waiting = FakeEngine
    if phase == "prefill":
        with_proxy(lambda: waiting(wait=True), good_decode, test)
    else:
        with_proxy(good_prefill, lambda: waiting(wait=True), test)


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_that_is_to_stay_is_sent_to_the_prefill_engine_again_as_it_came(stream: bool) -> None:
    class Staying(FakeEngine):
        async def handle(self, request: web.Request) -> web.StreamResponse:
            self.answer = {"choices": [{"text": "x"}]} if self.seen else {"kv_transfer_params": {bodies.STAY: True}}
            return await super().handle(request)

    async def test(client: aiohttp.ClientSession, p: FakeEngine, d: FakeEngine) -> None:
        body = BODY | {"stream": stream, "stop": ["y"]}
        async with client.post("/v1/completions", json=body) as answer:
            assert answer.status == 200
            content = await answer.read()
        assert content == (b'data: {"a":  1}\n\ndata: [DONE]\n\n' if stream else b'{"choices": [{"text": "x"}]}')
        (_, asked, first), (_, again, second) = p.seen
        assert asked["kv_transfer_params"][bodies.STAY] == 7
        assert again == body
        assert first["x-request-id"] == second["x-request-id"]
        assert not d.seen

    with_proxy(Staying, good_decode, test)


def test_a_request_that_was_to_stay_goes_on_without_its_prefill_engine() -> None:
    class Dying(FakeEngine):
        async def handle(self, request: web.Request) -> web.StreamResponse:
            if self.seen:
                assert request.transport is not None
                request.transport.abort()
            self.answer = {"kv_transfer_params": {bodies.STAY: True}}
            return await super().handle(request)

    async def test(client: aiohttp.ClientSession, p: FakeEngine, d: FakeEngine) -> None:
        async with client.post("/v1/completions", json=BODY) as answer:
            assert (answer.status, await answer.json()) == (200, {"choices": [{"text": "x"}]})
        assert d.seen[0][1] == BODY

    with_proxy(Dying, good_decode, test)


def test_the_limit_of_an_answer_is_the_one_that_vllm_takes() -> None:
    def limit(**body: object) -> object:
        parsed = bodies.parse(json.dumps({"model": "m", **body}).encode())
        return bodies.for_prefill(APIS[path], parsed, "t")["kv_transfer_params"][bodies.STAY]

    from vllm.entrypoints.openai.completion.protocol import CompletionRequest

    path = "/v1/completions"
    assert limit(prompt="x") == CompletionRequest(model="m", prompt="x").max_tokens
    assert limit(prompt="x", max_tokens=5, max_completion_tokens=3) == 5
    path = "/v1/chat/completions"
    assert limit(messages=[], max_tokens=5, max_completion_tokens=3) == 3
    assert limit(messages=[]) == limit(messages=[], max_tokens="many") == ANY_LENGTH
    path = "/v1/responses"
    assert limit(input="x", max_output_tokens=4, max_tokens=3) == 4
    assert limit(input="x") == ANY_LENGTH
    path = "/v1/messages"
    assert limit(messages=[], max_tokens=4) == 4


@pytest.mark.parametrize("path", APIS)
def test_what_vllm_makes_of_the_body_for_prefill_keeps_the_prompts_kv_cache(path: str) -> None:
    from vllm.entrypoints.anthropic.protocol import AnthropicMessagesRequest
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
    from vllm.entrypoints.openai.completion.protocol import CompletionRequest
    from vllm.entrypoints.openai.responses.protocol import ResponsesRequest

    requests = {
        "/v1/completions": (CompletionRequest, {"prompt": "x", "max_tokens": 40, "logprobs": 2}),
        "/v1/chat/completions": (
            ChatCompletionRequest,
            {"messages": [], "max_completion_tokens": 40, "logprobs": True, "top_logprobs": 2},
        ),
        "/v1/responses": (
            ResponsesRequest,
            {"input": "x", "max_output_tokens": 40, "include": ["message.output_text.logprobs"], "top_logprobs": 2},
        ),
        "/v1/messages": (
            AnthropicMessagesRequest,
            {"messages": [], "max_tokens": 4000, "thinking": {"type": "enabled", "budget_tokens": 2000}},
        ),
    }
    kind, body = requests[path]
    limit = body[APIS[path].limits[0]]
    parsed = bodies.parse(json.dumps({"model": "m", "stream": True, **body}).encode())
    made = kind.model_validate_json(bodies.encode(bodies.for_prefill(APIS[path], parsed, "t")))
    assert made.kv_transfer_params == bodies.KEEP_KV_FOR_DECODE | {bodies.STAY: limit, bodies.TICKET: "t"}
    assert not made.stream
    assert [getattr(made, name) for name in APIS[path].limits if name in body] == [1]


def test_both_sides_ask_for_a_stay_by_the_same_name() -> None:
    assert bodies.STAY == stamp.STAY


def test_refusal_of_the_prefill_engine_is_passed_on() -> None:
    error = {"error": {"message": "too long", "type": "BadRequestError", "param": None, "code": 400}}

    async def test(client: aiohttp.ClientSession, p: FakeEngine, d: FakeEngine) -> None:
        async with client.post("/v1/completions", json=BODY) as answer:
            assert (answer.status, await answer.json()) == (400, error)
        assert not d.seen

    with_proxy(lambda: FakeEngine(error, status=400), good_decode, test)


@pytest.mark.parametrize("missing", ["prefill", "decode"])
def test_without_a_decode_engine_it_is_503_and_without_a_prefill_engine_decode_computes_the_prompt(
    missing: str, caplog: pytest.LogCaptureFixture
) -> None:
    async def run() -> None:
        engine = good_prefill() if missing == "decode" else good_decode()
        async with engine.serve():
            down = f"http://127.0.0.1:{reserve_ports(1)[0]}"
            urls = (down, engine.url) if missing == "prefill" else (engine.url, down)
            listener = bind("127.0.0.1", 0)
            proxy = ServerThread(listener, [urls[0]], [urls[1]])
            proxy.start()
            try:
                async with aiohttp.ClientSession(url_of(listener)) as client:
                    headers = {"X-Request-Id": "mine"}
                    async with client.post("/v1/completions", json=BODY, headers=headers) as answer:
                        if missing == "prefill":
                            assert (answer.status, await answer.json()) == (200, {"choices": [{"text": "x"}]})
                            assert engine.seen[0][1] == BODY
                        else:
                            assert answer.status == 503
                            assert "Retry-After" in answer.headers
                            error = (await answer.json())["error"]
                            assert error["code"] == 503
                            assert error["message"] == "the decode engine does not answer (request mine)"
                    assert f"the {missing} engine at {down}" in caplog.text
                    assert "(request mine)" in caplog.text
                    async with client.get("/metrics") as answer:
                        counted = f"adrenaline_proxy_without_prefill_total {float(missing == 'prefill')}"
                        assert counted in await answer.text()
                    async with client.get("/health") as answer:
                        assert answer.status == 503
                        message = (await answer.json())["error"]["message"]
                        assert message.startswith(f"not healthy: 1 {missing} engine(s)")
                    async with client.get(f"/engines/{missing}-0/metrics") as answer:
                        assert answer.status == 503
            finally:
                await asyncio.to_thread(proxy.stop)
                listener.close()

    asyncio.run(run())


def prompts(p: FakeEngine) -> list[dict[str, Any]]:
    """Return the requests by which a prefill engine was asked for a prompt."""
    return [body for _, body, _ in p.seen if bodies.TICKET in body["kv_transfer_params"]]


def test_no_prompt_is_computed_while_nobody_can_decode_it() -> None:
    async def run() -> None:
        p, d = good_prefill(), good_decode()
        async with p.serve():
            async with d.serve():
                port = int(d.url.rpartition(":")[2])
            listener = bind("127.0.0.1", 0)
            proxy = ServerThread(listener, [p.url], [d.url])
            proxy.start()
            try:
                async with aiohttp.ClientSession(url_of(listener)) as client:
                    for _ in range(3):
                        async with client.post("/v1/completions", json=BODY) as answer:
                            assert answer.status == 503
                    assert len(prompts(p)) == 1, "it was not known before the first one"
                    async with d.serve(port), client.post("/v1/completions", json=BODY) as answer:
                        assert answer.status == 200
                    assert len(prompts(p)) == 2
            finally:
                await asyncio.to_thread(proxy.stop)
                listener.close()

    asyncio.run(run())


def test_a_prefill_engine_that_cannot_be_reached_rests_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    async def run() -> None:
        p, d = good_prefill(), good_decode()
        async with d.serve():
            async with p.serve():
                port = int(p.url.rpartition(":")[2])
            listener = bind("127.0.0.1", 0)
            proxy = ServerThread(listener, [p.url], [d.url])
            proxy.start()

            async def complete() -> None:
                async with client.post("/v1/completions", json=BODY) as answer:
                    assert answer.status == 200

            try:
                async with aiohttp.ClientSession(url_of(listener)) as client:
                    monkeypatch.setattr("vllm_adrenaline.proxy.upstream.REST_S", 2.0)
                    await complete()
                    async with p.serve(port):
                        await complete()
                        assert not p.seen
                        while not p.seen:
                            await asyncio.sleep(0.1)
                            await complete()
            finally:
                await asyncio.to_thread(proxy.stop)
                listener.close()

    asyncio.run(asyncio.wait_for(run(), 30))


def test_a_stream_whose_engine_dies_ends_with_an_error_event() -> None:
    async def test(client: aiohttp.ClientSession, p: FakeEngine, d: FakeEngine) -> None:
        async with client.post("/v1/completions", json=BODY | {"stream": True}) as answer:
            first, last = (await answer.text()).removesuffix("\n\n").split("\n\n")
        assert first == 'data: {"a":  1}'
        assert json.loads(last.removeprefix("data: "))["error"]["code"] == 503

    with_proxy(good_prefill, lambda: FakeEngine(cut=True), test)


@pytest.mark.parametrize("kind", ["text/event-stream", "application/json"])
def test_an_answer_that_is_cut_anywhere_else_is_no_whole_answer(kind: str) -> None:
    class Cutting(FakeEngine):
        async def handle(self, request: web.Request) -> web.StreamResponse:
            response = web.StreamResponse(headers={"Content-Type": kind})
            await response.prepare(request)
            await response.write(b'{"half": ')
            await asyncio.sleep(0.1)
            assert request.transport is not None
            request.transport.abort()
            return response

    async def test(client: aiohttp.ClientSession, p: FakeEngine, d: FakeEngine) -> None:
        async with client.post("/v1/completions", json=BODY) as answer:
            with pytest.raises(aiohttp.ClientError):
                await answer.read()

    with_proxy(good_prefill, Cutting, test)


@pytest.mark.parametrize("status", [500, 503])
def test_what_an_engine_says_of_its_own_failure_goes_to_the_log_only(
    status: int, caplog: pytest.LogCaptureFixture
) -> None:
    async def test(client: aiohttp.ClientSession, p: FakeEngine, d: FakeEngine) -> None:
        async with client.post("/v1/completions", json=BODY) as answer:
            assert answer.status == status
            text = await answer.text()
        assert "/home/me/secret" not in text
        assert answer.headers["X-Request-Id"] in text
        assert "/home/me/secret" in caplog.text

    said = {"error": {"message": "cannot open /home/me/secret"}}
    with_proxy(good_prefill, lambda: FakeEngine(said, status=status), test)


def test_a_prefill_engine_that_fails_leaves_the_prompt_to_decode() -> None:
    async def test(client: aiohttp.ClientSession, p: FakeEngine, d: FakeEngine) -> None:
        async with client.post("/v1/completions", json=BODY) as answer:
            assert answer.status == 200
        assert d.seen[0][1] == BODY

    with_proxy(lambda: FakeEngine({}, status=500), good_decode, test)


def test_headers_that_are_not_on_the_list_stay_with_the_proxy() -> None:
    async def test(client: aiohttp.ClientSession, p: FakeEngine, d: FakeEngine) -> None:
        headers = {"Cookie": "a=b", "X-Data-Parallel-Rank": "1", "Traceparent": "00-1-2-01", "Forwarded": "for=x"}
        async with client.post("/v1/completions", json=BODY, headers=headers) as answer:
            assert answer.status == 200
        for seen in (p.seen[0][2], d.seen[0][2]):
            assert set(seen) <= {"host", "accept", "content-type", "content-length", "traceparent", "x-request-id"}
            assert seen["traceparent"] == "00-1-2-01"

    with_proxy(good_prefill, good_decode, test)


def test_health_models_and_unknown_paths() -> None:
    async def test(client: aiohttp.ClientSession, p: FakeEngine, d: FakeEngine) -> None:
        async with client.get("/health") as answer:
            assert answer.status == 200
        async with client.get("/v1/models") as answer:
            assert (await answer.json())["data"] == [{"id": "m"}]
        async with client.post("/v1/nothing", json={}) as answer:
            assert (answer.status, (await answer.json())["error"]["code"]) == (404, 404)
        async with client.get("/v1/completions") as answer:
            assert (answer.status, (await answer.json())["error"]["code"]) == (405, 405)

    with_proxy(good_prefill, good_decode, test)


@pytest.mark.parametrize(
    "extra", [{"kv_transfer_params": {"do_remote_prefill": True}}, {"vllm_xargs": {"kv_transfer_params": 1}}]
)
def test_kv_transfer_params_of_clients_are_refused(extra: dict[str, Any]) -> None:
    async def test(client: aiohttp.ClientSession, p: FakeEngine, d: FakeEngine) -> None:
        async with client.post("/v1/completions", json=BODY | extra) as answer:
            assert answer.status == 400
            assert (await answer.json())["error"]["param"] == "kv_transfer_params"
        assert not p.seen
        assert not d.seen

    with_proxy(good_prefill, good_decode, test)


@pytest.mark.parametrize("raw", [b"{", b"[]", b"\xff", b"[" * 200_000])
def test_bodies_that_are_no_object_are_refused(raw: bytes) -> None:
    with pytest.raises(Refused) as refused:
        bodies.parse(raw)
    assert refused.value.status == 400


def test_a_field_that_is_no_text_is_refused_and_not_an_error_of_the_proxy() -> None:
    async def test(client: aiohttp.ClientSession, p: FakeEngine, d: FakeEngine) -> None:
        async with client.post("/v1/completions", data=b'{"prompt": "x", "echo": "\xef\xc4"}') as answer:
            assert (answer.status, (await answer.json())["error"]["param"]) == (400, "echo")
        assert not p.seen

    with_proxy(good_prefill, good_decode, test)


def test_body_size_is_bounded() -> None:
    async def run() -> None:
        sent: list[dict[str, Any]] = []
        parts = [{"type": "http.request", "body": b"x" * 60, "more_body": True}] * 2

        async def receive() -> dict[str, Any]:
            return parts.pop()

        async def send(message: Any) -> None:
            sent.append(message)

        app = create_app(of_addresses(["http://p"], ["http://d"]), Limits(max_body_bytes=100))
        scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": [], "query_string": b""}
        await app(scope, receive, send)
        assert sent[0]["status"] == 413
        assert json.loads(sent[1]["body"])["error"]["code"] == 413

    asyncio.run(run())


ALONE: list[dict[str, Any]] = [
    {"n": 2},
    {"best_of": 3},
    {"echo": True},
    {"prompt_logprobs": 0},
    {"use_beam_search": True},
    {"prompt": ["a", "b"]},
    {"prompt": [[1, 2], [3]]},
]


@pytest.mark.parametrize("extra", ALONE)
def test_requests_of_several_sequences_go_to_decode_alone(extra: dict[str, Any]) -> None:
    async def test(client: aiohttp.ClientSession, p: FakeEngine, d: FakeEngine) -> None:
        async with client.post("/v1/completions", json=BODY | extra) as answer:
            assert answer.status == 200
        assert not p.seen
        assert d.seen[0][1] == BODY | extra

    with_proxy(good_prefill, good_decode, test)


@pytest.mark.parametrize("extra", [{"n": 1}, {"n": None}, {"prompt": [1, 2, 3]}, {"prompt": ["a"]}, {"echo": False}])
def test_one_sequence_is_disaggregated(extra: dict[str, Any]) -> None:
    assert bodies.can_disaggregate(APIS["/v1/completions"], bodies.parse(json.dumps(BODY | extra).encode()))


def test_prefill_that_kept_nothing_leaves_all_to_decode() -> None:
    assert bodies.params_of(b'{"kv_transfer_params": null}') is None
    with pytest.raises(Refused):
        bodies.params_of(b"[]")


def test_taken_port_is_one_sentence() -> None:
    with bind("127.0.0.1", 0) as first:
        first.listen()
        port = first.getsockname()[1]
        with pytest.raises(AdrenalineError, match=f"port {port} on 127.0.0.1 is in use"):
            bind("127.0.0.1", port)


# Prompts that no decode engine took


async def given_up(p: FakeEngine, count: int = 1) -> list[dict[str, Any]]:
    """Return the requests by which a prefill engine was told that a prompt is given up, and check them.

    `count` of them are waited for, and then a moment for more to come.
    """

    def found() -> list[dict[str, Any]]:
        return [body for _, body, _ in p.seen if bodies.GIVES_UP in (body["kv_transfer_params"] or {})]

    deadline = time.monotonic() + 5
    while len(found()) < count and time.monotonic() < deadline:
        await asyncio.sleep(0.01)
    await asyncio.sleep(0.3)
    ticket = p.seen[0][1]["kv_transfer_params"][bodies.TICKET]
    assert len(ticket) == 32
    wanted = {"model": "m", "prompt": [0], "max_tokens": 1, "kv_transfer_params": {bodies.GIVES_UP: ticket}}
    assert all(body == wanted for body in found())
    return found()


@pytest.mark.parametrize("status", [400, 404, 500, 503])
def test_a_prompt_that_decode_refuses_is_given_up_once(status: int) -> None:
    async def test(client: aiohttp.ClientSession, p: FakeEngine, d: FakeEngine) -> None:
        headers = {"Authorization": "Bearer k", "X-Request-Id": "r1"}
        async with client.post("/v1/completions", json=BODY | {"min_tokens": 9}, headers=headers) as answer:
            assert answer.status == status
        assert len(await given_up(p)) == 1
        assert p.seen[-1][2]["authorization"] == "Bearer k"
        assert p.seen[-1][2].get("x-request-id") != "r1"

    with_proxy(good_prefill, lambda: FakeEngine({"error": {}}, status=status), test)


@pytest.mark.parametrize("stream", [False, True])
def test_a_prompt_that_decode_took_is_not_given_up(stream: bool) -> None:
    async def test(client: aiohttp.ClientSession, p: FakeEngine, d: FakeEngine) -> None:
        async with client.post("/v1/chat/completions", json=BODY | {"stream": stream}) as answer:
            assert answer.status == 200
            await answer.read()
        assert await given_up(p, 0) == []

    with_proxy(good_prefill, good_decode, test)


def test_a_prompt_whose_client_leaves_before_it_is_computed_is_given_up_by_its_ticket() -> None:
    async def test(client: aiohttp.ClientSession, p: FakeEngine, d: FakeEngine) -> None:
        headers = {"Authorization": "Bearer k", "X-Request-Id": "r1"}
        request = asyncio.create_task(client.post("/v1/completions", json=BODY, headers=headers))
        await p.started.wait()
        p.wait = False
        request.cancel()
        await p.cancelled.wait()
        assert len(await given_up(p)) == 1
        assert p.seen[-1][2]["authorization"] == "Bearer k"
        assert p.seen[-1][2].get("x-request-id") != "r1"
        assert not d.seen

    with_proxy(lambda: FakeEngine({}, wait=True), good_decode, test)


def test_a_prompt_whose_client_leaves_before_decode_answers_is_given_up() -> None:
    async def test(client: aiohttp.ClientSession, p: FakeEngine, d: FakeEngine) -> None:
        request = asyncio.create_task(client.post("/v1/completions", json=BODY))
        await d.started.wait()
        d.wait = False
        request.cancel()
        await d.cancelled.wait()
        assert len(await given_up(p)) == 1

    with_proxy(good_prefill, lambda: FakeEngine({}, wait=True), test)


@pytest.mark.parametrize("refuses", [False, True])
def test_with_one_decode_engine_down_another_one_decodes_or_gives_the_prompt_up(refuses: bool) -> None:
    async def run() -> None:
        p, d = good_prefill(), FakeEngine({"choices": []}, status=400 if refuses else 200)
        async with p.serve(), d.serve():
            listener = bind("127.0.0.1", 0)
            engines = [f"http://127.0.0.1:{reserve_ports(1)[0]}", d.url]
            proxy = ServerThread(listener, [p.url], engines[::-1] if refuses else engines)
            proxy.start()
            try:
                async with aiohttp.ClientSession(url_of(listener)) as client:
                    async with client.post("/v1/completions", json=BODY) as answer:
                        assert answer.status == d.status
                    assert len(await given_up(p, int(refuses))) == refuses
            finally:
                await asyncio.to_thread(proxy.stop)
                listener.close()

    asyncio.run(run())


def test_all_prompts_are_given_up_however_many_clients_leave_at_once() -> None:
    async def test(client: aiohttp.ClientSession, p: FakeEngine, d: FakeEngine) -> None:
        asked = [asyncio.create_task(client.post("/v1/completions", json=BODY)) for _ in range(90)]
        while len(p.seen) < len(asked):
            await asyncio.sleep(0.01)
        p.wait = False
        for each in asked:
            each.cancel()
        tickets = {body["kv_transfer_params"][bodies.TICKET] for _, body, _ in p.seen}
        deadline = time.monotonic() + 10
        while len(p.seen) < 2 * len(asked) and time.monotonic() < deadline:
            await asyncio.sleep(0.01)
        assert {body["kv_transfer_params"].get(bodies.GIVES_UP) for _, body, _ in p.seen[len(asked) :]} == tickets

    with_proxy(lambda: FakeEngine({}, wait=True), good_decode, test)


def test_a_prompt_that_prefill_did_not_keep_is_not_given_up() -> None:
    async def test(client: aiohttp.ClientSession, p: FakeEngine, d: FakeEngine) -> None:
        async with client.post("/v1/completions", json=BODY) as answer:
            assert answer.status == 400
        assert await given_up(p, 0) == []

    with_proxy(lambda: FakeEngine({"kv_transfer_params": None}), lambda: FakeEngine({}, status=400), test)


@pytest.mark.parametrize("given", ["x" * 257, "x" * 4000, "", None])
def test_a_request_id_that_is_too_long_for_engines_is_replaced(given: str | None) -> None:
    async def test(client: aiohttp.ClientSession, p: FakeEngine, d: FakeEngine) -> None:
        headers = {} if given is None else {"X-Request-Id": given}
        async with client.post("/v1/completions", json=BODY, headers=headers) as answer:
            assert answer.status == 200
        ids = {seen["x-request-id"] for _, _, seen in (*p.seen, *d.seen)}
        assert len(ids) == 1
        assert len(ids.pop()) == 32

    with_proxy(good_prefill, good_decode, test)


@pytest.mark.parametrize("answer", [{"kv_transfer_params": [1]}, {"kv_transfer_params": "x"}])
def test_prefill_params_that_are_no_object_are_502(answer: dict[str, Any]) -> None:
    async def test(client: aiohttp.ClientSession, p: FakeEngine, d: FakeEngine) -> None:
        async with client.post("/v1/completions", json=BODY) as got:
            assert got.status == 502
        assert not d.seen

    with_proxy(lambda: FakeEngine(answer), good_decode, test)
