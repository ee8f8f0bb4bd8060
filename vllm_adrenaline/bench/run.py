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
from vllm_adrenaline.bench.workloads import LOADS, MODELS, TPOT_SLO_MS, TTFT_SLO_MS, VOCABULARY, folder_of
from vllm_adrenaline.launch.system import physical_cores, split_cores

MODEL_NAME = "m"
WARM_UP = LOADS["chat"]


class Run(msgspec.Struct, frozen=True):
    """One workload once on one system. `figures`: by name; `tokens`: what came, for comparing systems."""

    model: str
    load: str
    system: str
    repeat: int
    count: int
    figures: dict[str, float]
    tokens: list[list[int]]


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
        args = ["--dtype", "bfloat16", "--enforce-eager", "--max-model-len", "2048", "--served-model-name", MODEL_NAME]
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
    before = {name: system.metrics(name).all() for name in system.engines}
    cpu = {name: cpu_seconds(pid) for name, pid in system.pids.items()}
    with Sampler(system.engines) as sampler:
        answers = client.send(system.url, MODEL_NAME, requests)
    found = figures.of(answers, sum(len(request.prompt) for request in requests))
    found["goodput_share"] = figures.goodput_share(answers, TTFT_SLO_MS, TPOT_SLO_MS)
    first, last = next(iter(system.engines)), list(system.engines)[-1]
    found["kv_prefill_used_share"], found["kv_decode_used_share"] = sampler.mean(first), sampler.mean(last)
    sides = {"prefill": first, "decode": last}
    for side, name in sides.items():
        found[f"busy_{side}_share"] = (cpu_seconds(system.pids[name]) - cpu[name]) / found["seconds"]
    after = system.metrics(last).all()
    for name, metric in {
        "preemptions": "vllm:num_preemptions_total",
        "offloaded": "vllm:adrenaline_offloaded_requests_total",
        "exposed_wait_s": "vllm:adrenaline_exposed_wait_seconds_total",
    }.items():
        found[name] = after.get(metric, 0.0) - before[last].get(metric, 0.0)
    return Run(model, load.name, system.name, repeat, count, found, [answer.tokens for answer in answers])


def references(results: Sequence[Run]) -> dict[tuple[str, str, int], Run]:
    """Return the baseline's runs by (model, workload, repeat)."""
    return {(r.model, r.load, r.repeat): r for r in results if r.system == BASELINE}
