"""One decode step of real engines at equal batch: all requests local, against half of them offloaded.

    python benchmarks/engine_step.py [--quick] [--json FILE]

A prefill engine on the second core, and two decode engines on the first, of which one works at a time: offload ratio 0
and 0.5. Requests of the same lengths go to both in turns. All prompts are computed first, so that the prefill engine is
idle; a step is taken from when all requests have their first token to when the first of them ends. Starting the engines
takes a minute or more.
"""

from __future__ import annotations

import asyncio
import random
import shutil
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import aiohttp

sys.path.insert(0, str(Path(__file__).parent))
import report

from vllm_adrenaline.compat.worker_cores import CORES_ENV
from vllm_adrenaline.launch import engine_command
from vllm_adrenaline.launch.engine_metrics import EngineMetrics
from vllm_adrenaline.launch.supervisor import Supervisor
from vllm_adrenaline.proxy import bodies
from vllm_adrenaline.proxy.apis import APIS
from vllm_adrenaline.system.folders import runtime_folder
from vllm_adrenaline.system.ports import reserve_ports
from vllm_adrenaline.workload import client
from vllm_adrenaline.workload.tiny_model import make_model

RATIOS = {"local": "0", "offloaded": "0.5"}
KINDS = ("local_attention", "remote_attention", "exposed_wait")


async def prefill(session: aiohttp.ClientSession, url: str, prompt: list[int], tokens: int) -> bodies.Body:
    """Compute one prompt; return the body that makes a decode engine go on with it."""
    body = {"model": "m", "prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True}
    path = "/v1/completions"
    async with session.post(url + path, json=bodies.for_prefill(APIS[path], body, "")) as response:
        params = bodies.params_of(await response.read())
    return bodies.for_decode(body, params) | {"stream": True, "return_token_ids": True}


async def decode(session: aiohttp.ClientSession, url: str, body: bodies.Body) -> list[float]:
    """Return when each token of one request came."""
    times: list[float] = []
    async for new in client.stream(session, f"{url}/v1/completions", body):
        times += [time.monotonic()] * len(new)
    if len(times) != body["max_tokens"]:
        raise SystemExit(f"{len(times)} of {body['max_tokens']} tokens came")
    return times


async def step_ms(prefill_url: str, decode_url: str, prompts: list[list[int]], tokens: int) -> float:
    """Compute all prompts, then decode them together; return the milliseconds of a step with all of them in it."""
    async with client.open_session() as session:
        ready = [await prefill(session, prefill_url, prompt, tokens) for prompt in prompts]
        answers = await asyncio.gather(*(decode(session, decode_url, body) for body in ready))
    begin, end = max(times[0] for times in answers), min(times[-1] for times in answers)
    inside = [[at for at in times if begin <= at <= end] for times in answers]
    return report.median([1000 * (times[-1] - times[0]) / (len(times) - 1) for times in inside])


def main() -> None:
    parser = report.parser(__doc__.splitlines()[0], quick="fewer repeats: 4 minutes, for engines must start")
    parser.add_argument("--rows", type=int, default=16, help="requests at once")
    parser.add_argument("--context", type=int, default=512, help="tokens of context in the middle of the run")
    parser.add_argument("--layers", type=int, default=12)
    args = parser.parse_args()
    repeats, tokens = (3, 60) if args.quick else (7, 100)
    model = make_model(layers=args.layers, hidden=1024, heads=16, kv_heads=16, vocab=2048, max_position=2048)
    random.seed(1)
    length = args.context - tokens // 2
    folder = runtime_folder()
    common = ["--dtype", "bfloat16", "--enforce-eager", "--max-model-len", "2048", "--served-model-name", "m"]
    common += ["--kv-cache-memory-bytes", str(2 << 30), "--no-enable-prefix-caching"]
    ports = iter(reserve_ports(1 + len(RATIOS)))
    specs = []
    for name, ratio in [("prefill", "0"), *RATIOS.items()]:
        role = "prefill" if name == "prefill" else "decode"
        env = {CORES_ENV: "1" if role == "prefill" else "0", "HF_HUB_OFFLINE": "1"}
        flags = engine_command.adrenaline_args(folder, float(ratio))[role]
        flags += ["--adrenaline-lease-seconds", "600"] if role == "prefill" else []
        specs.append(engine_command.vllm_server(name, str(model), next(ports), [*flags, *common], env))
    with ExitStack() as stack:
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        stack.enter_context(Supervisor(specs))
        urls = {spec.name: spec.url for spec in specs}
        metrics = EngineMetrics(urls["offloaded"])
        found: dict[str, list[float]] = {name: [] for name in RATIOS}
        for repeat in range(repeats + 1):
            for name in RATIOS:
                prompts = [[random.randrange(5, 2000) for _ in range(length)] for _ in range(args.rows)]
                took = asyncio.run(step_ms(urls["prefill"], urls[name], prompts, tokens))
                print(f"repeat {repeat} {name}: {took:.1f} ms a step", file=sys.stderr)
                if repeat:
                    found[name].append(took)
            if not repeat:  # the first compiles and touches the memory
                before = {kind: metrics.value(f"vllm:adrenaline_{kind}_seconds_total") for kind in KINDS}
        spent = {kind: metrics.value(f"vllm:adrenaline_{kind}_seconds_total") - before[kind] for kind in KINDS}
    steps = repeats * tokens
    result = {
        "step_local_ms": report.median(found["local"]),
        "step_offloaded_ms": report.median(found["offloaded"]),
        **{f"{kind}_ms": 1000 * spent[kind] / steps for kind in KINDS},
        "rows_count": args.rows,
        "context_tokens": args.context,
    }
    result["exposed_wait_share"] = result["exposed_wait_ms"] / result["step_offloaded_ms"]
    bound = result["step_local_ms"] - result["local_attention_ms"]
    result |= {"local_less_half_attention_ms": bound, "offloaded_over_bound_ratio": result["step_offloaded_ms"] / bound}
    report.finish(report.table(result), args.json)


if __name__ == "__main__":
    main()
