"""How engines on one machine share its memory: vLLM on CPU takes 92 % of it for a single engine."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from vllm_adrenaline.errors import AdrenalineError

GIB = 1 << 30
PROCESSES_BYTES = 2 * GIB
"""What an engine takes beside its worker, which alone counts its memory: API server, engine core, what compiles."""
SPARE = 0.08
"""Share of the memory that is left to others, as vLLM leaves it."""
LEAST_BYTES = GIB
KV_ELEMENT_BYTES = 4
"""The most bytes that an element of the KV cache has."""
WEIGHTS_FACTOR = 1.2
"""What a worker takes for its weights, over the size of the checkpoint."""
CHOSEN_BY_FLAG = ("--gpu-memory-utilization", "--kv-cache-memory-bytes", "--num-gpu-blocks-override")
CHOSEN_BY_VARIABLE = "VLLM_CPU_KVCACHE_SPACE"
UNLIMITED = 1 << 62


@dataclass(frozen=True)
class Memory:
    """The memory of a machine in bytes: `total` is all of it, as vLLM sees it; `available` is free or easily freed."""

    total: int
    available: int


def read(root: Path = Path("/")) -> Memory:
    """Return this machine's memory, or that of the container that this process runs in, if it has less.

    It is read as vLLM reads it (vllm/utils/cpu_resource_utils.py, get_memory_node_info; 0.32): from cgroup v2, then v1.
    /proc and /sys are looked for below `root`.
    """
    lines = (root / "proc/meminfo").read_text().splitlines()
    found = {line.partition(":")[0]: 1024 * int(line.split()[1]) for line in lines}
    total, available = found["MemTotal"], found["MemAvailable"]
    groups = root / "sys/fs/cgroup"
    for limit, usage in (
        (groups / "memory.max", groups / "memory.current"),
        (groups / "memory/memory.limit_in_bytes", groups / "memory/memory.usage_in_bytes"),
    ):
        if (most := _number(limit)) is not None:
            if most < min(total, UNLIMITED):
                total, available = most, max(0, min(available, most - (_number(usage) or 0)))
            break
    return Memory(total, available)


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):  # not there, or "max"
        return None


def is_chosen(args: Sequence[str], env: Mapping[str, str]) -> bool:
    """Say whether the user chose how much memory an engine takes, by vLLM's own flags or variables."""
    return CHOSEN_BY_VARIABLE in env or any(
        arg.replace("_", "-").startswith(flag) for arg in args for flag in CHOSEN_BY_FLAG if arg.startswith("--")
    )


def least_share(model: str, args: Sequence[str], memory: Memory) -> float:
    """Return the part of the memory, 0 to 1, that an engine needs for its weights and the KV of one longest request.

    It is 1 for a model that is not in a folder of this machine or whose config does not say it: then nobody knows.
    `args` are vLLM's flags.
    """
    sizes = [file.stat().st_size for file in Path(model).glob("*.safetensors")]
    try:
        config = json.loads((Path(model) / "config.json").read_text())
        heads, layers = config["num_attention_heads"], config["num_hidden_layers"]
        head_size = config.get("head_dim") or config["hidden_size"] // heads
        kv_heads, longest = config.get("num_key_value_heads", heads), config["max_position_embeddings"]
        if "--max-model-len" in args:
            longest = int(args[args.index("--max-model-len") + 1])
        token = 2 * layers * kv_heads * head_size * KV_ELEMENT_BYTES
    except (OSError, ValueError, KeyError, TypeError, IndexError):
        return 1.0
    return (WEIGHTS_FACTOR * sum(sizes) + longest * token + PROCESSES_BYTES) / memory.total if sizes else 1.0


def utilization(memory: Memory, engines: int) -> float:
    """Return --gpu-memory-utilization for each of so many engines: the part of the memory that it can have, 0 to 1.

    Raises AdrenalineError when that is too little for any engine.
    """
    part = int(memory.available - SPARE * memory.total) // engines - PROCESSES_BYTES
    if part < LEAST_BYTES:
        raise AdrenalineError(
            f"{memory.available / GIB:.1f} GiB of memory are available, too little for {engines} engine(s): free "
            "some, or say what each takes with --kv-cache-memory-bytes"
        )
    return int(1000 * part / memory.total) / 1000
