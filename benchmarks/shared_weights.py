"""One copy of the weights for two engines: memory, start-up and the time of a step, with sharing and without.

    python benchmarks/shared_weights.py [--quick] [--json FILE] [--dtype bfloat16]

A prefill engine on the second core and decode engines on the first, of a Llama with random weights, 1.2 GB in float32.
First a pair that shares nothing, then a pair that shares its weights, and beside that pair another decode engine that
does not: steps of the two decode engines are timed in turns. PSS is what all processes of a pair take: memory that is
shared counts in parts. A start-up is timed from the decode engine's start, while the prefill engine serves. Then comes
what the alternative would cost: one unpacked copy, multiplied by torch's linear instead of oneDNN's packed handler.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import re
import shutil
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import report
from engine_step import step_ms

from vllm_adrenaline.compat.worker_cores import CORES_ENV
from vllm_adrenaline.launch import engine_command
from vllm_adrenaline.launch.process import group_members
from vllm_adrenaline.launch.supervisor import Supervisor
from vllm_adrenaline.system.folders import runtime_folder
from vllm_adrenaline.system.ports import reserve_ports
from vllm_adrenaline.workload.tiny_model import make_model

SHAPES = [(3072, 2048), (2048, 2048), (11264, 2048), (2048, 5632)]
"""Rows and columns of the model's linear layers."""
OPERATORS = "--operators"


def pss_mib(pids: list[int]) -> float:
    """Return the proportional set size of these processes."""
    kib = 0
    for pid in pids:
        rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
        kib += int(re.search(r"^Pss:\s+(\d+)", rollup, re.MULTILINE)[1])
    return kib / 1024


class Engines:
    """Engines that start one after the other, and end together."""

    def __init__(self, args: argparse.Namespace, model: Path, stack: ExitStack) -> None:
        self.args, self.model, self.stack = args, model, stack
        self.folder = runtime_folder()
        stack.callback(shutil.rmtree, self.folder, ignore_errors=True)
        self.urls: dict[str, str] = {}
        self.groups: dict[str, int] = {}
        self.seconds: dict[str, float] = {}
        """From its start until it serves, by engine."""

    def start(self, name: str, role: str, share: str) -> None:
        """Start an engine and wait until it serves."""
        flags = engine_command.adrenaline_args(self.folder, "auto" if role == "prefill" else 1.0)[role]
        flags += ["--adrenaline-pool", "mapped", "--adrenaline-share-weights", share]
        flags += ["--dtype", self.args.dtype, "--enforce-eager", "--max-model-len", "2048", "--served-model-name", "m"]
        flags += ["--kv-cache-memory-bytes", str(256 << 20), "--no-enable-prefix-caching"]
        flags += ["--adrenaline-lease-seconds", "600"] if role == "prefill" else []
        env = {CORES_ENV: "1" if role == "prefill" else "0", "HF_HUB_OFFLINE": "1"}
        spec = engine_command.vllm_server(name, str(self.model), reserve_ports(1)[0], flags, env)
        began = time.monotonic()
        supervisor = self.stack.enter_context(Supervisor([spec], logs=self.args.logs))
        self.seconds[name] = time.monotonic() - began
        self.urls[name], self.groups[name] = spec.url, supervisor.processes[name].pid

    def pss(self) -> float:
        """Return what all processes of all engines take, in MiB."""
        return pss_mib([pid for group in self.groups.values() for pid in group_members(group)])

    def step(self, decode: str, rows: int, tokens: int) -> float:
        """Return the milliseconds of a step of so many requests."""
        prompts = [[random.randrange(5, 8000) for _ in range(96)] for _ in range(rows)]
        return asyncio.run(step_ms(self.urls["prefill"], self.urls[decode], prompts, tokens))


