"""The grid: every workload on every system of a model, in turns, repeat by repeat; each result is kept at once."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import msgspec

from vllm_adrenaline.bench import client, figures
from vllm_adrenaline.bench.load import Load
from vllm_adrenaline.bench.sampler import Sampler, cpu_seconds
from vllm_adrenaline.bench.systems import BASELINE, Budget, System, Systems
from vllm_adrenaline.bench.workloads import BLOCK, LOADS, MODELS, TPOT_SLO_MS, TTFT_SLO_MS, VOCABULARY, folder_of
from vllm_adrenaline.engine_metrics import Snapshot
from vllm_adrenaline.launch.system import physical_cores, split_cores

MODEL_NAME = "m"
WARM_UP = LOADS["chat"]
COUNTED = {
    "preemptions": "vllm:num_preemptions_total",
    "offloaded": "vllm:adrenaline_offloaded_requests_total",
    "exposed_wait_s": "vllm:adrenaline_exposed_wait_seconds_total",
    "local_attention_s": "vllm:adrenaline_local_attention_seconds_total",
    "remote_attention_s": "vllm:adrenaline_remote_attention_seconds_total",
    "remote_attention_tokens": "vllm:adrenaline_remote_attention_tokens_total",
}
PLACEMENTS = "vllm:adrenaline_placements_total"


class Run(msgspec.Struct, frozen=True):
    """One workload once on one system. `figures`: by name; `tokens`: what came, for comparing systems; `usage`: used
    share of the KV blocks of both sides, one value a second; `placements`: what the plugin decided, and why, how often.
    """

    model: str
    load: str
    system: str
    repeat: int
    count: int
    figures: dict[str, float]
    tokens: list[list[int]]
    usage: dict[str, list[float]] = {}
    placements: dict[str, float] = {}


class Plan(msgspec.Struct, frozen=True):
    """What is to be run. `counts`: requests by workload, where fewer than all are wanted."""

    models: list[str]
    loads: list[str]
    systems: list[str]
    repeats: int
    counts: dict[str, int] = {}

    def wanted(self, model: str) -> Iterator[tuple[int, Load, str]]:
        """Yield (repeat, workload, system), systems in turns and every second time backwards."""
        for repeat in range(self.repeats):
            for name in self.loads:
                for system in self.systems if repeat % 2 == 0 else self.systems[::-1]:
                    yield repeat, LOADS[name], system

    @property
    def runs(self) -> int:
        """How many runs there are."""
        return len(self.models) * len(self.loads) * len(self.systems) * self.repeats


def budget(model: str) -> Budget:
    """Return what every system gets on this machine for a model."""
    size = MODELS[model]
    decode, prefill = split_cores(physical_cores())
    return Budget(size.decode_blocks * size.block_bytes, size.prefill_blocks * size.block_bytes, decode, prefill)


def run(plan: Plan, folder: Path, say: Callable[[str], None], logs: Path | None = None) -> list[Run]:
    """Run what `folder` does not hold yet; return all results of the plan."""
    results: list[Run] = []
    began, done = time.monotonic(), 0
    for model in plan.models:
        missing = [each for each in plan.wanted(model) if not _file(folder, model, *each).exists()]
        known = [each for each in plan.wanted(model) if each not in missing]
        results += [msgspec.json.decode(_file(folder, model, *each).read_bytes(), type=Run) for each in known]
        if not missing:
            continue
        args = ["--dtype", "bfloat16", "--enforce-eager", "--max-model-len", "1536", "--served-model-name", MODEL_NAME]
        with ExitStack() as stack:
            systems = Systems(stack, plan.systems, folder_of(MODELS[model]), budget(model), args, logs)
            for system in systems.running.values():
                client.send(system.url, MODEL_NAME, WARM_UP.requests(VOCABULARY, 99, count=4))
            for repeat, load, name in missing:
                count = plan.counts.get(load.name, load.count)
                result = _once(systems.running[name], model, load, repeat, count)
                results.append(result)
                file = _file(folder, model, repeat, load, name)
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(msgspec.json.encode(result))
                done += 1
                left = (time.monotonic() - began) / done * (plan.runs - len(known) - done)
                shown = f"{result.figures['output_tok_s']:.0f} tok/s, TPOT p50 {result.figures['tpot_ms_p50']:.1f} ms"
                say(f"{model}, {load.name}, repeat {repeat}, {name}: {shown}; some {left:.0f} s left")
    return results


def _file(folder: Path, model: str, repeat: int, load: Load, system: str) -> Path:
    return folder / "runs" / f"{model}-{load.name}-{repeat}-{system}.json"


def _once(system: System, model: str, load: Load, repeat: int, count: int) -> Run:
    requests = load.requests(VOCABULARY, repeat, count)
    first, last = next(iter(system.engines)), list(system.engines)[-1]
    before = {name: system.metrics(name).read() for name in system.engines}
    cpu = {name: cpu_seconds(pid) for name, pid in system.pids.items()}
    with Sampler(system.metrics(first), system.metrics(last)) as sampler:
        answers = client.send(system.url, MODEL_NAME, requests)
    found = figures.of(answers, sum(len(request.prompt) for request in requests))
    found["goodput_share"] = figures.goodput_share(answers, TTFT_SLO_MS, TPOT_SLO_MS)
    for side, name in {"prefill": first, "decode": last}.items():
        found[f"kv_{side}_used_share"] = sampler.mean(side)
        found[f"busy_{side}_share"] = (cpu_seconds(system.pids[name]) - cpu[name]) / found["seconds"]
    after = {name: system.metrics(name).read() for name in system.engines}
    for name, metric in COUNTED.items():
        found[name] = sum(after[engine].value(metric) - before[engine].value(metric) for engine in system.engines)
    attended = figures.attended_tokens(answers, [len(request.prompt) for request in requests])
    remote = found["remote_attention_tokens"]
    for side, tokens in {"prefill": remote, "decode": attended - remote}.items():
        found[f"attention_gb_s_{side}"] = tokens * MODELS[model].block_bytes / BLOCK / found["seconds"] / 1e9
    return Run(
        model,
        load.name,
        system.name,
        repeat,
        count,
        found,
        [answer.tokens for answer in answers],
        sampler.usage,
        _grown(before[last], after[last]),
    )


def _grown(before: Snapshot, after: Snapshot) -> dict[str, float]:
    """Return how often was decided what in between, as "placement: reason"."""
    counts = [
        {f"{labels['placement']}: {labels['reason']}": count for labels, count in snapshot.labelled(PLACEMENTS)}
        for snapshot in (before, after)
    ]
    grown = {name: count - counts[0].get(name, 0.0) for name, count in counts[1].items()}
    return {name: count for name, count in grown.items() if count}


def references(results: Sequence[Run]) -> dict[tuple[str, str, int], Run]:
    """Return the baseline's runs by (model, workload, repeat)."""
    return {(r.model, r.load, r.repeat): r for r in results if r.system == BASELINE}
