"""How engines on one machine share its memory: vLLM on CPU takes 92 % of it for a single engine."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from vllm_adrenaline.errors import AdrenalineError
from vllm_adrenaline.system.memory import GIB, Memory

PROCESSES_BYTES = 2 * GIB
"""What an engine takes beside its worker, which alone counts its memory: API server, engine core, what compiles."""
SPARE = 0.08
"""Share of the memory that is left to others, as vLLM leaves it."""
LEAST_BYTES = GIB
KV_ELEMENT_BYTES = 4
"""The most bytes that an element of the KV cache has."""
WEIGHTS_FACTOR = 1.2
"""What a worker takes for its weights, over the size of the checkpoint."""
CHOSEN_BY_FLAG = ("--gpu-memory-utilization", "--kv-cache-memory-bytes")
CHOSEN_BY_VARIABLE = "VLLM_CPU_KVCACHE_SPACE"


def is_chosen(args: Sequence[str], env: Mapping[str, str]) -> bool:
    """Say whether the user chose how much memory an engine takes, by vLLM's own flags or variables."""
    return CHOSEN_BY_VARIABLE in env or any(
        arg.replace("_", "-").startswith(flag) for arg in args for flag in CHOSEN_BY_FLAG if arg.startswith("--")
    )


def workers(args: Sequence[str]) -> int:
    """Return how many workers an engine with these flags of vLLM has: each takes its --gpu-memory-utilization."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--tensor-parallel-size", "--tensor_parallel_size", "-tp", dest="workers", default="1")
    found = str(parser.parse_known_args(args)[0].workers)
    return max(1, int(found)) if found.isdecimal() else 1


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
