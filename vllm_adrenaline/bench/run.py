"""The grid of `adrenaline bench`: every workload on every system of a model, in turns, repeat by repeat.

Each result is written to a file at once, so that a run that was stopped goes on where it was.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import msgspec

from vllm_adrenaline.bench import figures
from vllm_adrenaline.bench.conditions import Conditions
from vllm_adrenaline.bench.sampler import Sampler, cpu_seconds
from vllm_adrenaline.bench.systems import Budget, System, Systems, engines_of
from vllm_adrenaline.bench.workloads import (
    BLOCK,
    COMMON,
    GOODPUT,
    LOADS,
    MAX_LENGTH,
    MODELS,
    RAMP,
    RATES,
    VOCABULARY,
    at_rate,
    folder_of,
    seed_of,
)
from vllm_adrenaline.errors import AdrenalineError
from vllm_adrenaline.proxy.snapshot import Snapshot
from vllm_adrenaline.system.cores import physical_cores, split_cores
from vllm_adrenaline.workload import client
from vllm_adrenaline.workload.load import Load

MODEL_NAME = "m"
WARM_UP = LOADS["chat"]
MAX_ENGINES = 7
"""Engines that run at the same time. Each takes some 1.5 GiB, and while they start they share the cores."""
MOST_SEARCHED = len(COMMON) + (COMMON.step - 1).bit_length()
"""Rates that a search looks at, at most: all common ones, and those that it takes to halve what is between two."""
COUNTED = {
    "preemptions": "vllm:num_preemptions_total",
    "offloaded": "vllm:adrenaline_offloaded_requests_total",
    "exposed_wait_s": "vllm:adrenaline_exposed_wait_seconds_total",
    "local_attention_s": "vllm:adrenaline_local_attention_seconds_total",
    "remote_attention_s": "vllm:adrenaline_remote_attention_seconds_total",
    "remote_attention_tokens": "vllm:adrenaline_remote_attention_tokens_total",
}


class Run(msgspec.Struct, frozen=True):
    """The result of one workload, run once on one system.

    `figures` are by name. `tokens` are those of each answer, for comparing systems. `usage` is the share of KV blocks
    in use on both sides, one value a second. `placements` says how often the plugin decided what, and why.
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

    @property
    def has_goodput(self) -> bool:
        """Say whether enough requests met their objectives."""
        return self.figures["goodput_share"] >= GOODPUT


class Plan(msgspec.Struct, frozen=True):
    """What is to be run. Without `loads`, each model has its own."""

    models: list[str]
    loads: list[str]
    systems: list[str]
    repeats: int
    conditions: Conditions = Conditions()

    def wanted(self, model: str) -> Iterator[tuple[int, Load, str]]:
        """Yield (repeat, workload, system), systems in turns and every second time backwards.

        Systems of a group run together, and groups in turns, repeat by repeat.
        """
        names = [name for name in self.loads_of(model) if name != RAMP]
        for repeat in range(self.repeats):
            turn = 1 if repeat % 2 == 0 else -1
            for group in groups_of(self.systems)[::turn]:
                for name in names:
                    for system in group[::turn]:
                        yield repeat, LOADS[name], system

    @property
    def runs(self) -> int:
        """Return the number of runs. A ramp counts with the most that its search may take."""
        searched = sum(RAMP in self.loads_of(model) for model in self.models) * MOST_SEARCHED
        return sum(len(list(self.wanted(model))) for model in self.models) + searched * len(self.systems)

    def loads_of(self, model: str) -> Sequence[str]:
        """Return the workloads of a model."""
        return self.loads or MODELS[model].loads


def budget(model: str, conditions: Conditions) -> Budget:
    """Return what every system gets on this machine for a model."""
    size = MODELS[model]
    decode, prefill = split_cores(physical_cores())
    least = MAX_LENGTH // BLOCK + 1  # and vLLM's null block
    block = size.block_bytes(conditions.item_bytes)
    return Budget(size.decode_blocks * block, size.prefill_blocks * block, least * block, decode, prefill)


