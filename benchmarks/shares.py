"""The controller of shares on one device: a load that turns from long prompts to long answers and back.

    python benchmarks/shares.py [--quick] [--json FILE] [--picture FILE] [--ttft MS] [--tpot MS]

`adrenaline up --one-device` on all cores, over one KV cache. Once with objectives, so that the controller moves the
shares of prefill and decode; and with fixed splits, for which this script gives the prefill workers the niceness that
the controller would give them. What counts is the share of requests that meet both objectives, over the whole run and
by phase, and the longest gap between two tokens in the seconds after the shares changed.
"""

from __future__ import annotations

import itertools
import random
import sys
import threading
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
import report

from vllm_adrenaline.bench.conditions import ITEM_BYTES, default_dtype
from vllm_adrenaline.bench.figures import tpot_ms, ttft_ms
from vllm_adrenaline.bench.workloads import BLOCK, MAX_LENGTH, MODELS, VOCABULARY, folder_of
from vllm_adrenaline.launch.cluster import Cluster
from vllm_adrenaline.launch.engine_metrics import EngineMetrics
from vllm_adrenaline.launch.process import group_members
from vllm_adrenaline.system import priority
from vllm_adrenaline.workload import client
from vllm_adrenaline.workload.load import Request

FIXED = (0.2, 0.35, 0.5, 0.65, 0.8)
"""Parts of the device that decode gets in runs with a fixed split."""
PHASES = {"long prompts": (0.25, 512, 24), "long answers": (0.5, 96, 128), "long prompts again": (0.25, 512, 24)}
"""Requests a second, tokens of a prompt, tokens of an answer."""
AFTER_S = 2.0
"""A token that comes so soon after a change of the shares counts as being at that change."""


def requests(seconds: float, seed: int) -> list[tuple[str, Request]]:
    """Return the requests with the phase they belong to. Times between them are exponential."""
    rng, found, begin = random.Random(seed), [], 0.0
    for phase, (rate, prompt, output) in PHASES.items():
        at = begin
        while (at := at + rng.expovariate(rate)) < begin + seconds:
            tokens = [rng.randrange(5, VOCABULARY) for _ in range(prompt)]
            found.append((phase, Request(at, tokens, output)))
        begin += seconds
    return found


class Watch:
    """Reads the shares in force once a second, on a thread of its own: (seconds, prefill's, decode's)."""

    def __init__(self, url: str) -> None:
        self.seen: list[tuple[float, float, float]] = []  # from when the first shares are in force
        self._metrics, self._stop, self._began = EngineMetrics(url), threading.Event(), time.monotonic()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def _run(self) -> None:
        while not self._stop.wait(1.0):
            now = self._metrics.read()
            x, y = (now.value(f"vllm:adrenaline_{phase}_share") for phase in ("prefill", "decode"))
            if x:
                self.seen.append((time.monotonic() - self._began, x, y))

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    @property
    def changes(self) -> list[float]:
        """When the shares changed."""
        return [b[0] for a, b in itertools.pairwise(self.seen) if a[1:] != b[1:]]


def measure(cluster: Cluster, seconds: float, ttft: float, tpot: float, seed: int) -> dict[str, Any]:
    """Send the load; return the figures."""
    wanted = requests(seconds, seed)
    with Watch(cluster.prefill_url) as watch:
        answers = client.send(cluster.url, "m", [request for _, request in wanted])
    met = [ttft_ms(answer) <= ttft and tpot_ms(answer) <= tpot for answer in answers]
    result: dict[str, Any] = {"met": sum(met) / len(met), "requests": len(met)}
    for phase in PHASES:
        mine = [(m, a) for (name, _), m, a in zip(wanted, met, answers, strict=True) if name == phase]
        result[f"met, {phase}"] = sum(m for m, _ in mine) / len(mine)
        result[f"ttft p90, {phase}"] = sorted(ttft_ms(a) for _, a in mine)[int(0.9 * (len(mine) - 1))]
        result[f"tpot p90, {phase}"] = sorted(tpot_ms(a) for _, a in mine)[int(0.9 * (len(mine) - 1))]
    gaps = [(e, 1000 * (e - b)) for a in answers for b, e in itertools.pairwise(a.times)]
    result["longest gap"] = max(gap for _, gap in gaps)
    near = [gap for end, gap in gaps if any(-1 <= end - change <= AFTER_S for change in watch.changes)]
    result["longest gap at a change"] = max(near, default=0.0)
    result["changes"] = len(watch.changes)
    result["shares"] = watch.seen
    return result


def prefill_workers(cluster: Cluster) -> list[int]:
    """Return the prefill engine's workers: the processes in its group that are called so."""
    group = group_members(cluster.processes["prefill"].pid)
    return [pid for pid in group if "Worker" in Path(f"/proc/{pid}/comm").read_text()]


