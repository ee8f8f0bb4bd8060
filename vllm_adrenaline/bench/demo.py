"""`adrenaline demo`: the same requests on plain vLLM, on a cluster without offloading and on one with it."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from vllm_adrenaline.bench import demo_report
from vllm_adrenaline.bench.sampler import Sampler
from vllm_adrenaline.errors import AdrenalineError
from vllm_adrenaline.launch import engine_command
from vllm_adrenaline.launch.cluster import Cluster
from vllm_adrenaline.launch.engine_metrics import EngineMetrics
from vllm_adrenaline.launch.supervisor import Supervisor
from vllm_adrenaline.system.ports import reserve_ports
from vllm_adrenaline.system.terminal import StatusLine, say
from vllm_adrenaline.workload import client
from vllm_adrenaline.workload.client import Answer
from vllm_adrenaline.workload.load import Request
from vllm_adrenaline.workload.text import words
from vllm_adrenaline.workload.tiny_model import make_model

# 48 KV blocks of 128 tokens for whoever decodes: fewer than all requests need at once.
SILENCE_S = 300.0
"""Seconds without a byte after which a system is given up. Nothing here may take so long."""
DECODE_KV_BYTES = 48 * 2**19
PREFILL_KV_BYTES = 128 * 2**19
MODEL_NAME = "demo"
ENGINE_ARGS = ["--dtype", "float32", "--enforce-eager", "--max-model-len", "2048", "--served-model-name", MODEL_NAME]
ENGINE_ENV = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
# Compiles, once, what vLLM compiles at its first steps, and connects the engines.
WARM_UP = [Request(0.0, "In the morning the harbour was grey and quiet. " * 15, 8, chat) for chat in (False, True)]
CLUSTERS: tuple[tuple[str, float | None], ...] = (("adrenaline, ratio 0", 0.0), ("adrenaline, ratio 0.5", 0.5))
COUNT_EVERY_S, SAMPLE_EVERY_S = 5.0, 0.1


def mixed_requests(count: int = 24, seed: int = 0) -> list[Request]:
    """Return requests of very different lengths, half of them chats, all due at once; the same ones in every run."""
    rng = random.Random(seed)
    text = words() * 2
    requests = []
    for number in range(count):
        # 3 to 330 words are about 5 to 600 tokens; squared, so that short prompts are as usual as they are in practice.
        length = 3 + int(327 * (number / (count - 1)) ** 2)
        start = rng.randrange(len(text) // 2)
        requests.append(Request(0.0, " ".join(text[start : start + length]), rng.randint(10, 150), number % 2 == 1))
    rng.shuffle(requests)
    return requests


def _send(url: str, requests: Sequence[Request], label: str) -> list[Answer]:
    """Send all requests at once, and count their tokens on a line that begins with `label`."""
    line, began, came = StatusLine(COUNT_EVERY_S), time.monotonic(), 0
    total = sum(request.tokens for request in requests)

    def count(tokens: int) -> None:
        nonlocal came
        came += tokens
        text = f"{label}: {came} of {total} tokens, {time.monotonic() - began:.0f} s"
        (line.keep if came >= total else line.show)(text)

    return client.send(url, MODEL_NAME, requests, count, SILENCE_S)


def _measure(
    name: str, url: str, decode_url: str, requests: Sequence[Request], check: Callable[[], None]
) -> demo_report.Result:
    metrics = EngineMetrics(decode_url)
    try:
        say(f"{name}: warming up")
        _send(url, WARM_UP, "warm-up")
        before = metrics.offloaded()
        say(f"{name}: sending {len(requests)} requests at once")
        with Sampler(metrics, every_s=SAMPLE_EVERY_S) as sampler:
            answers = _send(url, requests, name)
    except AdrenalineError as error:
        # An engine that died is the better message, if that is why.
        time.sleep(1)
        check()
        raise AdrenalineError(f"{name}: {error}") from None
    return demo_report.Result(name, metrics.offloaded() - before, answers, sampler.peak("decode"), metrics.blocks())


def _plain(model: Path, requests: Sequence[Request]) -> demo_report.Result:
    name = "plain vLLM"
    say(f"{name}: starting one engine")
    (port,) = reserve_ports(1)
    args = [*ENGINE_ARGS, *_kv(DECODE_KV_BYTES)]
    engine = engine_command.vllm_server("plain", str(model), port, args, ENGINE_ENV)
    with Supervisor([engine]) as supervisor:
        return _measure(name, engine.url, engine.url, requests, supervisor.check)


def _cluster(name: str, ratio: float | None, model: Path, requests: Sequence[Request]) -> demo_report.Result:
    say(f"{name}: starting a prefill and a decode engine")
    cluster = Cluster(
        model,
        offload_ratio=ratio,
        args=ENGINE_ARGS,
        prefill_args=_kv(PREFILL_KV_BYTES),
        decode_args=_kv(DECODE_KV_BYTES),
        env=ENGINE_ENV,
    )
    with cluster:
        return _measure(name, cluster.url, cluster.decode_url, requests, cluster.check)


def _kv(size: int) -> list[str]:
    return ["--kv-cache-memory-bytes", str(size)]


def run(clusters: Sequence[tuple[str, float | None]] = CLUSTERS) -> int:
    """Run all systems one after another and print the table.

    Returns 0 if all tokens are those of plain vLLM and the last system offloaded some requests, else 1.
    """
    say("making a small model with random weights (no download)")
    model = make_model()
    say(f"model: {model}")
    requests = mixed_requests()
    results = [_plain(model, requests)]
    results += [_cluster(name, ratio, model, requests) for name, ratio in clusters]
    print(f"\n{demo_report.table(results)}\n", flush=True)
    found = demo_report.problems(results)
    for problem in found:
        say(f"NOT as it should be: {problem}")
    if not found:
        say("every token is the same as plain vLLM's")
    return 1 if found else 0
