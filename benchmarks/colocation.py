"""What a burst of prompts does to tokens of offloaded requests, and the controller that moves the shares.

    python benchmarks/colocation.py [--quick] [--json FILE]

Prefill engine and attention executor share the second core. Eight requests decode, all offloaded, and in the middle
of them prompts of 1024 tokens arrive at the prefill engine. The time between tokens without the burst, with it and the
executor at real-time priority, and with it and the executor at ordinary priority, in turns on the same engines. Then
the same with objectives: the executor begins with too small a share, and the controller is to move it.
"""

from __future__ import annotations

import asyncio
import random
import sys
import threading
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import aiohttp

sys.path.insert(0, str(Path(__file__).parent))
import fleet
import report

from vllm_adrenaline.system import priority
from vllm_adrenaline.workload.load import Request

SHARES = {"unloaded": 1.0, "burst, real-time": 1.0, "burst, ordinary": 0.5}
PROMPT_TOKENS, BURST = 1024, 12


def decoding(tokens: int, seed: int) -> list[Request]:
    """Return eight requests that decode together."""
    rng = random.Random(seed)
    return [Request(0.0, [rng.randrange(5, 2000) for _ in range(300)], tokens) for _ in range(8)]


async def burst(url: str, seed: int, count: int, gap: float) -> list[float]:
    """Let the prefill engine compute prompts of its own; return how long each took."""
    rng = random.Random(seed)

    async def one(session: aiohttp.ClientSession, number: int) -> float:
        await asyncio.sleep(gap * number)
        began = time.monotonic()
        body = {"model": "m", "prompt": [rng.randrange(5, 2000) for _ in range(PROMPT_TOKENS)], "max_tokens": 1}
        async with session.post(f"{url}/v1/completions", json=body) as response:
            await response.read()
        return time.monotonic() - began

    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=None)) as session:
        return list(await asyncio.gather(*(one(session, number) for number in range(count))))


def measure(engines: fleet.Fleet, share: float, has_burst: bool, tokens: int, seed: int) -> dict[str, Any]:
    """Decode with or without a burst; return the figures."""
    priority.take_share(engines.executor(), share)
    took: list[float] = []

    def send() -> None:
        time.sleep(2.5)  # until all of them decode
        took.extend(asyncio.run(burst(engines.prefill_url, seed, BURST, 0.1)))

    thread = threading.Thread(target=send)
    if has_burst:
        thread.start()
    figures = engines.run(decoding(tokens, seed), "1")
    if has_burst:
        thread.join()
        figures["prompt_s_p50"] = report.median(took)
    return figures


def controlled(args: Any, tpot_ms: float, seconds: float) -> list[tuple[float, float, float]]:
    """Serve decoding and prompts with objectives, beginning with too small a share for the executor.

    Returns: seconds, what the executor gets of its core, and p90 of ITL in ms, by the end of each round.
    """
    flags = ["--adrenaline-executor-share", "0.1", "--adrenaline-tpot-slo-ms", f"{tpot_ms:.1f}"]
    flags += ["--adrenaline-ttft-slo-ms", "20000"]
    seen: list[tuple[float, float, float]] = []
    with ExitStack() as stack:
        engines = fleet.Fleet(stack, 96, 48, flags, args.logs)
        began = time.monotonic()
        stop = threading.Event()

        def prompts() -> None:
            while not stop.is_set():
                asyncio.run(burst(engines.prefill_url, 1, 4, 0.5))

        thread = threading.Thread(target=prompts)
        thread.start()
        seed = 0
        while time.monotonic() - began < seconds:
            seed += 1
            figures = engines.run(decoding(150, seed), "1")
            share = engines.prefill.value("vllm:adrenaline_executor_share")
            seen.append((time.monotonic() - began, share, figures["itl_ms_p90"]))
            print(f"controller: {seen[-1][0]:.0f} s, share {share:.2f}, ITL p90 {seen[-1][2]:.1f} ms", file=sys.stderr)
        stop.set()
        thread.join()
    return seen


def main() -> None:
    parser = report.parser(__doc__.splitlines()[0], quick="one repeat: 4 minutes, for engines must start twice")
    parser.add_argument("--logs", type=Path, default=None, help="folder for the engines' logs")
    args = parser.parse_args()
    repeats, tokens = (1, 200) if args.quick else (4, 250)
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in SHARES}
    with ExitStack() as stack:
        engines = fleet.Fleet(stack, 96, 48, logs=args.logs)
        for repeat in range(repeats):
            for name, share in SHARES.items():
                figures = measure(engines, share, name != "unloaded", tokens, repeat)
                found[name].append(figures)
                print(f"{repeat} {name}: ITL p99 {figures['itl_ms_p99']:.1f} ms", file=sys.stderr)
    median = {
        name: {key: report.median([run[key] for run in runs]) for key in runs[0] if key != "answers"}
        for name, runs in found.items()
    }
    result = {}
    for name, figures in median.items():
        key = name.replace(", ", "_").replace("-", "_")
        for figure in ("tpot_ms_p50", "tpot_ms_p99", "itl_ms_p99"):
            result[f"{key}_{figure}"] = figures[figure]
            result[f"{key}_{figure}_over_unloaded"] = figures[figure] / median["unloaded"][figure]
    slo = 1.75 * median["unloaded"]["itl_ms_p50"]
    seen = controlled(args, slo, seconds=60 if args.quick else 120)
    shares = [share for _, share, _ in seen]
    result |= {"controller_first_share": shares[0], "controller_last_share": shares[-1]}
    result |= {
        "controller_tpot_slo_ms": slo,
        "controller_last_itl_ms_p90": seen[-1][2],
    }
    report.finish({**report.table(result), "controller": seen}, args.json)


if __name__ == "__main__":
    main()
