"""The systems that `adrenaline bench` compares: their engines, on which cores, with how much KV memory."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from vllm_adrenaline.compat.worker_cores import CORES_ENV
from vllm_adrenaline.errors import AdrenalineError
from vllm_adrenaline.launch import engine_command
from vllm_adrenaline.launch.engine_command import EngineCommand
from vllm_adrenaline.launch.engine_metrics import EngineMetrics
from vllm_adrenaline.launch.supervisor import Supervisor
from vllm_adrenaline.proxy.server import ServerThread, bind, url_of
from vllm_adrenaline.system.folders import runtime_folder
from vllm_adrenaline.system.ports import reserve_ports

BASELINE = "vllm_pd"
BASELINE_PLUGIN = Path(__file__).parent / "baseline"
"""A vLLM plugin that gives vLLM's own systems what this plugin needs to share cores at all. Without it they are several
times slower on a machine with two cores, and a comparison would say nothing of offloading (docs/vllm-notes.md)."""
ABOUT = {
    BASELINE: "vLLM disaggregated over its own NixlConnector, without this plugin",
    "vllm_one": "vLLM aggregated, one engine on all cores",
    "vllm_two": "vLLM aggregated, two engines in turn",
    "adrenaline_auto": "this plugin, placement by load",
    "adrenaline_elastic": "this plugin, placement by load, and prompts and decodes where they are done sooner",
    "semi_pd": "this plugin, both phases on one device: all cores and one KV cache for both engines",
    "adrenaline_all": "this plugin, both phases on one device, and executors beside the prefill engine",
}
ELASTIC = "adrenaline_elastic"
POOLS = {"semi_pd": "mapped", "adrenaline_all": "both"}
"""The systems on one device, and how they attend what stays with the prefill engine (--adrenaline-pool)."""


@dataclass(frozen=True)
class Budget:
    """What every system gets: the bytes of KV memory and the cores of its decode and of its prefill side.

    `least_bytes`: the KV memory that one longest request needs. On one device the decode engine has no more of its own.
    """

    decode_bytes: int
    prefill_bytes: int
    least_bytes: int
    decode_cores: str
    prefill_cores: str


@dataclass
class System:
    """A system that runs: its proxy's URL, and the URLs and process ids of its engines by name, prefill side first."""

    name: str
    url: str
    engines: dict[str, str]
    pids: dict[str, int]

    def metrics(self, engine: str) -> EngineMetrics:
        """Return the metrics of one of its engines."""
        return EngineMetrics(self.engines[engine])


def about(name: str) -> str:
    """Return in words what a system is. Raises AdrenalineError for a name that is none."""
    if name in ABOUT:
        return ABOUT[name]
    ratio = name.removeprefix("adrenaline_")
    if ratio != name and ratio.replace(".", "", 1).isdigit() and 0 <= float(ratio) <= 1:
        return f"this plugin, {ratio} of the requests offloaded"
    raise AdrenalineError(f"{name} is no system; there are {', '.join(ABOUT)} and adrenaline_RATIO")


def engines_of(names: Sequence[str]) -> int:
    """Return how many engines these systems have. Those with a fixed or learned ratio share their prefill engine."""
    shared = [name for name in names if name.startswith("adrenaline_") and name not in (*POOLS, ELASTIC)]
    return sum(1 if name in ("vllm_one", *shared) else 2 for name in names) + bool(shared)


