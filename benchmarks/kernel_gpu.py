"""The fused append and attention on a GPU: time, bytes, and share of the bandwidth that a copy reaches.

    python tools/build_cuda.py library LIBRARY
    python benchmarks/kernel_gpu.py LIBRARY [--quick] [--json FILE]

Over batch and context, and then over the share of the multiprocessors, which a green context enforces (torch 2.11 has
them). A copy within the same share is beside it. If FlashInfer can be imported, its append and paged decode are beside
it too: the faster of its two decode kernels.

Each launch has a cache of its own, of several, so that keys and values come from memory. Launches are in a CUDA graph,
but for shares. GB/s counts keys and values that are read. A copy's GB/s counts what it reads and what it writes.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
import gpu_timing
import report
import torch

from vllm_adrenaline.native import cuda

BLOCK, HEADS, KV_HEADS, HEAD = 16, 32, 8, 128
BATCHES, CONTEXTS, SHARES = (1, 16, 64, 128), (512, 2048, 4096, 16384), (0.1, 0.2, 0.3, 0.4, 0.5, 0.75)
CACHE_BYTES = 2 << 30
"""Of all caches together, far more than any L2 holds."""
LAUNCHES = 8
"""In a graph."""


def events(work: Callable[[], object], repeats: int) -> float:
    """Return the median time of `work` in seconds."""
    return report.median(gpu_timing.times(work, repeats))


def seconds(work: Callable[[], object], repeats: int) -> float:
    """Return the median time of `work`, captured in a graph."""
    work()
    torch.cuda.synchronize()
    return events(gpu_timing.captured(work).replay, repeats)


def copy_bandwidth(repeats: int) -> float:
    """Return bytes read and written a second by a kernel that reads 1 GiB, adds 1, and writes it.

    cudaMemcpy reaches less: 2.7 TB/s against 4.2 on an H200.
    """
    source = torch.randn(1 << 28, device="cuda")
    to = torch.empty_like(source)

    def copy() -> None:
        torch.add(source, 1.0, out=to)

    copy()
    return 2 * source.numel() * 4 / events(copy, repeats)


@contextmanager
def partition(multiprocessors: int) -> Iterator[None]:
    """Have kernels run on so many multiprocessors."""
    from torch.cuda.green_contexts import GreenContext

    context: Any = GreenContext.create(multiprocessors, 0)
    context.set_context()
    try:
        yield
    finally:
        torch.cuda.synchronize()
        context.pop_context()


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


def caches_of(batch: int, width: int, *shape: int) -> list[torch.Tensor]:
    """Return caches of `batch` rows of `width` blocks; `shape` is a block's."""
    each = 2 * batch * width * BLOCK * KV_HEADS * HEAD * 2
    count = max(2, min(LAUNCHES, CACHE_BYTES // each))
    return [torch.randn(*shape, device="cuda", dtype=torch.bfloat16) for _ in range(count)]


Timer = Callable[[Callable[[], object], int], float]


def attention(
    library: cuda.CudaLibrary, batch: int, context: int, repeats: int, share: float = 1.0, timer: Timer = seconds
) -> float:
    """Return seconds of one launch."""
    width = -(-context // BLOCK)
    step = step_of(batch, context, width)
    caches = caches_of(batch, width, 2, batch * width, BLOCK, KV_HEADS, HEAD)
    kind = cuda.kind_of(step["q"], caches[0])
    resources = library.prepare(kind)
    blocks = library.blocks(resources, share)
    work = library.workspace(kind, blocks, batch, "cuda")
    calls = [cuda.call_of(step, cuda.Layer(cache[0], cache[1], HEAD**-0.5), work, resources.stages) for cache in caches]
    library.plan(calls[0], torch.cuda.current_stream().cuda_stream)

    def launch() -> None:
        stream = torch.cuda.current_stream().cuda_stream
        for number in range(LAUNCHES):
            library.attend(calls[number % len(calls)], kind, blocks, stream)

    launch()
    return timer(launch, repeats) / LAUNCHES


def flashinfer(batch: int, context: int, repeats: int, with_tensor_cores: bool) -> float:
    """Return seconds of FlashInfer's append and decode attention of the same."""
    import flashinfer as other

    width = -(-context // BLOCK)
    step = step_of(batch, context, width)
    caches = caches_of(batch, width, batch * width, 2, BLOCK, KV_HEADS, HEAD)
    rows = torch.arange(batch + 1, device="cuda", dtype=torch.int32)
    pages, positions = step["block_table"].flatten(), step["seq_lens"] - 1
    last = (step["seq_lens"] - 1) % BLOCK + 1
    decode = other.BatchDecodeWithPagedKVCacheWrapper(
        torch.empty(512 << 20, dtype=torch.uint8, device="cuda"),
        use_cuda_graph=True,
        use_tensor_cores=with_tensor_cores,
        paged_kv_indptr_buffer=torch.empty_like(rows),
        paged_kv_indices_buffer=torch.empty_like(pages),
        paged_kv_last_page_len_buffer=torch.empty_like(last),
    )
    kinds = {"q_data_type": torch.bfloat16, "kv_data_type": torch.bfloat16}
    decode.plan(rows * width, pages, last, HEADS, KV_HEADS, HEAD, BLOCK, **kinds)

    def launch() -> None:
        for number in range(LAUNCHES):
            cache = caches[number % len(caches)]
            other.append_paged_kv_cache(
                step["k"], step["v"], rows[:-1], positions, cache, pages, rows * width, last, kv_layout="NHD"
            )
            decode.run(step["q"], cache, out=step["out"])

    return seconds(launch, repeats) / LAUNCHES


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
    points, shares = [], []

    def say(point: dict[str, float]) -> dict[str, float]:
        print(" ".join(f"{name} {value:9.4g}" for name, value in point.items()), flush=True)
        return point

    for batch in BATCHES:
        for context in CONTEXTS:
            if batch * context > 128 * 4096 or (options.quick and (batch, context) not in ((64, 4096), (16, 512))):
                continue
            time, size = attention(library, batch, context, repeats), 2 * batch * context * KV_HEADS * HEAD * 2
            point = {"batch": batch, "context": context, "us": time * 1e6, "mb": size / 1e6}
            point |= {"gb_s": size / time / 1e9, "of_copy": size / time / copied}
            if find_spec("flashinfer") is not None:
                point["flashinfer_us"] = 1e6 * min(flashinfer(batch, context, repeats, way) for way in (False, True))
            points.append(say(point))
    batch, context = 64, 4096
    for share in SHARES if find_spec("torch.cuda.green_contexts") is not None else ():
        multiprocessors = torch.cuda.get_device_properties(0).multi_processor_count
        with partition(round(multiprocessors * share)):
            time = attention(library, batch, context, repeats, share, events)
            copied_there = copy_bandwidth(repeats)
        rate = 2 * batch * context * KV_HEADS * HEAD * 2 / time
        point = {"share": share, "us": time * 1e6, "gb_s": rate / 1e9, "of_copy": rate / copied}
        shares.append(say(point | {"copy_there_gb_s": copied_there / 1e9, "of_copy_there": rate / copied_there}))
    found = {"gpu": torch.cuda.get_device_name(), "copy_gb_s": copied / 1e9, "points": points, "shares": shares}
    report.finish(found, options.json)


if __name__ == "__main__":
    main()