def run(plan: Plan, folder: Path, say: Callable[[str], None], logs: Path | None = None) -> list[Run]:
    """Run what `folder` does not hold yet, and return all results of the plan.

    Engines start only when something is missing, those of a group at once. Raises AdrenalineError when they do not
    start or answer badly, or when the folder has results under other conditions.
    """
    plan.conditions.keep(folder)
    progress = Progress(plan.runs, say)
    results: list[Run] = []
    for model in plan.models:
        bench = _Bench(plan, model, folder, progress, logs)
        try:
            bench.ceiling()
            results += [bench.once(repeat, load, name) for repeat, load, name in plan.wanted(model)]
            if RAMP in plan.loads_of(model):
                for group in groups_of(plan.systems):
                    results += in_turns([bench.ramp(name) for name in group])
        finally:
            bench.stop()
    return results


def groups_of(systems: Sequence[str]) -> list[list[str]]:
    """Return the systems in groups that run at the same time: as many as there is memory for their engines."""
    groups: list[list[str]] = []
    for name in systems:
        if not groups or engines_of([*groups[-1], name]) > MAX_ENGINES:
            groups.append([])
        groups[-1].append(name)
    return groups


def in_turns(searches: Sequence[Iterator[Run]]) -> Iterator[Run]:
    """Yield a run of each search in turn, until all have ended."""
    left = list(searches)
    while left:
        for search in list(left):
            if (found := next(search, None)) is None:
                left.remove(search)
            else:
                yield found


class Progress:
    """The progress of a grid: it says what was measured, and how many seconds the rest will take."""

    def __init__(self, runs: int, say: Callable[[str], None]) -> None:
        self._left, self._say = runs, say
        self._began, self._done = time.monotonic(), 0

    def leave_out_start(self) -> None:
        """Leave out the time that the first engines took to start: it says nothing of how long runs take."""
        if not self._done:
            self._began = time.monotonic()

    def skip(self) -> None:
        """Count a run whose result is known from before."""
        self._left -= 1

    def add(self, run: Run) -> None:
        """Count a run that is done, and say what was measured."""
        self._done, self._left = self._done + 1, self._left - 1
        seconds = (time.monotonic() - self._began) / self._done * max(self._left, 0)
        shown = f"{run.figures['output_tok_s']:.0f} tok/s, TPOT p50 {run.figures['tpot_ms_p50']:.1f} ms"
        self._say(f"{run.model}, {run.load}, repeat {run.repeat}, {run.system}: {shown}; some {seconds:.0f} s left")


