"""The workloads, the models and the objectives of `adrenaline bench`, sized for CPU cores."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from vllm_adrenaline.bench.load import Load, evenly, from_trace

VOCABULARY = 2048
BLOCK = 128
LOADS = {
    load.name: load
    for load in (
        Load(
            "reasoning",
            "decode-heavy: short prompts, long answers, all at once",
            count=40,
            arrivals=evenly(6.0, (64, 120), (200, 800)),
        ),
        Load(
            "conversation",
            "the real conversation trace, twelve a second; prompt lengths x 0.3, 32 to 512 tokens; answers 32 to 384",
            count=64,
            arrivals=from_trace(12.0, 0.3, (32, 512), 1.0, (32, 384)),
        ),
        Load(
            "prefill",
            "the same trace, prompt lengths x 0.8, at most 1024 tokens; answers x 0.15, at most 32",
            count=32,
            arrivals=from_trace(2.4, 0.8, (128, 1024), 0.15, (4, 32), first=50),
        ),
        Load(
            "chat",
            "eight turns of conversations that share a system prompt of 256 tokens",
            count=32,
            arrivals=evenly(4.0, (320, 640), (40, 120)),
            shared=256,
        ),
        Load(
            "light",
            "so few requests that nothing is short of anything: the honest result is no gain",
            count=12,
            arrivals=from_trace(0.5, 0.3, (64, 512), 0.3, (16, 64), first=100),
        ),
    )
}
TTFT_SLO_MS, TPOT_SLO_MS = 3000.0, 60.0
"""Objectives for goodput."""


@dataclass(frozen=True)
class ModelSize:
    """A small Llama with random weights, and the KV blocks of the decode and of the prefill side."""

    about: str
    shape: dict[str, int]
    decode_blocks: int
    prefill_blocks: int

    @property
    def block_bytes(self) -> int:
        """KV bytes of a block: keys and values of all layers, bfloat16."""
        s = self.shape
        return 2 * s["layers"] * s["kv_heads"] * s["head_dim"] * BLOCK * 2


MODELS = {
    "mha": ModelSize(
        "multi-head attention, as in the paper's models",
        {"layers": 12, "hidden": 512, "inner": 512, "heads": 8, "kv_heads": 8, "head_dim": 64},
        decode_blocks=24,
        prefill_blocks=72,
    ),
    "gqa": ModelSize(
        "grouped-query attention: a quarter of the KV",
        {"layers": 12, "hidden": 512, "inner": 512, "heads": 8, "kv_heads": 2, "head_dim": 64},
        decode_blocks=24,
        prefill_blocks=72,
    ),
}


def folder_of(size: ModelSize) -> Path:
    """Make the model if it is not there; return its folder."""
    from vllm_adrenaline.demo.model import make_model

    return make_model(None, **size.shape, vocab=VOCABULARY, max_position=1536)
