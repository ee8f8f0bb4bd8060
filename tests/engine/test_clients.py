"""The clients that people have, in front of `adrenaline up`: what they get is plain vLLM's, and it was offloaded.

The packages openai and anthropic, and `vllm bench serve`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import anthropic
import openai
import pytest
from tokenizers import Tokenizer

from tests.engine.conftest import Engine, Plain, kv_bytes, run
from vllm_adrenaline.launch.cluster import Cluster
from vllm_adrenaline.proxy.limits import API_KEY_ENV

pytestmark = pytest.mark.extended

KEY = "a-key"
TOKENS = 24
MESSAGES: list[Any] = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Tell me of the sea. " * 9},
]
PROMPT = "Once upon a time there was " * 12
GREEDY = {"extra_body": {"temperature": 0}}  # anthropic 2.14 has no argument for it
ANSWER = {
    "type": "object",
    "properties": {"ok": {"type": "boolean"}},
    "required": ["ok"],
    "additionalProperties": False,
}
TOOL: Any = {
    "type": "function",
    "function": {"name": "say", "description": "Say it.", "parameters": ANSWER, "strict": True},
}
# Of random weights every token must be forced, also that the object ends.
FLAGS = ["--enable-auto-tool-choice", "--tool-call-parser", "hermes"]
FLAGS += ["--structured-outputs-config", '{"backend": "xgrammar", "disable_any_whitespace": true}']


@pytest.fixture(scope="module")
def cluster(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """What `adrenaline up` runs, with a key. All that can be is offloaded."""
    args = ["--served-model-name", "m", "--dtype", "float32", "--enforce-eager", "--max-model-len", "1024", *FLAGS]
    args += ["--kv-cache-memory-bytes", kv_bytes(200), "--max-num-seqs", "64"]
    os.environ[API_KEY_ENV] = KEY  # for what reads the engines' metrics
    try:
        with Cluster(model, offload_ratio=1, args=args, logs=tmp_path_factory.mktemp("up"), api_key=KEY) as started:
            yield started
    finally:
        del os.environ[API_KEY_ENV]


@pytest.fixture
def offloaded(cluster: Cluster) -> Iterator[Callable[[], float]]:
    """How many requests were offloaded in this test so far; at its end there must be one at least."""
    count = Engine(cluster.decode_url, cluster.processes["decode"].pid).counting()
    yield lambda: count["offloaded_requests"]
    assert count["offloaded_requests"] >= 1
    assert count["refused_params"] == 0


def of_openai(cluster: Cluster) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{cluster.url}/v1", api_key=KEY, max_retries=0)


def of_anthropic(cluster: Cluster) -> anthropic.Anthropic:
    return anthropic.Anthropic(base_url=cluster.url, api_key=KEY, max_retries=0)


@pytest.fixture
def plain_openai(plain: Plain) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{plain.engine.url}/v1", api_key="none", max_retries=0)


@pytest.fixture
def plain_anthropic(plain: Plain) -> anthropic.Anthropic:
    return anthropic.Anthropic(base_url=plain.engine.url, api_key="none", max_retries=0)


# openai


def test_completions_and_chat(cluster: Cluster, plain_openai: openai.OpenAI, offloaded: Callable[[], float]) -> None:
    def texts(client: openai.OpenAI) -> list[str | None]:
        completion = client.completions.create(model="m", prompt=PROMPT, max_tokens=TOKENS, temperature=0)
        chat = client.chat.completions.create(model="m", messages=MESSAGES, max_tokens=TOKENS, temperature=0)
        return [completion.choices[0].text, chat.choices[0].message.content]

    assert texts(of_openai(cluster)) == texts(plain_openai)
    assert offloaded() == 2


def test_streams_of_many_async_clients_with_usage_and_logprobs(
    cluster: Cluster, plain_openai: openai.OpenAI, offloaded: Callable[[], float]
) -> None:
    async def stream(client: openai.AsyncOpenAI, number: int) -> tuple[str, int, int, int]:
        text, chunks, logprobs = "", 0, 0
        messages = [*MESSAGES, {"role": "user", "content": f"And of lake {number}."}]
        async for chunk in await client.chat.completions.create(
            model="m",
            messages=messages,
            max_completion_tokens=TOKENS,
            temperature=0,
            logprobs=True,
            top_logprobs=2,
            stream=True,
            stream_options={"include_usage": True},
        ):
            chunks += 1
            for choice in chunk.choices:
                text += choice.delta.content or ""
                logprobs += len(choice.logprobs.content or []) if choice.logprobs else 0
            usage = chunk.usage
        assert usage is not None, "it is in the last one"
        return text, chunks, logprobs, usage.completion_tokens

    async def all_streams(url: str, key: str) -> list[tuple[str, int, int, int]]:
        import asyncio

        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0) as client:
            return await asyncio.gather(*(stream(client, number) for number in range(8)))

    got, wanted = run(all_streams(cluster.url, KEY)), run(all_streams(str(plain_openai.base_url)[:-4], "none"))
    assert [(text, logprobs, usage) for text, _, logprobs, usage in got] == [(t, n, u) for t, _, n, u in wanted]
    assert all(chunks > 3 for _, chunks, *_ in got), "tokens come as they are made"
    assert offloaded() == 8


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("choice", [{"type": "function", "function": {"name": "say"}}, "required"], ids=str)
def test_tools(cluster: Cluster, model: Path, offloaded: Callable[[], float], stream: bool, choice: Any) -> None:
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    asked: Any = {"model": "m", "messages": MESSAGES, "tools": [TOOL], "tool_choice": choice, "max_tokens": 120}
    # The grammar of a call allows blanks, and that of several calls a comma after each, without end. Random weights
    # like them. Where there must be a comma, nothing else is allowed.
    words = {token: tokenizer.decode([token]) for token in range(tokenizer.get_vocab_size())}
    endless = [token for token, word in words.items() if not word.strip() or "," in word]
    asked |= {"temperature": 0, "logit_bias": {str(token): -100 for token in endless}}
    create = of_openai(cluster).chat.completions.create
    calls: dict[int, list[str]] = {}  # name and arguments
    if stream:
        for chunk in create(**asked, stream=True):
            for delta in chunk.choices[0].delta.tool_calls or []:
                name, arguments = calls.setdefault(delta.index, ["", ""])
                if delta.function:
                    calls[delta.index] = [delta.function.name or name, arguments + (delta.function.arguments or "")]
    else:
        made = create(**asked).choices[0].message.tool_calls or []
        calls = {index: [call.function.name, call.function.arguments] for index, call in enumerate(made)}
    assert calls
    for name, arguments in calls.values():
        assert name == "say"
        assert isinstance(json.loads(arguments)["ok"], bool)


def test_structured_outputs(cluster: Cluster, offloaded: Callable[[], float]) -> None:
    schema: Any = {"type": "json_schema", "json_schema": {"name": "answer", "schema": ANSWER, "strict": True}}
    answer = of_openai(cluster).chat.completions.create(
        model="m", messages=MESSAGES, response_format=schema, max_tokens=60
    )
    assert isinstance(json.loads(answer.choices[0].message.content or "")["ok"], bool)


def test_responses(cluster: Cluster, plain_openai: openai.OpenAI, offloaded: Callable[[], float]) -> None:
    asked: Any = {"model": "m", "input": PROMPT, "instructions": "Be brief.", "temperature": 0}
    asked["max_output_tokens"] = TOKENS

    def texts(client: openai.OpenAI) -> list[str]:
        whole = client.responses.create(**asked)
        assert whole.usage is not None
        assert whole.usage.output_tokens == TOKENS
        assert "kv_transfer_params" not in (whole.model_extra or {}) or whole.model_extra["kv_transfer_params"] is None
        streamed = ""
        kinds = set()
        for event in client.responses.create(**asked, stream=True):
            kinds.add(event.type)
            streamed += event.delta if event.type == "response.output_text.delta" else ""
        assert {"response.created", "response.output_text.done"} <= kinds
        return [whole.output_text, streamed]

    got = texts(of_openai(cluster))
    assert got == texts(plain_openai)
    assert got[0] == got[1] != ""
    assert offloaded() == 2


def test_responses_of_a_schema(cluster: Cluster, offloaded: Callable[[], float]) -> None:
    form: Any = {"format": {"type": "json_schema", "name": "answer", "schema": ANSWER, "strict": True}}
    answer = of_openai(cluster).responses.create(model="m", input=PROMPT, text=form, max_output_tokens=60)
    assert isinstance(json.loads(answer.output_text)["ok"], bool)


def test_errors_are_the_exceptions_of_the_package(cluster: Cluster) -> None:
    client = of_openai(cluster)
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="other", prompt="x")
    with pytest.raises(openai.BadRequestError, match="maximum"):
        client.completions.create(model="m", prompt=[1] * 2000)
    with pytest.raises(openai.BadRequestError, match="kv_transfer_params"):
        client.completions.create(model="m", prompt="x", extra_body={"kv_transfer_params": {}})
    for other in (client.with_options(api_key="wrong"),):
        with pytest.raises(openai.AuthenticationError):
            other.models.list()
    assert [each.id for each in client.models.list()] == ["m"]


# anthropic


def test_messages(cluster: Cluster, plain_anthropic: anthropic.Anthropic, offloaded: Callable[[], float]) -> None:
    asked: Any = {"model": "m", "system": "Be brief.", "messages": MESSAGES[1:], "max_tokens": TOKENS, **GREEDY}

    def texts(client: anthropic.Anthropic) -> list[str]:
        whole = client.messages.create(**asked)
        with client.messages.stream(**asked) as stream:
            streamed = "".join(stream.text_stream)
        assert whole.stop_reason == "max_tokens"
        assert whole.usage.output_tokens == TOKENS
        counted = client.messages.count_tokens(**{name: asked[name] for name in ("model", "system", "messages")})
        return [whole.content[0].text, streamed, str(counted.input_tokens)]  # type: ignore[union-attr]

    got = texts(of_anthropic(cluster))
    assert got == texts(plain_anthropic)
    assert got[0] == got[1] != ""
    assert offloaded() == 2


def test_messages_with_stop_sequences(
    cluster: Cluster, plain_anthropic: anthropic.Anthropic, offloaded: Callable[[], float]
) -> None:
    asked: Any = {"model": "m", "messages": MESSAGES[1:], "max_tokens": TOKENS, **GREEDY}
    first = plain_anthropic.messages.create(**asked).content[0].text  # type: ignore[union-attr]
    for stop in (first[0], first[8:10]):
        got, wanted = (
            client.messages.create(**asked, stop_sequences=[stop])
            for client in (of_anthropic(cluster), plain_anthropic)
        )
        assert (got.content, got.stop_reason) == (wanted.content, wanted.stop_reason)
        assert got.stop_reason == "stop_sequence"


def test_errors_are_the_exceptions_of_anthropics_package_too(cluster: Cluster) -> None:
    client = of_anthropic(cluster)
    asked: Any = {"messages": MESSAGES[1:], "max_tokens": TOKENS}
    with pytest.raises(anthropic.NotFoundError):
        client.messages.create(model="other", **asked)
    with pytest.raises(anthropic.AuthenticationError):
        client.with_options(api_key="wrong").messages.create(model="m", **asked)
    with pytest.raises(anthropic.BadRequestError, match="kv_transfer_params"):
        client.messages.create(model="m", **asked, extra_body={"kv_transfer_params": {}})


# vLLM's own client


@pytest.mark.parametrize(
    ("backend", "endpoint"), [("openai", "/v1/completions"), ("openai-chat", "/v1/chat/completions")]
)
def test_vllm_bench_serve(
    cluster: Cluster, model: Path, tmp_path: Path, offloaded: Callable[[], float], backend: str, endpoint: str
) -> None:
    prompts = 20
    command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "bench", "serve", "--backend", backend]
    command += ["--base-url", cluster.url, "--endpoint", endpoint, "--model", "m", "--tokenizer", str(model)]
    command += ["--dataset-name", "random", "--random-input-len", "100", "--random-output-len", "16", "--ignore-eos"]
    command += ["--num-prompts", str(prompts), "--request-rate", "10", "--save-result", "--result-dir", str(tmp_path)]
    env = {**os.environ, "OPENAI_API_KEY": KEY, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    (file,) = tmp_path.iterdir()
    result = json.loads(file.read_text())
    assert (result["completed"], result["total_output_tokens"]) == (prompts, 16 * prompts)
    assert result["median_ttft_ms"] > 0
    assert offloaded() == prompts
