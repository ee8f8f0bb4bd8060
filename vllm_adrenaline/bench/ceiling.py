"""The ceiling of what offloading could gain on this machine: bare operators on two cores, with no engine in the way.

    python -m vllm_adrenaline.bench.ceiling MODEL ROWS CONTEXT DTYPE     (MODEL: mha or gqa; prints one JSON object)

The decode side runs the four GEMMs of every layer, cold, and vLLM's attention operators on its KV. The other side runs
the same operators on its own KV when a flag in shared memory is raised. Two kinds of steps take turns: ROWS rows, all
attended here, and twice as many, half of them attended there. The latter are measured with vLLM's attention operator
and with this plugin's native one. The ratio of rows per second is what engines could reach whose KV memory doubles, if
scheduling, transport and Python took no time.
"""

from __future__ import annotations

import json
import mmap
import multiprocessing
import os
import statistics
import sys
import time
from multiprocessing.synchronize import Event
from typing import Any

from vllm_adrenaline.bench.workloads import BLOCK, MODELS
from vllm_adrenaline.system.cores import physical_cores

SENT, DONE, STOP, NATIVE = 0, 1, 2, 3
REPEATS = 15


def _attention(shape: dict[str, int], rows: int, context: int, dtype: str, core: int) -> tuple[Any, Any]:
    """Return torch, kept on one core, and attend(layer, native): attention of all rows over a KV cache of its own.

    What torch makes is of `dtype` from then on.
    """
    os.sched_setaffinity(0, {core})
    os.environ["OMP_NUM_THREADS"] = "1"
    import torch

    from vllm_adrenaline.kv.memory import dtype_of

    torch.set_num_threads(1)
    torch.set_default_dtype(dtype_of(dtype))
    from vllm.platforms import current_platform

    current_platform.import_kernels()
    from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

    from vllm_adrenaline.attention.kernels import CpuAttention

    layers, heads, kv_heads = shape["layers"], shape["heads"], shape["kv_heads"]
    head = shape["head_dim"]
    width = context // BLOCK + 1
    isa = _get_attn_isa(torch.get_default_dtype(), BLOCK, head, "auto")
    caches = [torch.randn(rows * width, kv_heads, 2 * BLOCK, head) for _ in range(layers)]
    kinds = [CpuAttention(caches, [head**-0.5] * layers, heads, isa, split_kv=True, native=n) for n in (False, True)]
    step = {name: torch.randn(rows, n, head) for name, n in (("q", heads), ("k", kv_heads), ("v", kv_heads))}
    step |= {
        "out": torch.empty_like(step["q"]),
        "query_start_loc": torch.arange(rows + 1, dtype=torch.int32),
        "seq_lens": torch.full((rows,), context, dtype=torch.int32),
        "block_table": torch.arange(rows * width, dtype=torch.int32).view(rows, width),
        "slot_mapping": torch.arange(rows, dtype=torch.int64) * width * BLOCK + context - 1,
    }
    schedules = [kind.schedule(step["query_start_loc"], step["seq_lens"]) for kind in kinds]
    return torch, lambda layer, native: kinds[native].layer(layer, step, schedules[native])


def _executor(
    page: mmap.mmap, shape: dict[str, int], rows: int, context: int, dtype: str, core: int, ready: Event
) -> None:
    _, attend = _attention(shape, rows, context, dtype, core)
    flags = memoryview(page).cast("q")
    ready.set()
    seen = 0
    while True:
        while flags[SENT] == seen:
            if flags[STOP]:
                return
        seen = flags[SENT]
        attend((seen - 1) % shape["layers"], flags[NATIVE])
        flags[DONE] = seen


def measure(shape: dict[str, int], rows: int, context: int, dtype: str) -> dict[str, float]:
    """Return milliseconds of a step of each kind, and of attention in the first, and the ratios of rows per second."""
    cores = physical_cores()
    page = mmap.mmap(-1, mmap.PAGESIZE)
    flags = memoryview(page).cast("q")
    forked = multiprocessing.get_context("fork")
    ready = forked.Event()
    args = (page, shape, rows, context, dtype, cores[-1], ready)
    peer = forked.Process(target=_executor, args=args, daemon=True)
    peer.start()
    ready.wait(120)
    torch, attend = _attention(shape, rows, context, dtype, cores[0])
    hidden, inner = shape["hidden"], shape["inner"]
    qkv = (shape["heads"] + 2 * shape["kv_heads"]) * shape["head_dim"]
    sizes = ((qkv, hidden), (hidden, shape["heads"] * shape["head_dim"]), (2 * inner, hidden), (hidden, inner))
    weights = [[torch.randn(*size) * 0.02 for size in sizes] for _ in range(shape["layers"])]
    linear = torch.nn.functional.linear

    def step(batch: int, offload: bool, native: bool = False) -> tuple[float, float]:
        flags[NATIVE] = native
        x = torch.randn(batch, hidden)
        attention, began = 0.0, time.perf_counter()
        for layer, (into, out, up, down) in enumerate(weights):
            q = linear(x, into)[:, : out.shape[1]]
            at = time.perf_counter()
            if offload:
                flags[SENT] += 1
            attend(layer, native)
            while offload and flags[DONE] != flags[SENT]:
                pass
            attention += time.perf_counter() - at
            x = linear(linear(linear(q, out), up)[:, :inner].contiguous(), down)
            x = x / x.float().std().to(x.dtype)
        return time.perf_counter() - began, attention

    with torch.inference_mode():
        for _ in range(3):
            step(rows, False), step(2 * rows, True), step(2 * rows, True, native=True)
        runs = [(step(rows, False), step(2 * rows, True), step(2 * rows, True, native=True)) for _ in range(REPEATS)]
    flags[STOP] = 1
    peer.join(5)
    local, both, native = (1e3 * statistics.median(run[i][0] for run in runs) for i in (0, 1, 2))
    attended = 1e3 * statistics.median(run[0][1] for run in runs)
    return {
        "rows": rows,
        "context": context,
        "local_ms": local,
        "local_attention_ms": attended,
        "twice_ms": both,
        "ratio": 2 * local / both,
        "native_ratio": 2 * local / native,
    }


if __name__ == "__main__":
    found = measure(MODELS[sys.argv[1]].shape, int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
    print(json.dumps({name: round(value, 3) for name, value in found.items()}))
