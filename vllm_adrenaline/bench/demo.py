"""`adrenaline demo`: the same requests on plain vLLM, on a cluster without offloading and on one with it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path

from vllm_adrenaline.bench import demo_load, demo_report
from vllm_adrenaline.errors import AdrenalineError
from vllm_adrenaline.launch import engine_command
from vllm_adrenaline.launch.cluster import Cluster
from vllm_adrenaline.launch.engine_metrics import EngineMetrics
from vllm_adrenaline.launch.supervisor import Supervisor, say
from vllm_adrenaline.system.ports import reserve_ports
from vllm_adrenaline.workload.tiny_model import make_model

# 48 KV blocks of 128 tokens for whoever decodes: fewer than all requests need at once.
DECODE_KV_BYTES = 48 * 2**19
PREFILL_KV_BYTES = 128 * 2**19
ENGINE_ARGS = ["--dtype", "float32", "--enforce-eager", "--max-model-len", "2048", "--served-model-name", "demo"]
MODEL_NAME = "demo"
ENGINE_ENV = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
# Compiles, once, what vLLM compiles at its first steps, and connects the engines.
WARM_UP = [demo_load.Work("In the morning the harbour was grey and quiet. " * 15, 8, chat) for chat in (False, True)]
CLUSTERS: tuple[tuple[str, float | None], ...] = (("adrenaline, ratio 0", 0.0), ("adrenaline, ratio 0.5", 0.5))


def _kv(size: int) -> list[str]:
    return ["--kv-cache-memory-bytes", str(size)]


def _measure(
    name: str, url: str, decode_url: str, requests: Sequence[demo_load.Work], check: Callable[[], None]
) -> demo_report.Result:
    metrics = EngineMetrics(decode_url)
    try:
        say(f"{name}: warming up")
        demo_load.send_all(url, MODEL_NAME, WARM_UP, metrics.usage, "warm-up")
        before = metrics.offloaded()
        say(f"{name}: sending {len(requests)} requests at once")
        measured = demo_load.send_all(url, MODEL_NAME, requests, metrics.usage, name)
    except demo_load.RequestFailed as error:
        # An engine that died is the better message, if that is why.
        time.sleep(1)
        check()
        raise AdrenalineError(f"{name}: {error}") from None
    return demo_report.Result(name, metrics.offloaded() - before, measured, metrics.blocks())


def _plain(model: Path, requests: Sequence[demo_load.Work]) -> demo_report.Result:
    name = "plain vLLM"
    say(f"{name}: starting one engine")
    (port,) = reserve_ports(1)
    spec = engine_command.vllm_server("plain", str(model), port, [*ENGINE_ARGS, *_kv(DECODE_KV_BYTES)], ENGINE_ENV)
    with Supervisor([spec]) as supervisor:
        result = _measure(name, spec.url, spec.url, requests, supervisor.check)
    return demo_report.Result(name, None, result.measured, result.blocks)


def _cluster(name: str, ratio: float | None, model: Path, requests: Sequence[demo_load.Work]) -> demo_report.Result:
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


def run(clusters: Sequence[tuple[str, float | None]] = CLUSTERS) -> int:
    """Run all systems one after another, print the table; return 0 if the tokens agree and some were offloaded."""
    say("making a small model with random weights (no download)")
    model = make_model()
    say(f"model: {model}")
    requests = demo_load.mixed_requests()
    results = [_plain(model, requests)]
    results += [_cluster(name, ratio, model, requests) for name, ratio in clusters]
    print(f"\n{demo_report.table(results)}\n", flush=True)
    found = demo_report.problems(results)
    for problem in found:
        say(f"NOT as it should be: {problem}")
    if not found:
        say("every token is the same as plain vLLM's")
    return 1 if found else 0
