"""A cluster on this machine, as one object for commands and tests: a prefill engine, a decode engine, the proxy."""

from __future__ import annotations

import os
import shutil
import socket
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

from vllm_adrenaline.compat import versions
from vllm_adrenaline.compat.worker_cores import CORES_ENV
from vllm_adrenaline.config import ratio_of
from vllm_adrenaline.engine.setup import PEERS_START_TOO, check_model
from vllm_adrenaline.launch import engine_command, memory
from vllm_adrenaline.launch.process import EngineProcess
from vllm_adrenaline.launch.recovery import Recovery
from vllm_adrenaline.launch.running import Running
from vllm_adrenaline.launch.supervisor import Supervisor
from vllm_adrenaline.proxy.limits import Limits
from vllm_adrenaline.proxy.server import bind, url_of
from vllm_adrenaline.system import cores
from vllm_adrenaline.system.folders import runtime_folder
from vllm_adrenaline.system.memory import GIB, read
from vllm_adrenaline.system.ports import reserve_ports
from vllm_adrenaline.system.terminal import say


class Cluster(Running):
    """A context manager that runs a prefill engine, a decode engine and the proxy in front of them.

    They serve requests inside of the context, and nothing of them is left after it. Extra flags of vLLM are in `args`
    for both engines, and in `prefill_args` and `decode_args` for one. `offload_ratio=None` leaves the plugin out: the
    same cluster with vLLM's own disaggregation over NIXL. With `one_device` both engines have all cores, and the decode
    engine decodes in the prefill engine's memory. `port=0` chooses a free port.

    The engines serve at Unix sockets in a private folder. `url` is the proxy's address; it has the engines' metrics at
    `prefill_url` and `decode_url`. `limits` and `api_key` are the proxy's.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        offload_ratio: str | float | None = "auto",
        one_device: bool = False,
        host: str = "127.0.0.1",
        port: int = 0,
        args: Sequence[str] = (),
        prefill_args: Sequence[str] = (),
        decode_args: Sequence[str] = (),
        env: Mapping[str, str] | None = None,
        logs: Path | None = None,
        limits: Limits | None = None,
        api_key: str | None = None,
    ) -> None:
        self.model = os.path.expanduser(str(model)) if str(model).startswith("~") else str(model)
        self.offload_ratio, self.one_device = offload_ratio, one_device
        self.host, self.port = host, port
        self._args = {"prefill": [*args, *prefill_args], "decode": [*args, *decode_args]}
        self._env = dict(env or {})
        self._logs = logs
        self._limits, self._api_key = limits or Limits(), api_key
        self._runtime: Path | None = None
        self._listener: socket.socket | None = None
        self._supervisor: Supervisor | None = None
        self._recovery: Recovery | None = None
        self.url = self.prefill_url = self.decode_url = ""

    @property
    def processes(self) -> dict[str, EngineProcess]:
        """Return the running processes by name: "prefill", "decode" and "proxy"."""
        return self._supervisor.processes if self._supervisor else {}

    def check(self) -> None:
        """Raise AdrenalineError if an engine or the proxy has ended."""
        if self._supervisor:
            self._supervisor.check()

    def recover(self) -> None:
        """Start again what has ended; to be called now and then. Raises AdrenalineError for what ends too often."""
        if self._recovery:
            self._recovery.step()

    def stop(self) -> None:
        """Stop everything; may be called again."""
        with ExitStack() as stack:  # in turn from the last, whatever one of them raises
            if self._runtime:
                stack.callback(shutil.rmtree, self._runtime, ignore_errors=True)
            if self._listener:
                stack.callback(self._listener.close)
            if self._supervisor:
                stack.callback(self._supervisor.stop)
                # Requests under way may end first.
                stack.callback(self._supervisor.end, engine_command.PROXY, self._limits.drain_seconds)
            self._listener = self._supervisor = self._recovery = self._runtime = None

    def start(self) -> None:
        """Start engines and proxy; return when they are ready.

        Raises AdrenalineError when the model, a flag or the address cannot be used, or an engine does not start.
        """
        check_model(self.model)
        if self.offload_ratio is not None:
            ratio_of("--offload-ratio", self.offload_ratio)
        # Held from now on, so that nobody takes it while the engines start; clients are refused until then.
        self._listener = bind(self.host, self.port)
        self._runtime = runtime_folder()
        prefill, decode = self._specs(self._runtime)
        self._supervisor = Supervisor([prefill, decode], logs=self._logs)
        self._supervisor.start()
        engines = {"prefill": [prefill], "decode": [decode]}
        self._supervisor.add(engine_command.proxy(self._listener, engines, self._limits, self._api_key))
        self._recovery = Recovery(self._supervisor)
        self.url = url_of(self._listener)
        self.prefill_url, self.decode_url = f"{self.url}/engines/prefill-0", f"{self.url}/engines/decode-0"

    def _specs(self, runtime: Path) -> list[engine_command.EngineCommand]:
        env: dict[str, dict[str, str]] = {"prefill": {}, "decode": {}}
        if self.offload_ratio is None:
            flags = engine_command.nixl_args()
            env = engine_command.nixl_env(reserve_ports(2))
        else:
            pool = "mapped" if self.one_device else "remote"
            flags = engine_command.adrenaline_args(runtime, self.offload_ratio, pool)
            env["decode"][PEERS_START_TOO] = "1"
        if versions.is_cpu_build() and CORES_ENV not in {**os.environ, **self._env}:
            physical = cores.physical_cores()
            decode, prefill = (cores.ranges(physical),) * 2 if self.one_device else cores.split_cores(physical)
            env["decode"][CORES_ENV], env["prefill"][CORES_ENV] = decode, prefill
        for role, args in self._shared_memory({role: {**os.environ, **env[role], **self._env} for role in env}).items():
            flags[role] = [*flags[role], *args]
        return [
            engine_command.vllm_server(
                role,
                self.model,
                runtime / f"{role}.http",
                [*flags[role], *self._args[role]],
                {**env[role], **self._env},
            )
            for role in ("prefill", "decode")
        ]

    def _shared_memory(self, env: Mapping[str, Mapping[str, str]]) -> dict[str, list[str]]:
        """Return the flags by which engines share this machine's memory, for those whose user chose nothing."""
        free = [role for role in env if not memory.is_chosen(self._args[role], env[role])]
        if not free or not versions.is_cpu_build():
            return {}
        found = read()
        shares = dict.fromkeys(env, memory.utilization(found, len(env)))
        if self.one_device:  # what the decode engine does not take of its half is the prefill engine's
            decode = min(shares["decode"], memory.least_share(self.model, self._args["decode"], found))
            shares = {"prefill": shares["prefill"] + shares["decode"] - decode, "decode": decode}
        taken = " and ".join(f"{shares[role] * found.total / GIB:.1f} GiB by the {role} engine" for role in free)
        say(
            f"memory: {found.available / GIB:.1f} of {found.total / GIB:.1f} GiB are available, of which "
            f"weights and KV cache may take {taken} (--gpu-memory-utilization)"
        )
        each = {role: shares[role] / memory.workers(self._args[role]) for role in free}
        return {role: ["--gpu-memory-utilization", f"{each[role]:.3f}"] for role in free}
