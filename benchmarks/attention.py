"""Decode attention on one core: vLLM's operator against the native one, which gives the same bits.

    python benchmarks/attention.py [--quick] [--json FILE]

KV caches of many layers, in turns, so that every layer comes from memory, as in an engine. In turns; medians.
GB/s: keys and values of all rows over the time of a layer.
"""

from __future__ import annotations

import os
import random
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import report

os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
os.environ["OMP_NUM_THREADS"] = "1"

import torch  # noqa: E402
from vllm.platforms import current_platform  # noqa: E402
from vllm.utils.math_utils import cdiv  # noqa: E402

from vllm_adrenaline.attention.kernels import CpuAttention  # noqa: E402
from vllm_adrenaline.attention.native_decode import ISA  # noqa: E402

LAYERS, BLOCK, DTYPE = 12, 128, torch.bfloat16
SHAPES = ((16, 512, 8, 8, 64), (8, 512, 8, 8, 64), (16, 2048, 8, 8, 64), (16, 512, 8, 2, 64), (16, 512, 32, 8, 128))
"""Rows, tokens of context, query heads, KV heads, head size."""


def step_of(rows: int, context: int, heads: int, kv_heads: int, head: int) -> dict[str, torch.Tensor]:
    """Return rows of one token each, whose blocks lie in no order."""
    width = cdiv(context, BLOCK)
    blocks = list(range(rows * width))
    random.Random(0).shuffle(blocks)
    made = {name: torch.randn(rows, n, head).to(DTYPE) for name, n in (("q", heads), ("k", kv_heads), ("v", kv_heads))}
    return made | {
        "out": torch.empty_like(made["q"]),
        "query_start_loc": torch.arange(rows + 1, dtype=torch.int32),
        "seq_lens": torch.full((rows,), context, dtype=torch.int32),
        "block_table": torch.tensor(blocks, dtype=torch.int32).view(rows, width),
        "slot_mapping": torch.full((rows,), -1),
    }


def measure(rows: int, context: int, heads: int, kv_heads: int, head: int, repeats: int) -> tuple[float, float]:
    """Return seconds of a layer by vLLM's operator and by the native one."""
    blocks = rows * cdiv(context, BLOCK)
    caches = [torch.randn(blocks, kv_heads, 2 * BLOCK, head).to(DTYPE) for _ in range(LAYERS)]
    scales = [head**-0.5] * LAYERS
    kinds = [CpuAttention(caches, scales, heads, ISA, split_kv=True, native=native) for native in (False, True)]
    step = step_of(rows, context, heads, kv_heads, head)
    schedules = [kind.schedule(step["query_start_loc"], step["seq_lens"]) for kind in kinds]
    if schedules[1] is not None:
        raise SystemExit("the native attention does not apply on this machine")
    times: list[list[float]] = [[], []]
    outputs: list[torch.Tensor] = []
    for _ in range(repeats):
        for kind, schedule, taken in zip(kinds, schedules, times, strict=True):
            began = time.perf_counter()
            for layer in range(LAYERS):
                kind.layer(layer, step, schedule)
            taken.append((time.perf_counter() - began) / LAYERS)
            outputs.append(step["out"].clone())
    if not all(torch.equal(output, outputs[0]) for output in outputs):
        raise SystemExit("the two give different bits")
    return report.median(times[0]), report.median(times[1])


def main() -> None:
    args = report.parser(__doc__.splitlines()[0]).parse_args()
    current_platform.import_kernels()
    torch.set_num_threads(1)
    result = {}
    print("| rows x context | query, KV heads x size | vLLM, us a layer | GB/s | native, us | GB/s | x |")
    print("|---|---|---|---|---|---|---|")
    for shape in SHAPES[:2] if args.quick else SHAPES:
        rows, context, heads, kv_heads, head = shape
        theirs, ours = measure(*shape, repeats=7 if args.quick else 25)
        size = rows * context * kv_heads * head * 2 * DTYPE.itemsize / 1e9
        print(
            f"| {rows} x {context} | {heads}, {kv_heads} x {head} | {1e6 * theirs:.0f} | {size / theirs:.1f} "
            f"| {1e6 * ours:.0f} | {size / ours:.1f} | {theirs / ours:.2f} |"
        )
        result["x".join(map(str, shape))] = {"vllm_us": 1e6 * theirs, "native_us": 1e6 * ours, "ratio": theirs / ours}
    report.finish(result, args.json)


if __name__ == "__main__":
    main()