def pair(args: argparse.Namespace, model: Path, stack: ExitStack, share: str) -> tuple[Engines, dict[str, float]]:
    """Start a prefill and a decode engine; return them, and their figures."""
    engines = Engines(args, model, stack)
    engines.start("prefill", "prefill", share)
    engines.start("decode", "decode", share)
    engines.step("decode", 4, 8)  # so that all memory of a step is touched
    name = "shared" if share == "on" else "apart"
    figures = {
        f"pss_{name}_mib": engines.pss(),
        f"prefill_start_{name}_s": engines.seconds["prefill"],
        f"decode_start_{name}_s": engines.seconds["decode"],
    }
    return engines, figures


def steps(args: argparse.Namespace, engines: Engines) -> dict[str, float]:
    """Time steps of both decode engines in turns; return medians, and the median of the ratio."""
    figures = {}
    for rows in (1, 8):
        found: dict[str, list[float]] = {"decode": [], "apart": []}
        for repeat in range(args.repeats + 1):
            for name in sorted(found, reverse=repeat % 2 == 0):
                took = engines.step(name, rows, args.tokens)
                if repeat:
                    found[name].append(took)
        ratios = [a / b for a, b in zip(found["decode"], found["apart"], strict=True)]
        figures[f"step_{rows}_shared_ms"] = report.median(found["decode"])
        figures[f"step_{rows}_apart_ms"] = report.median(found["apart"])
        figures[f"step_{rows}_ratio"] = report.median(ratios)
    return figures


def operators(repeats: int) -> None:
    """Print how long torch's linear takes over oneDNN's handler, for all linear layers of a decoder layer."""
    import torch
    from vllm import _custom_ops as ops
    from vllm.platforms import current_platform

    current_platform.import_kernels()
    torch.set_num_threads(1)
    layers = [[torch.randn(shape) for shape in SHAPES] for _ in range(3)]  # beyond the caches
    handlers = [[ops.create_onednn_mm(weight.t(), 32) for weight in layer] for layer in layers]
    for rows in (1, 2, 4, 8, 16, 32):
        inputs = [torch.randn(rows, shape[1]) for shape in SHAPES]
        found: dict[str, list[float]] = {"linear": [], "packed": []}
        for repeat in range(repeats + 1):
            for name in sorted(found, reverse=repeat % 2 == 0):
                began = time.perf_counter()
                for layer, packed in zip(layers, handlers, strict=True):
                    for each, weight, handler in zip(inputs, layer, packed, strict=True):
                        if name == "linear":
                            torch.nn.functional.linear(each, weight)
                        else:
                            ops.onednn_mm(handler, each, None)
                if repeat:
                    found[name].append(time.perf_counter() - began)
        ratios = [a / b for a, b in zip(found["linear"], found["packed"], strict=True)]
        print(f"gemm_{rows}_linear_over_packed_ratio {report.median(ratios)}", flush=True)


def main() -> None:
    parser = report.parser(__doc__.splitlines()[0], quick="fewer repeats: 5 minutes, for engines must start")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--logs", type=Path, help="folder that exists, for the logs of the engines")
    parser.add_argument(OPERATORS, action="store_true", help="only linear against packed")
    args = parser.parse_args()
    args.repeats, args.tokens = (5, 40) if args.quick else (15, 60)
    if args.operators:
        operators(3 * args.repeats)
        return
    random.seed(1)
    model = make_model(layers=6, hidden=2048, heads=16, kv_heads=4, inner=5632, vocab=8192, max_position=2048)
    with ExitStack() as stack:
        _, figures = pair(args, model, stack, "off")
    with ExitStack() as stack:
        engines, shared = pair(args, model, stack, "on")
        engines.start("apart", "decode", "off")
        figures |= shared | steps(args, engines)
    figures["saved_mib"] = figures["pss_apart_mib"] - figures["pss_shared_mib"]
    command = [sys.executable, __file__, OPERATORS, *(["--quick"] if args.quick else [])]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    found = subprocess.run(command, env=env, stdout=subprocess.PIPE, text=True, check=True).stdout
    figures |= {name: float(value) for name, value in re.findall(r"^(gemm\S+) (\S+)$", found, re.MULTILINE)}
    report.finish(report.table(figures), args.json)


if __name__ == "__main__":
    main()
