"""`LLM(...)` with offloading, without engines: what goes to which engine, and prompts that are computed first."""

from __future__ import annotations

import json
import multiprocessing
import os
import queue
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from vllm import SamplingParams
from vllm.v1.engine import EngineCoreRequest
from vllm.v1.engine.core_client import InprocClient, SyncMPClient

from vllm_adrenaline.compat import engine_core_client
from vllm_adrenaline.errors import AdrenalineError
from vllm_adrenaline.offline import start
from vllm_adrenaline.offline.arguments import flags_of, for_role, options_of
from vllm_adrenaline.offline.prompts import PARAMS, PromptsFirst, can_be_asked_for


def test_arguments_become_the_flags_of_a_server() -> None:
    arguments = {
        "max_model_len": 512,
        "dtype": "float32",
        "enforce_eager": True,
        "enable_prefix_caching": False,
        "hf_overrides": {"a": [1]},
        "allowed_media_domains": ["x", "y"],
        "quantization": None,
        "chat_template": "{{ it }}",
    }
    flags = "--max-model-len 512 --dtype float32 --enforce-eager --no-enable-prefix-caching --hf-overrides"
    assert flags_of(arguments) == [*flags.split(), '{"a": [1]}', "--allowed-media-domains", "x", "y"]


@pytest.mark.parametrize("value", [object(), print, {"a": object()}])
def test_what_cannot_be_written_on_a_command_line_is_refused_by_name(value: object) -> None:
    with pytest.raises(AdrenalineError, match="the argument logits_processors cannot be given to the prefill engine"):
        flags_of({"logits_processors": value})


def test_each_option_goes_to_the_role_that_has_it() -> None:
    common = {"dtype": "float32", "adrenaline_claim_seconds": 5.0, "adrenaline_offload_rule": "c1"}
    common["adrenaline_pool"] = "both"
    own = {"adrenaline_executor_threads": 1}
    assert options_of(for_role("prefill", common, own)) == {"claim_seconds": 5.0, "pool": "both", "executor_threads": 1}
    assert options_of(for_role("decode", common, None)) == {"offload_rule": "c1", "pool": "both"}
    assert for_role("decode", common, {"dtype": "bfloat16"})["dtype"] == "bfloat16"
    with pytest.raises(AdrenalineError, match="there is no option offload_ration"):
        for_role("decode", {"adrenaline_offload_ration": 1}, None)


def request(name: str, **changes: Any) -> EngineCoreRequest:
    sampling = changes.pop("sampling_params", None) or SamplingParams(max_tokens=7, extra_args={"mine": 1})
    fields = {"prompt_token_ids": [1, 2, 3], "mm_features": None, "pooling_params": None, "arrival_time": 0.0}
    fields |= {"lora_request": None, "cache_salt": None, "data_parallel_rank": None}
    return EngineCoreRequest(request_id=name, sampling_params=sampling, **fields | changes)


def test_only_prompts_of_plain_tokens_of_which_nothing_is_wanted_are_asked_for() -> None:
    assert can_be_asked_for(request("a"))
    for unfit in (
        {"sampling_params": SamplingParams(prompt_logprobs=0)},
        {"sampling_params": SamplingParams(extra_args={PARAMS: {}})},
        {"prompt_token_ids": None},
        {"mm_features": [object()]},
        {"lora_request": object()},
        {"prompt_embeds": object()},
    ):
        assert not can_be_asked_for(request("a", **unfit)), unfit


class Forwarded:
    """What the engine core would have got."""

    def __init__(self) -> None:
        self.queue: queue.Queue[EngineCoreRequest] = queue.Queue()

    def next(self) -> EngineCoreRequest:
        return self.queue.get(timeout=10)

    @property
    def is_empty(self) -> bool:
        return self.queue.empty()


class PrefillEngine(ThreadingHTTPServer):
    """A prefill engine's API. Answers wait while `gate` is not set."""

    def __init__(self) -> None:
        self.asked: list[dict[str, Any]] = []
        self.gate = threading.Event()
        self.gate.set()
        self.status = 200
        super().__init__(("127.0.0.1", 0), Completions)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Completions(BaseHTTPRequestHandler):
    server: PrefillEngine

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append(body)
        self.server.gate.wait(timeout=10)
        self.send_response(self.server.status)
        self.end_headers()
        self.wfile.write(json.dumps({PARAMS: {"of": body["prompt"]}}).encode())

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.fixture
def engine() -> Iterator[PrefillEngine]:
    with PrefillEngine() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def prompts(engine: PrefillEngine) -> Iterator[tuple[PromptsFirst, Forwarded]]:
    forwarded, made = Forwarded(), PromptsFirst(engine.url)
    made.forward = forwarded.queue.put
    yield made, forwarded
    made.stop()


Both = tuple[PromptsFirst, Forwarded]


def test_a_request_reaches_the_core_with_the_place_of_its_prompt(engine: PrefillEngine, prompts: Both) -> None:
    mine = SamplingParams(max_tokens=7, extra_args={"mine": 1})
    prompts[0].take(request("a", sampling_params=mine, cache_salt="salt"))
    got = prompts[1].next()
    assert got.request_id == "a"
    assert got.sampling_params.extra_args == {"mine": 1, PARAMS: {"of": [1, 2, 3]}}
    assert mine.extra_args == {"mine": 1}, "the caller may use them again"
    (asked,) = engine.asked
    assert asked["max_tokens"] == 1
    assert asked["cache_salt"] == "salt"
    assert asked[PARAMS]["do_remote_decode"] is True
    assert "adrenaline_stay" not in asked[PARAMS], "nobody would send the request back"


