"""The workloads, the models and the objectives of `adrenaline bench`, sized for CPU cores."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from vllm_adrenaline.workload.load import Load, evenly, from_trace

VOCABULARY, MAX_LENGTH = 2048, 1536
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
            count=80,
            arrivals=from_trace(12.0, 0.3, (32, 512), 1.0, (32, 384)),
        ),
        Load(
            "prefill",
            "the same trace, six a second; prompt lengths x 0.8, at most 1024 tokens; answers x 0.15, at most 32",
            count=40,
            arrivals=from_trace(6.0, 0.8, (128, 1024), 0.15, (4, 32), first=50),
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
            count=10,
            arrivals=from_trace(0.8, 0.3, (64, 512), 0.3, (16, 64), first=100),
        ),
    )
}
GOODPUT = 0.9
"""The share of requests that must meet both objectives for goodput."""
RAMP, RATES = "ramp", tuple(0.5 * 1.1**step for step in range(40))
"""The ramp: the trace at these rates in requests a second, among which the highest that has its goodput is searched."""
COMMON = range(8, len(RATES), 6)
"""Numbers of the rates at which every system is measured, from about one a second on, as far as it gets."""


def at_rate(rate: float) -> Load:
    """Return the workload that is one step of the ramp, at `rate` requests a second."""
    arrivals = from_trace(rate, 0.3, (32, 512), 1.0, (32, 384), first=200)
    return Load(f"{RAMP}@{rate:.3g}", f"the trace at {rate:.3g} requests a second", count=100, arrivals=arrivals)


def rate_of(name: str) -> float | None:
    """Return the rate in requests a second of a step of the ramp, None for any other workload."""
    return float(name.removeprefix(f"{RAMP}@")) if name.startswith(f"{RAMP}@") else None


def seed_of(load: Load, repeat: int) -> int:
    """Return the seed of the prompts of a run.

    Each rate of the ramp has its own. Else a rate would find prompts of another one in prefix caches.
    """
    rate = rate_of(load.name)
    return repeat if rate is None else repeat + round(1000 * rate)


@dataclass(frozen=True)
class ModelSize:
    """A small Llama with random weights, and how it is measured.

    `shape` goes to make_model. The decode and the prefill side have so many KV blocks of BLOCK tokens. `loads` are its
    workloads unless others are asked for.
    """

    about: str
    shape: dict[str, int]
    decode_blocks: int
    prefill_blocks: int
    loads: tuple[str, ...]

    def block_bytes(self, item_bytes: int) -> int:
        """Return the bytes of a KV block: keys and values of all layers, in numbers of so many bytes."""
        s = self.shape
        return 2 * s["layers"] * s["kv_heads"] * s["head_dim"] * BLOCK * item_bytes

    def saturated(self) -> tuple[int, int]:
        """Return how many rows of the decode-heavy workload fill the decode side, and their mean context in tokens."""
        requests = LOADS["reasoning"].requests(VOCABULARY, 0)
        context = sum(len(request.prompt) + request.tokens // 2 for request in requests) // len(requests)
        return max(1, round(self.decode_blocks / (context / BLOCK + 0.5))), context


MODELS = {
    "mha": ModelSize(
        "multi-head attention, as in the paper's models",
        {"layers": 12, "hidden": 512, "inner": 512, "heads": 8, "kv_heads": 8, "head_dim": 64},
        decode_blocks=24,
        prefill_blocks=72,
        loads=(*LOADS, RAMP),
    ),
    "gqa": ModelSize(
        "grouped-query attention: a quarter of the KV",
        {"layers": 12, "hidden": 512, "inner": 512, "heads": 8, "kv_heads": 2, "head_dim": 64},
        decode_blocks=24,
        prefill_blocks=72,
        loads=("reasoning", "conversation"),
    ),
}


def folder_of(size: ModelSize) -> Path:
    """Return the folder of the model, which is made if it is not there."""
    from vllm_adrenaline.workload.tiny_model import make_model

    return make_model(None, **size.shape, vocab=VOCABULARY, max_position=MAX_LENGTH)
