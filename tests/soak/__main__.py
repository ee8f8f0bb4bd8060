"""A soak: engines serve mixed traffic while faults come at random, and nothing may be wrong, lost or grow.

    python -m tests.soak [--minutes 60] [--seed N] [--out FOLDER]

One prefill and two decode engines with a tiny model, behind a proxy, all started again when they end. Every answer is
compared with plain vLLM's. Engines are killed in the first third only, so that each has one long life. Whether
something grows is seen in the last third. Writes report.json and samples.csv. Exit code 1: something was wrong.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import random
import shutil
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from tests.engine.conftest import BLOCK, Engine, Wanted, eventually, executors_of, fleet, workload
from tests.soak import faults
from tests.soak.samples import Samples, lasting
from tests.soak.traffic import Traffic
from vllm_adrenaline.errors import AdrenalineError
from vllm_adrenaline.launch import engine_command
from vllm_adrenaline.launch.recovery import Recovery
from vllm_adrenaline.launch.signals import Stopped, ending_signals_raise
from vllm_adrenaline.launch.supervisor import Supervisor, is_ready
from vllm_adrenaline.proxy.limits import Limits
from vllm_adrenaline.proxy.server import bind
from vllm_adrenaline.system.folders import runtime_folder
from vllm_adrenaline.system.ports import reserve_ports
from vllm_adrenaline.workload.tiny_model import make_model

ENGINES = {
    "prefill": Wanted("prefill", 300, ["--adrenaline-lease-seconds", "10"]),
    "decode": Wanted("decode", 300, ratio=0.5),
    "second": Wanted("decode", 60, ratio=0.5),
}
COMMON = ["--served-model-name", "m", "--enforce-eager", "--max-model-len", "1024", "--dtype", "float32"]
ONEDNN = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "64"}
"""Else engines grow with each new length of a prompt, to a gigabyte (docs/vllm-notes.md)."""
JUDGED = 10.0
"""A run of fewer minutes is not judged by what grows: engines still fill their caches."""
SPARE = 4
"""Descriptors that the proxy may have at the end beyond those at the beginning: what it keeps for a while."""
SAMPLE_S, FAULT_S, DEADLY_S = 2.0, 20.0, 120.0
"""Between two samples, and on average between two faults of either kind (seconds)."""


def specs(model: Path, runtime: Path) -> list[engine_command.EngineCommand]:
    """Return how the engines are started."""
    made = []
    for port, (name, wanted) in zip(reserve_ports(len(ENGINES)), ENGINES.items(), strict=True):
        args = [*COMMON, "--max-num-seqs", "64", *wanted.arguments(f"ipc://{runtime}/p")]
        env = {"HF_HUB_OFFLINE": "1", **ONEDNN, **wanted.environment(runtime, name)}
        made.append(engine_command.vllm_server(name, str(model), port, args, env))
    return made


class Soak:
    """A run of it: who serves, what happened, and what was sampled."""

    def __init__(self, supervisor: Supervisor, minutes: float, seed: int) -> None:
        self.supervisor, self.minutes, self.seed = supervisor, minutes, seed
        self.samples, self.struck = Samples(), Counter[str]()
        self.wrong: list[str] = []
        self.began = time.monotonic()
        self._done = threading.Event()

    def groups(self) -> dict[str, int]:
        """Return the process groups by name."""
        return {name: process.pid for name, process in self.supervisor.processes.items()}

    def note_token(self, seconds: float) -> None:
        """Note what a token of an answer took."""
        self.samples.add("time of a token", "all", 0, time.monotonic() - self.began, 1000 * seconds)

    def run(self, url: str, wanted: list[Any]) -> Traffic:
        """Serve, break and sample until the time is over, then let everything come to rest."""
        watchers = (self._recover, self._sample)
        threads = [threading.Thread(target=self._until_done, args=(each,), daemon=True) for each in watchers]
        for thread in threads:
            thread.start()
        before = self._connections()
        with Traffic(url, wanted, self.note_token, self.seed) as traffic:
            self._break()
        self.end = time.monotonic() - self.began
        if not eventually(self._is_at_rest, seconds=90, poll_s=1.0):
            self.wrong.append(f"blocks stay in use: {self._in_use()}")
        if not eventually(lambda: self._connections() <= before + SPARE, seconds=30, poll_s=1.0):
            self.wrong.append(f"the proxy has {self._connections()} descriptors at rest, and had {before} before")
        self._done.set()
        for thread in threads:
            thread.join()
        return traffic

    def _break(self) -> None:
        rng, until = random.Random(self.seed), self.began + 60 * self.minutes
        deadly_until = self.began + 20 * self.minutes
        next_deadly = self.began + DEADLY_S / 2
        while (now := time.monotonic()) < until - 5:
            time.sleep(min(rng.uniform(0.5, 1.5) * FAULT_S, max(1.0, until - 5 - now)))
            now = time.monotonic()
            if next_deadly <= now < deadly_until and all(is_ready(spec.url) for spec in self.supervisor.specs):
                fault, next_deadly = rng.choice(faults.DEADLY), now + DEADLY_S
            elif now < until - 5:
                fault = rng.choice(faults.SHORT)
            else:
                return
            try:
                fault(self.groups())
                self.struck[fault.__name__] += 1
            except (IndexError, StopIteration, ProcessLookupError, KeyError):
                self.struck["nobody was there to be hit"] += 1

    def _until_done(self, watch: Callable[[], None]) -> None:
        """Run a watcher. One that ends before the run does would let everything seem well."""
        try:
            watch()
        except Exception as error:
            self.wrong.append(f"nobody {watch.__name__.strip('_')}s any more: {error!r}")

    def _recover(self) -> None:
        recovery = Recovery(self.supervisor)
        while not self._done.wait(0.5):
            try:
                recovery.step()
            except AdrenalineError as error:
                self.wrong.append(str(error))
                return

    def _sample(self) -> None:
        while not self._done.wait(SAMPLE_S):
            engines = {s.name: (self.groups()[s.name], s.url) for s in self.supervisor.specs if s.name in self.groups()}
            self.samples.take(time.monotonic() - self.began, engines)

    def _connections(self) -> int:
        """Return the proxy's descriptors: most are connections, so they say something only when nobody asks."""
        return sum(len(os.listdir(f"/proc/{pid}/fd")) for pid in lasting(self.groups()[engine_command.PROXY]))

    def _in_use(self) -> dict[str, float]:
        used = {}
        for spec in self.supervisor.specs:
            if spec.name != engine_command.PROXY:
                used[spec.name] = Engine(spec.url, self.groups()[spec.name]).settle()
        return used

    def _is_at_rest(self) -> bool:
        """Whether nobody has a block, and the prefill engine has an executor."""
        try:
            return not any(self._in_use().values()) and bool(executors_of(self.groups()["prefill"]))
        except Exception:  # an engine is starting
            return False


