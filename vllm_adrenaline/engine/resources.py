"""What an engine needs of this machine: too little is said when it starts, and not by a crash under load.

`refusals` and `warnings` are pure; `read` alone looks at the machine. vLLM finds some of it later, with a traceback, in
a worker (vllm/v1/worker/cpu_worker.py; distributed/device_communicators/shm_broadcast.py; 0.32, read).
"""

from __future__ import annotations

import os
import resource
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from vllm_adrenaline.config import Options
from vllm_adrenaline.system import memory, priority
from vllm_adrenaline.system.folders import cache_folder
from vllm_adrenaline.system.memory import GIB, Memory

if TYPE_CHECKING:
    from vllm.config import VllmConfig

MIB = 1 << 20
SHM = Path("/dev/shm")
RING_BYTES = 240 * MIB
"""What the largest of vLLM's message rings takes of /dev/shm."""
FEWEST_FILES = 1024
"""Open files that a process must be allowed: sockets to clients, peers and NIXL, processes and memory of peers."""
LEAST_DISK_BYTES = 64 * MIB
"""What sockets, logs and the compiler's files want at least."""


@dataclass(frozen=True)
class Wanted:
    """What an engine takes.

    Attributes:
        weights: bytes of the checkpoint; 0 if nobody knows.
        kv: bytes of the KV cache; 0 if vLLM finds out itself, from `share`.
        share: of the memory of a worker (memory.of_worker), 0 to 1, that vLLM wants for its weights and its KV cache
            together; 0 if it does not ask for that.
        moves_priorities: whether an objective is to be met by moving priorities.
        workers: how many take it: one where another limit says how much they take.
    """

    weights: int
    kv: int
    share: float
    moves_priorities: bool
    workers: int = 1


@dataclass(frozen=True)
class Found:
    """What this machine has.

    Attributes:
        memory: of the machine or the container.
        shm: bytes free in /dev/shm; None if it is not there.
        files: the most files that a process may open; -1: any number.
        disks: bytes free in each folder that is written to; None where nothing can be written.
        may_raise: whether priorities may be raised.
        of_worker: bytes of which each worker takes its share; 0: of all memory.
    """

    memory: Memory
    shm: int | None
    files: int
    disks: Mapping[str, int | None]
    may_raise: bool
    of_worker: int = 0


def refusals(wanted: Wanted, found: Found) -> list[str]:
    """Return what is too small to serve, each with what to do."""
    said = []
    total, available = found.memory.total / GIB, found.memory.available
    how = (
        f"and {available / GIB:.1f} GiB are available (the limit of the container or control group counts): ask for "
        "less (--kv-cache-memory-bytes, --num-gpu-blocks-override, --gpu-memory-utilization), free some, or raise the "
        "limit (docker run --memory)"
    )
    taken = wanted.workers * wanted.share * (found.of_worker or found.memory.total)
    if taken > available:
        each = f" for each of {wanted.workers} workers" if wanted.workers > 1 else ""
        said.append(
            f"--gpu-memory-utilization {wanted.share:g}{each} is {taken / GIB:.1f} of {total:.1f} GiB of memory, {how}"
        )
    elif wanted.weights + wanted.kv > available:
        kv, weights = wanted.kv / GIB, wanted.weights / GIB
        said.append(f"the KV cache takes {kv:.1f} GiB of memory and the weights take {weights:.1f} GiB, {how}")
    if found.shm is not None and found.shm < RING_BYTES:
        said.append(
            f"/dev/shm has {found.shm / MIB:.0f} MiB free, and vLLM's message rings take {RING_BYTES / MIB:.0f} MiB: "
            "make it larger (docker run --shm-size=1g, or --ipc=host), or remove what is left over there"
        )
    if 0 <= found.files < FEWEST_FILES:
        said.append(
            f"a process may open {found.files} files here, and an engine wants {FEWEST_FILES}: ulimit -n {FEWEST_FILES}"
        )
    for folder, free in found.disks.items():
        if free is None or free < LEAST_DISK_BYTES:
            has = "cannot be written to" if free is None else f"has {free / MIB:.0f} MiB free"
            said.append(
                f"{folder} {has}, and an engine wants {LEAST_DISK_BYTES // MIB} MiB for sockets, logs and compiled "
                "code: free some, or name another folder (TMPDIR, XDG_CACHE_HOME)"
            )
    return said


def warnings(wanted: Wanted, found: Found) -> list[str]:
    """Return what makes an engine serve worse than asked, each with what to do."""
    if wanted.moves_priorities and not found.may_raise:
        return [
            "an objective is given (--adrenaline-ttft-slo-ms, --adrenaline-tpot-slo-ms), and priorities may not be "
            "raised here, so that prefill and decode keep fixed shares: give CAP_SYS_NICE (docker run --cap-add "
            "SYS_NICE), or ulimit -e 40"
        ]
    return []


def wanted(options: Options, config: VllmConfig) -> Wanted:
    """Return what an engine with this configuration takes of this machine. On CUDA vLLM checks the GPU's memory."""
    if options.experimental_cuda:
        return Wanted(0, 0, 0.0, moves_priorities=False)
    cache, model, parallel = config.cache_config, config.model_config, config.parallel_config
    kv = parallel.tensor_parallel_size * (cache.kv_cache_memory_bytes or 0)
    if cache.num_gpu_blocks_override:
        token = model.get_total_num_kv_heads() * model.get_head_size() * model.dtype.itemsize
        kv = 2 * cache.num_gpu_blocks_override * cache.block_size * model.get_num_layers(parallel) * token
    share = 0.0 if cache.kv_cache_memory_bytes else cache.gpu_memory_utilization
    weights = sum(file.stat().st_size for file in Path(model.model).glob("*.safetensors"))
    workers = 1 if cache.num_gpu_blocks_override else parallel.tensor_parallel_size
    has_objective = options.role == "prefill" and bool(options.ttft_slo_ms or options.tpot_slo_ms)
    return Wanted(weights, kv, share, has_objective, workers)


def read() -> Found:
    """Return what this machine has, for this process."""
    try:
        priority.require_permission()
        may_raise = True
    except PermissionError:
        may_raise = False
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    try:
        temporary = tempfile.gettempdir()
        disks = {temporary: free_bytes(Path(temporary))}
    except FileNotFoundError:  # Python has tried to write a file in each folder that it knows
        disks = {"/tmp": None}
    cache = cache_folder()
    disks[str(cache)] = free_bytes(cache)
    shm = free_bytes(SHM) or 0 if SHM.is_dir() else None
    there = memory.read()
    return Found(there, shm, files, disks, may_raise, memory.of_worker(there))


def free_bytes(folder: Path) -> int | None:
    """Return the bytes that are free for a folder, or for the next one above it that is there.

    None: nothing can be written there, e.g. in a container whose files are read-only.
    """
    there = next((each for each in (folder, *folder.parents) if each.exists()), None)
    try:
        return shutil.disk_usage(there).free if there and os.access(there, os.W_OK) else None
    except OSError:
        return None
