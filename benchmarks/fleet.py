"""A prefill engine on the second core, a decode engine on the first, a proxy: what benchmarks of serving share."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from vllm_adrenaline.bench import figures
from vllm_adrenaline.compat.worker_cores import CORES_ENV
from vllm_adrenaline.launch import engine_command
from vllm_adrenaline.launch.engine_metrics import EngineMetrics
from vllm_adrenaline.launch.process import group_members
from vllm_adrenaline.launch.supervisor import Supervisor
from vllm_adrenaline.proxy.server import ServerThread, bind, url_of
from vllm_adrenaline.system.folders import runtime_folder
from vllm_adrenaline.system.ports import reserve_ports
from vllm_adrenaline.workload import client
from vllm_adrenaline.workload.load import Load, Request, from_trace
from vllm_adrenaline.workload.tiny_model import make_model

VOCABULARY = 2048
MODEL = {"layers": 12, "hidden": 512, "heads": 8, "kv_heads": 8}
BLOCK_BYTES = 2 * 12 * 512 * 2 * 128
"""KV of 128 tokens: K and V, 12 layers, 512 wide, bfloat16."""
WARM_UP = Load("warm-up", "", 8, from_trace(4.0, 0.2, (32, 256), 0.2, (8, 24)))
COUNTED = {
    "offloaded": "vllm:adrenaline_offloaded_requests_total",
    "moved": "vllm:adrenaline_moved_requests_total",
    "fallback": "vllm:adrenaline_fallback_requests_total",
    "preemptions": "vllm:num_preemptions_total",
    "exposed_s": "vllm:adrenaline_exposed_wait_seconds_total",
}


class Fleet:
    """Runs from when it is made until `stack` is closed; `run` sends one load under one offload ratio."""

    def __init__(
        self,
        stack: ExitStack,
        prefill_blocks: int,
        decode_blocks: int,
        prefill_flags: Sequence[str] = (),
        logs: Path | None = None,
    ) -> None:
        model = make_model(**MODEL, vocab=VOCABULARY, max_position=2048)
        folder = runtime_folder()
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        self._knob = folder / "ratio"
        self._knob.write_text("auto")
        common = ["--dtype", "bfloat16", "--enforce-eager", "--max-model-len", "2048", "--served-model-name", "m"]
        common += ["--no-enable-prefix-caching"]
        here = str(Path(__file__).parent / "knob")
        env = {"HF_HUB_OFFLINE": "1", "ADRENALINE_KNOB": str(self._knob)}
        env["PYTHONPATH"] = os.pathsep.join(filter(None, (here, os.environ.get("PYTHONPATH"))))
        flags, specs = engine_command.adrenaline_args(folder, "auto"), []
        flags["prefill"] += prefill_flags
        ports = reserve_ports(2)
        for role, blocks, core, port in (
            ("prefill", prefill_blocks, "1", ports[0]),
            ("decode", decode_blocks, "0", ports[1]),
        ):
            more = [*flags[role], *common, "--kv-cache-memory-bytes", str(blocks * BLOCK_BYTES)]
            specs.append(engine_command.vllm_server(role, str(model), port, more, {**env, CORES_ENV: core}))
        supervisor = stack.enter_context(Supervisor(specs, logs=logs))
        self._prefill_pid = supervisor.processes["prefill"].pid
        listener = stack.enter_context(bind("127.0.0.1", 0))
        self.prefill_url, decode_url = (spec.url for spec in specs)
        proxy = ServerThread(listener, [self.prefill_url], [decode_url])
        proxy.start()
        stack.callback(proxy.stop)
        self.url = url_of(listener)
        self.prefill, self.decode = EngineMetrics(self.prefill_url), EngineMetrics(decode_url)
        for ratio in ("0", "1"):  # what vLLM compiles at its first steps
            self.run(WARM_UP.requests(VOCABULARY, 0), ratio)

    def executor(self) -> int:
        """Return the process of the attention executor."""
        for pid in group_members(self._prefill_pid):
            if b"vllm_adrenaline.attention" in Path(f"/proc/{pid}/cmdline").read_bytes():
                return pid
        raise SystemExit("no attention executor runs")

    def run(self, requests: Sequence[Request], ratio: str) -> dict[str, Any]:
        """Send requests when they are due; return figures, and what the decode engine counted meanwhile."""
        self._knob.write_text(ratio)
        before = self.decode.all()
        answers = client.send(self.url, "m", requests)
        after = self.decode.all()
        found: dict[str, Any] = figures.of(answers)
        found |= {name: after.get(metric, 0.0) - before.get(metric, 0.0) for name, metric in COUNTED.items()}
        return found | {"answers": answers}