class _Bench:
    """One model: measures what is not in `folder`, on engines that start with the first such run of their group."""

    def __init__(self, plan: Plan, model: str, folder: Path, progress: Progress, logs: Path | None) -> None:
        self._plan, self._model, self._folder = plan, model, folder
        self._progress, self._logs = progress, logs
        self._stack = ExitStack()
        self._systems: Systems | None = None

    def stop(self) -> None:
        """Stop the engines that run."""
        self._stack.close()
        self._systems = None

    def ceiling(self) -> None:
        """Measure the ceiling of bare operators in this model's shape, in its own process, before engines run.

        Raises AdrenalineError when that process fails.
        """
        file = ceiling_file(self._folder, self._model)
        if file.exists():
            return
        file.parent.mkdir(parents=True, exist_ok=True)
        rows, context = MODELS[self._model].saturated()
        command = [sys.executable, "-m", "vllm_adrenaline.bench.ceiling", self._model, str(rows), str(context)]
        command.append(self._plan.conditions.dtype)
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
        if done.returncode:
            raise AdrenalineError(f"the ceiling cannot be measured: {done.stderr[-2000:]}")
        file.write_text(done.stdout.strip().splitlines()[-1])

    def once(self, repeat: int, load: Load, name: str) -> Run:
        """Return the result of a run: from its file if there is one, else measured now."""
        file = _file(self._folder, self._model, repeat, load, name)
        if file.exists():
            self._progress.skip()
            return msgspec.json.decode(file.read_bytes(), type=Run)
        if self._systems is None or name not in self._systems.running:
            self.stop()
            self._systems = self._start(next(group for group in groups_of(self._plan.systems) if name in group))
            self._progress.leave_out_start()
        result = _once(self._systems.running[name], self._model, load, repeat, self._plan.conditions)
        file.write_bytes(msgspec.json.encode(result))
        self._progress.add(result)
        return result

    def ramp(self, name: str) -> Iterator[Run]:
        """Search the highest rate at which enough requests meet their objectives, and yield the runs that it takes.

        The rates of COMMON come first, until one is too high: at those all systems' latencies can be compared.
        """
        low, high = 0, len(RATES)
        common = iter(COMMON)
        while low < high:
            step = next((step for step in common if low <= step < high), (low + high) // 2)
            found = self.once(0, at_rate(RATES[step]), name)
            yield found
            low, high = (step + 1, high) if found.has_goodput else (low, step)

    def _start(self, names: Sequence[str]) -> Systems:
        args = [
            "--dtype",
            self._plan.conditions.dtype,
            "--enforce-eager",
            "--max-model-len",
            str(MAX_LENGTH),
            "--served-model-name",
            MODEL_NAME,
        ]
        conditions = self._plan.conditions
        path, kv = folder_of(MODELS[self._model]), budget(self._model, conditions)
        systems = Systems(self._stack, names, path, kv, args, conditions.flags, self._logs)
        for system in systems.running.values():
            client.send(system.url, MODEL_NAME, WARM_UP.requests(VOCABULARY, 99, count=4))
        return systems


def ceiling_file(folder: Path, model: str) -> Path:
    """Return where the ceiling of a model is kept."""
    return folder / "runs" / f"{model}-ceiling.json"


def _file(folder: Path, model: str, repeat: int, load: Load, system: str) -> Path:
    return folder / "runs" / f"{model}-{load.name}-{repeat}-{system}.json"


def _once(system: System, model: str, load: Load, repeat: int, conditions: Conditions) -> Run:
    count = conditions.count(load)
    requests = load.requests(VOCABULARY, seed_of(load, repeat), count)
    prompts = [len(request.prompt) for request in requests]
    first, last = next(iter(system.engines)), list(system.engines)[-1]
    before = {name: system.metrics(name).read() for name in system.engines}
    cpu = {name: cpu_seconds(pid) for name, pid in system.pids.items()}
    with Sampler(system.metrics(last), system.metrics(first)) as sampler:
        answers = client.send(system.url, MODEL_NAME, requests)
    found = figures.of(answers, sum(prompts))
    found["goodput_share"] = figures.goodput_share(answers, conditions.ttft_slo_ms, conditions.tpot_slo_ms)
    for side, name in {"prefill": first, "decode": last}.items():
        found[f"kv_{side}_used_share"] = sampler.mean(side)
        found[f"busy_{side}_share"] = (cpu_seconds(system.pids[name]) - cpu[name]) / found["seconds"]
    after = {name: system.metrics(name).read() for name in system.engines}
    for name, metric in COUNTED.items():
        found[name] = sum(after[engine].value(metric) - before[engine].value(metric) for engine in system.engines)
    attended = figures.attended_tokens(answers, prompts)
    remote, block = found["remote_attention_tokens"], MODELS[model].block_bytes(conditions.item_bytes)
    for side, tokens in {"prefill": remote, "decode": attended - remote}.items():
        found[f"attention_gb_s_{side}"] = tokens * block / BLOCK / found["seconds"] / 1e9
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
    """Return how often each decision was made between two snapshots, by "placement: reason"."""
    known = before.placements()
    grown = {each: count - known.get(each, 0.0) for each, count in after.placements().items()}
    return {f"{placement}: {reason}": count for (placement, reason), count in grown.items() if count}