def report(soak: Soak, traffic: Traffic, out: Path) -> bool:
    """Print and write what came of it; return whether all is well."""
    trends = soak.samples.trends(soak.end * 2 / 3, soak.end)
    is_long = soak.minutes >= JUDGED
    wrong = [*soak.wrong, *traffic.wrong, *(f"{t.name} grows" for t in trends if t.verdict == "grows" and is_long)]
    wrong += [f"{t.name}: there are {t.samples} samples" for t in trends if t.verdict == "few" and is_long]
    if traffic.outcomes["equal"] < sum(traffic.outcomes.values()) / 2:
        wrong.append("less than half of the requests were answered")
    idle = [name for name in ("decode", "second") if not soak.samples.offloads(name, soak.end * 2 / 3)]
    wrong += [f"the {name} engine offloads nothing any more" for name in idle if is_long]
    print(f"\n{sum(traffic.outcomes.values())} requests in {soak.end / 60:.1f} minutes")
    for outcome, count in traffic.outcomes.most_common():
        print(f"  {count:6d}  {outcome}")
    print("faults: " + ", ".join(f"{count} x {name.replace('_', ' ')}" for name, count in sorted(soak.struck.items())))
    print(f"\n{'in the last third':32}{'begin':>10}{'end':>10}{'per hour':>12}{'error':>10}  verdict")
    for t in sorted(trends, key=lambda t: t.name):
        print(f"{t.name:32}{t.first:10.1f}{t.last:10.1f}{t.slope:12.1f}{t.error:10.1f}  {t.verdict} {t.unit}")
    print("\n" + ("nothing was wrong" if not wrong else f"{len(wrong)} wrong:"), *wrong[:20], sep="\n  ")
    made = {
        "minutes": soak.minutes,
        "seed": soak.seed,
        "outcomes": traffic.outcomes,
        "faults": soak.struck,
        "trends": [vars(t) | {"verdict": t.verdict} for t in trends],
        "wrong": wrong,
    }
    out.mkdir(parents=True, exist_ok=True)
    (out / "report.json").write_text(json.dumps(made, indent=1, default=str))
    with (out / "samples.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["what", "who", "life", "seconds", "value"])
        for (kind, engine), lives in soak.samples.points.items():
            for life, points in lives.items():
                rows.writerows([kind, engine, life, round(t, 2), round(v, 4)] for t, v in points)
    print(f"written: {out}/report.json, {out}/samples.csv")
    return not wrong


def soak(minutes: float, seed: int, out: Path) -> bool:
    """Run a soak; return whether all is well."""
    with ExitStack() as stack:
        logs = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        model = make_model(layers=2, hidden=128, heads=4, kv_heads=2, vocab=512, max_position=2048)
        work = workload(60, seed=seed, prompts=[1, 20, BLOCK - 1, BLOCK, 300, 600], outputs=[1, 20, 60, 150, 300])
        with fleet(logs, model, ["--dtype", "float32", "--max-num-seqs", "64"], {"plain": Wanted("plain", 400)}) as one:
            wanted = [(each, answer.tokens) for each, answer in zip(work, one["plain"].complete(work), strict=True)]
        runtime = runtime_folder()
        stack.callback(shutil.rmtree, runtime, ignore_errors=True)
        supervisor = stack.enter_context(Supervisor(specs(model, runtime), logs=logs))
        kinds = {"prefill": supervisor.specs[:1], "decode": supervisor.specs[1:]}
        listener = stack.enter_context(bind("127.0.0.1", 0))
        supervisor.add(engine_command.proxy(listener, kinds, Limits(), None))
        run = Soak(supervisor, minutes, seed)
        traffic = run.run(supervisor.specs[-1].url, wanted)
        return report(run, traffic, out)


def main() -> int:
    """Read the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("adrenaline-soak"))
    given = parser.parse_args()
    try:
        with ending_signals_raise():
            return 0 if soak(given.minutes, given.seed, given.out) else 1
    except Stopped as stopped:
        return stopped.exit_status


if __name__ == "__main__":
    sys.exit(main())