def test_a_prompt_that_is_not_computed_there_is_computed_here(engine: PrefillEngine, prompts: Both) -> None:
    engine.status = 503
    prompts[0].take(request("a"))
    assert PARAMS not in prompts[1].next().sampling_params.extra_args
    engine.status = 200
    prompts[0].take(request("b"))
    assert PARAMS in prompts[1].next().sampling_params.extra_args, "it is asked again"
    prompts[0].take(request("c", sampling_params=SamplingParams(prompt_logprobs=1)))
    assert prompts[1].next().request_id == "c"
    assert len(engine.asked) == 2


def test_a_prefill_engine_that_is_gone_costs_no_request() -> None:
    forwarded, prompts = Forwarded(), PromptsFirst("http://127.0.0.1:9")
    prompts.forward = forwarded.queue.put
    for name in "abc":
        prompts.take(request(name))
    assert sorted(forwarded.next().request_id for _ in "abc") == ["a", "b", "c"]
    prompts.stop()


def test_a_dropped_request_never_reaches_the_core_afterwards(engine: PrefillEngine, prompts: Both) -> None:
    engine.gate.clear()
    for name in "ab":
        prompts[0].take(request(name))
    assert _eventually(lambda: len(engine.asked) == 2)
    prompts[0].drop(["a", "unknown"])
    engine.gate.set()
    assert prompts[1].next().request_id == "b"
    assert prompts[1].is_empty


def test_the_end_leaves_no_thread(prompts: Both) -> None:
    prompts[0].take(request("a"))
    prompts[1].next()
    prompts[0].stop()
    prompts[0].stop()
    assert not prompts[0].is_alive()


class Client(SyncMPClient):  # type: ignore[misc]
    """vLLM's client without an engine core: it notes what it would send, and whether two threads do at once."""

    def __init__(self) -> None:
        self.sent: list[tuple[str, Any]] = []
        self.is_sending = self.collided = False

    def _send_input(self, kind: Any, what: Any) -> None:
        self.collided |= self.is_sending
        self.is_sending = True
        time.sleep(0.001)
        self.sent.append((kind.name, what))
        self.is_sending = False

    is_dp = False
    resources = SimpleNamespace(engine_dead=False)


def test_requests_are_diverted_and_the_socket_is_used_by_one_thread_at_a_time() -> None:
    client, taken, dropped = Client(), list[str](), list[str]()
    forward = engine_core_client.divert(client, lambda each: taken.append(each.request_id), dropped.extend)
    client.add_request(request("a"))
    assert (taken, client.sent) == (["a"], [])
    client.abort_requests([])
    client.abort_requests(["a"])
    assert (dropped, client.sent) == (["a"], [("ABORT", ["a"])])
    threads = [threading.Thread(target=lambda: [forward(request("b")) for _ in range(20)]) for _ in range(3)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert len(client.sent) == 61
    assert not client.collided
    with pytest.raises(AdrenalineError, match="VLLM_ENABLE_V1_MULTIPROCESSING"):
        engine_core_client.divert(InprocClient.__new__(InprocClient), taken.append, dropped.extend)


def test_the_environment_is_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(start.CORES_ENV, "3")
    monkeypatch.delenv(start.PEERS_START_TOO, raising=False)
    with start.environment("0-1", peers_start_too=True):
        assert (os.environ[start.CORES_ENV], os.environ[start.PEERS_START_TOO]) == ("0-1", "1")
    assert os.environ[start.CORES_ENV] == "3"
    assert start.PEERS_START_TOO not in os.environ


def test_when_the_prefill_engine_does_not_start_the_decode_engine_is_ended_and_the_reason_is_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(start, "WATCH_S", 0.01)

    class Supervisor:
        def check(self) -> None:
            raise AdrenalineError("the prefill engine ended with status 1")

    child = multiprocessing.get_context("spawn").Process(target=time.sleep, args=(60,))

    def begin() -> None:
        with start.ending_with(Supervisor()):  # type: ignore[arg-type]
            child.start()
            child.join()
            raise RuntimeError("Engine core initialization failed")

    with pytest.raises(AdrenalineError, match="the prefill engine ended"):
        begin()
    assert child.exitcode != 0


def _ignores_signals(folder: str) -> None:
    """An engine that is starting: it and its worker hear no signal."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    worker = subprocess.Popen(["sh", "-c", "trap '' TERM; while true; do sleep 0.1; done"])
    (Path(folder) / "worker").write_text(str(worker.pid))
    time.sleep(60)


def test_an_engine_that_hears_no_signal_is_ended_with_its_workers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(start, "PATIENCE_S", 0.5)
    child = multiprocessing.get_context("spawn").Process(target=_ignores_signals, args=(str(tmp_path),))
    noted = tmp_path / "worker"

    class Supervisor:
        def check(self) -> None:
            if noted.exists():
                raise AdrenalineError("the prefill engine ended")

    def begin() -> None:
        with start.ending_with(Supervisor()):  # type: ignore[arg-type]
            child.start()
            child.join(30)
            raise RuntimeError("Engine core initialization failed")

    with pytest.raises(AdrenalineError, match="the prefill engine ended"):
        begin()
    assert child.exitcode == -signal.SIGKILL
    worker = int(noted.read_text())
    assert _eventually(lambda: not Path(f"/proc/{worker}").exists() or "Z" in Path(f"/proc/{worker}/stat").read_text())


def _eventually(check: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + 10
    while not (holds := check()) and time.monotonic() < deadline:
        time.sleep(0.01)
    return holds
