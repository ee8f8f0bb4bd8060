"""The fused append and attention on a GPU: time, bytes, and share of the bandwidth that a copy reaches.

    python tools/build_cuda.py library LIBRARY
    python benchmarks/kernel_gpu.py LIBRARY [--quick] [--json FILE]

Over batch, context and the share of multiprocessors for which the grid is sized. That share is not enforced: blocks of
a small grid may still run on different multiprocessors. A green context, or MPS, around this program enforces it.

Each launch has a cache of its own, of several, so that keys and values come from memory. Launches are in a CUDA graph.
GB/s counts keys and values that are read. A copy's GB/s counts what it reads and what it writes.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import report
import torch

from vllm_adrenaline.native import cuda

BLOCK, HEADS, KV_HEADS, HEAD = 16, 32, 8, 128
BATCHES, CONTEXTS, SHARES = (1, 16, 64, 128), (512, 2048, 4096, 16384), (1.0, 0.5, 0.2)
CACHE_BYTES = 2 << 30
"""Of all caches together, far more than any L2 holds."""
LAUNCHES = 8
"""In a graph."""


def seconds(work: Callable[[], None], repeats: int) -> float:
    """Return the median time of `work`, which must be captured, by events."""
    work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    times = []
    for _ in range(repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1e3)
    return report.median(times)


def copy_bandwidth(repeats: int) -> float:
    """Return bytes read and written a second by a copy of 1 GiB."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    to = torch.empty_like(source)
    return 2 * source.numel() / seconds(lambda: to.copy_(source), repeats)


def step_of(batch: int, context: int, width: int) -> dict[str, torch.Tensor]:
    """Return rows of one token each, whose blocks lie in no order, and which append."""
    table = torch.randperm(batch * width, device="cuda").int().view(batch, width)
    last = (context - 1) // BLOCK
    sizes = (("q", HEADS), ("k", KV_HEADS), ("v", KV_HEADS), ("out", HEADS))
    made = {name: torch.randn(batch, n, HEAD, device="cuda", dtype=torch.bfloat16) for name, n in sizes}
    return made | {
        "query_start_loc": torch.arange(batch + 1, device="cuda", dtype=torch.int32),
        "seq_lens": torch.full((batch,), context, device="cuda", dtype=torch.int32),
        "block_table": table,
        "slot_mapping": table[:, last].long() * BLOCK + (context - 1) % BLOCK,
    }


def attention(library: cuda.CudaLibrary, batch: int, context: int, share: float, repeats: int) -> tuple[float, int]:
    """Return seconds and bytes of keys and values of one launch."""
    width = -(-context // BLOCK)
    step = step_of(batch, context, width)
    each = 2 * batch * width * BLOCK * KV_HEADS * HEAD * 2
    count = max(2, min(LAUNCHES, CACHE_BYTES // each))
    caches = [
        torch.randn(2, batch * width, BLOCK, KV_HEADS, HEAD, device="cuda", dtype=torch.bfloat16) for _ in range(count)
    ]
    kind = cuda.kind_of(step["q"], caches[0])
    resources = library.prepare(kind)
    blocks = library.blocks(resources, share)
    work = library.workspace(kind, blocks, batch, "cuda")
    calls = [cuda.call_of(step, cuda.Layer(cache[0], cache[1], HEAD**-0.5), work, resources.stages) for cache in caches]
    library.plan(calls[0], torch.cuda.current_stream().cuda_stream)

    def launch() -> None:
        stream = torch.cuda.current_stream().cuda_stream
        for number in range(LAUNCHES):
            library.attend(calls[number % count], kind, blocks, stream)

    return seconds(launch, repeats) / LAUNCHES, 2 * batch * context * KV_HEADS * HEAD * 2


def main() -> None:
    parser = report.parser(__doc__ or "")
    parser.add_argument("library", type=Path)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("needs a GPU, and torch with CUDA")
    library = cuda.CudaLibrary(options.library)
    repeats = 10 if options.quick else 50
    copied = copy_bandwidth(repeats)
    print(f"{torch.cuda.get_device_name()}: a copy reads and writes {copied / 1e9:.0f} GB/s")
    points = []
    for batch in BATCHES:
        for context in CONTEXTS:
            if batch * context > 128 * 4096 or (options.quick and (batch, context) not in ((64, 4096), (16, 512))):
                continue
            for share in SHARES:
                time, size = attention(library, batch, context, share, repeats)
                point = {"batch": batch, "context": context, "share": share, "us": time * 1e6, "mb": size / 1e6}
                point |= {"gb_s": size / time / 1e9, "of_copy": size / time / copied}
                print(" ".join(f"{name} {value:9.4g}" for name, value in point.items()), flush=True)
                points.append(point)
    report.finish({"gpu": torch.cuda.get_device_name(), "copy_gb_s": copied / 1e9, "points": points}, options.json)


if __name__ == "__main__":
    main()