class Systems:
    """All systems of a run, `running` by name. Their engines start at once, and stop with `stack`.

    `args` are flags of vLLM for all engines, `objectives` flags for those on one device, by role; `logs` is the folder
    for their logs, None for one in the user's cache.
    """

    def __init__(
        self,
        stack: ExitStack,
        names: Sequence[str],
        model: Path,
        budget: Budget,
        args: Sequence[str],
        objectives: Mapping[str, Sequence[str]],
        logs: Path | None,
    ) -> None:
        self._objectives = objectives
        self._model, self._budget, self._args, self._runtime = str(model), budget, args, runtime_folder()
        stack.callback(shutil.rmtree, self._runtime, ignore_errors=True)
        for name in (*POOLS, ELASTIC):
            (self._runtime / name).mkdir()
        self._specs: dict[str, EngineCommand] = {}
        wanted = {name: self._engines(name) for name in names}
        supervisor = stack.enter_context(Supervisor(list(self._specs.values()), logs=logs))
        self.running: dict[str, System] = {}
        for name, engines in wanted.items():
            listener = stack.enter_context(bind("127.0.0.1", 0))
            disaggregated = not name.startswith("vllm_one") and name != "vllm_two"
            prefill = [engines[0].url] if disaggregated else []
            decode = [engine.url for engine in (engines[1:] if disaggregated else engines)]
            proxy = ServerThread(listener, prefill, decode)
            proxy.start()
            stack.callback(proxy.stop)
            pids = {engine.name: supervisor.processes[engine.name].pid for engine in engines}
            urls = {engine.name: engine.url for engine in engines}
            self.running[name] = System(name, url_of(listener), urls, pids)

    def _engines(self, name: str) -> list[EngineCommand]:
        about(name)
        b = self._budget
        if name == "vllm_one":
            total = b.decode_bytes + b.prefill_bytes
            cores = f"{b.decode_cores},{b.prefill_cores}"
            return [self._spec("vllm_one", total, cores, [])]
        if name in POOLS:
            rest, cores = b.decode_bytes + b.prefill_bytes - b.least_bytes, f"{b.decode_cores},{b.prefill_cores}"
            flags = engine_command.adrenaline_args(self._runtime / name, "auto", POOLS[name])
            flags = {role: [*flags[role], *self._objectives[role]] for role in flags}
            return [
                self._spec(f"adrenaline_{name}_prefill", rest, cores, flags["prefill"]),
                self._spec(f"adrenaline_{name}_decode", b.least_bytes, cores, flags["decode"]),
            ]
        if name == ELASTIC:
            flags = engine_command.adrenaline_args(self._runtime / name, "auto")
            more = ["--adrenaline-elastic", "both"]
            return [
                self._spec(f"{name}_prefill", b.prefill_bytes, b.prefill_cores, [*flags["prefill"], *more]),
                self._spec(f"{name}_decode", b.decode_bytes, b.decode_cores, [*flags["decode"], *more]),
            ]
        if name == "vllm_two":
            half = (b.decode_bytes + b.prefill_bytes) // 2
            cores_of = (b.decode_cores, b.prefill_cores)
            return [self._spec(f"vllm_two_{i}", half, cores, []) for i, cores in enumerate(cores_of)]
        if name == BASELINE:
            env = engine_command.nixl_env(reserve_ports(2))
            flags = engine_command.nixl_args()
            return [
                self._spec("pd_prefill", b.prefill_bytes, b.prefill_cores, flags["prefill"], env["prefill"]),
                self._spec("pd_decode", b.decode_bytes, b.decode_cores, flags["decode"], env["decode"]),
            ]
        # One prefill engine serves the decode engines of all ratios: only one of them works at a time.
        flags = engine_command.adrenaline_args(self._runtime, name.removeprefix("adrenaline_"))
        return [
            self._spec("adrenaline_prefill", b.prefill_bytes, b.prefill_cores, flags["prefill"]),
            self._spec(f"{name}_decode", b.decode_bytes, b.decode_cores, flags["decode"]),
        ]

    def _spec(
        self, name: str, kv_bytes: int, cores: str, flags: Sequence[str], env: dict[str, str] | None = None
    ) -> EngineCommand:
        if name not in self._specs:
            (port,) = reserve_ports(1)
            args = [*flags, *self._args, "--kv-cache-memory-bytes", str(kv_bytes)]
            env = {**(env or {}), CORES_ENV: cores, "HF_HUB_OFFLINE": "1"}
            if not name.startswith("adrenaline"):
                env["PYTHONPATH"] = os.pathsep.join(filter(None, (str(BASELINE_PLUGIN), os.environ.get("PYTHONPATH"))))
            self._specs[name] = engine_command.vllm_server(name, self._model, port, args, env)
        return self._specs[name]