def picture(runs: dict[str, dict[str, Any]], seconds: float) -> str:
    """Return an SVG: prefill's and decode's share over time, as the controller moved them, and the phases."""
    width, height, left, bottom = 760, 300, 50, 50
    shares = runs["controller"]["shares"]
    end = max(len(PHASES) * seconds, shares[-1][0])

    def at(second: float, share: float) -> str:
        return f"{left + second / end * (width - left - 20):.1f},{height - bottom - share * (height - bottom - 40):.1f}"

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" font-family="sans-serif" '
        f'font-size="12"><rect width="{width}" height="{height}" fill="white"/>'
        f'<text x="{left}" y="18" font-size="14">Shares of one device while the load turns</text>'
    ]
    for number, phase in enumerate(PHASES):
        x, y = at(number * seconds, 1.0).split(",")
        parts.append(f'<line x1="{x}" x2="{x}" y1="{y}" y2="{height - bottom}" stroke="#dadce0"/>')
        parts.append(f'<text x="{float(x) + 4:.1f}" y="{height - 30}">{phase}</text>')
    for column, color, name in ((1, "#1a73e8", "prefill may use"), (2, "#d93025", "decode may use")):
        points = " ".join(at(sample[0], sample[column]) for sample in shares)
        parts.append(f'<polyline points="{points}" fill="none" stroke="{color}" stroke-width="2"/>')
        parts.append(f'<text x="{left + 150 * column}" y="34" fill="{color}">{name}</text>')
    for share in (0.0, 0.5, 1.0):
        parts.append(f'<text x="8" y="{float(at(0, share).split(",")[1]) + 4:.1f}">{share:.0%}</text>')
    parts.append(f'<text x="{left}" y="{height - 10}">0 to {end:.0f} seconds</text></svg>')
    return "\n".join(parts) + "\n"


def main() -> None:
    parser = report.parser(__doc__.splitlines()[0], "three minutes a run and two fixed splits, instead of six and five")
    parser.add_argument("--picture", type=Path, metavar="FILE", help="draw the shares over time there, as SVG")
    parser.add_argument("--ttft", type=float, default=5000, help="objective for the time to first token, milliseconds")
    parser.add_argument("--tpot", type=float, default=90, help="objective for the time per output token, milliseconds")
    parser.add_argument("--seconds", type=float, help="length of a phase (default: 60 with --quick, else 120)")
    args = parser.parse_args()
    seconds = args.seconds or (60 if args.quick else 120)
    fixed = FIXED[1::2] if args.quick else FIXED
    size, dtype = MODELS["mha"], default_dtype()
    least = MAX_LENGTH // BLOCK + 1  # the decode engine has memory for one request of its own
    memory = {
        role: ["--kv-cache-memory-bytes", str(blocks * size.block_bytes(ITEM_BYTES[dtype]))]
        for role, blocks in {"prefill": 96 - least, "decode": least}.items()
    }
    objectives = ["--adrenaline-ttft-slo-ms", f"{args.ttft:g}", "--adrenaline-tpot-slo-ms", f"{args.tpot:g}"]
    flags = ["--dtype", dtype, "--served-model-name", "m", "--enforce-eager", "--max-num-batched-tokens", "2048"]
    runs: dict[str, dict[str, Any]] = {}
    for name, more in {"controller": objectives, "fixed": []}.items():
        with ExitStack() as stack:
            cluster = stack.enter_context(
                Cluster(
                    folder_of(size),
                    one_device=True,
                    args=flags,
                    prefill_args=[*memory["prefill"], *more],
                    decode_args=memory["decode"],
                )
            )
            client.send(cluster.url, "m", [Request(0.0, [7] * 300, 8) for _ in range(2)])  # warm
            if name == "controller":
                runs[name] = measure(cluster, seconds, args.ttft, args.tpot, seed=1)
                continue
            for part in fixed:
                for pid in prefill_workers(cluster):
                    niceness = priority.niceness_of(part)
                    assert niceness is not None
                    priority.set_niceness(pid, min(19, max(-20, priority.PROMPT_NICENESS - niceness)))
                runs[f"fixed {part:g}"] = measure(cluster, seconds, args.ttft, args.tpot, seed=1)
    for name, figures in runs.items():
        print(f"\n{name}")
        report.table({key: value for key, value in figures.items() if key != "shares"})
    if args.picture is not None:
        args.picture.write_text(picture(runs, seconds))
    report.finish(
        {"runs": {name: {k: v for k, v in r.items() if k != "shares"} for name, r in runs.items()}}, args.json
    )


if __name__ == "__main__":
    main()
