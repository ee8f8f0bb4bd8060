"""A decode step on a GPU with an attention executor beside it: what it takes, and what of it is waiting.

    python tools/build_cuda.py library LIBRARY
    python benchmarks/executor_gpu.py LIBRARY [--mps] [--quick] [--json FILE]

The executor is a process, attached as a decode engine attaches it; vLLM is not needed. The decode worker attends some
rows itself, by the same kernel, and offloads as many: plans from host to host, layers from GPU to GPU. Beside that are
its own rows alone, and all rows attended by itself. Nothing but attention is in a step. Both are on one GPU, so what
the executor reads is taken from the decode worker's bandwidth: this measures the way there and back, not the gain.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).parent))
import gpu_timing
import mps
import report
import torch

from tests.gpu.executor_world import BLOCK, Batch, Decode, Prefill, address_in, executor_at
from vllm_adrenaline.native import cuda, cuda_library
from vllm_adrenaline.transport.shape import Shape

LAYERS, BLOCKS, CONTEXT = 32, 9000, 1024
SHAPE = Shape(64, 64, 96, 32, 8, 128, torch.bfloat16)
ROWS, SHARES, WARM = (4, 16, 64), (0.3, 1.0), 3


class Local:
    """The decode worker's own rows, attended by the kernel on all of the GPU."""

    def __init__(self, rows: int, cache: torch.Tensor) -> None:
        library = cuda_library.load()
        table = torch.randperm(BLOCKS, device="cuda")[: rows * (CONTEXT // BLOCK)].int().view(rows, -1)
        heads = {"q": SHAPE.num_heads, "k": SHAPE.num_kv_heads, "v": SHAPE.num_kv_heads, "out": SHAPE.num_heads}
        step = {n: torch.randn(rows, h, SHAPE.head_size, device="cuda", dtype=SHAPE.dtype) for n, h in heads.items()}
        step |= {
            "query_start_loc": torch.arange(rows + 1, device="cuda", dtype=torch.int32),
            "seq_lens": torch.full((rows,), CONTEXT, device="cuda", dtype=torch.int32),
            "block_table": table,
            "slot_mapping": table[:, -1].long() * BLOCK + BLOCK - 1,
        }
        layers = [cuda.Layer(cache[i, :, 0], cache[i, :, 1], SHAPE.head_size**-0.5) for i in range(LAYERS)]
        self._kind = cuda.kind_of(step["q"], layers[0].keys)
        resources = library.prepare(self._kind)
        self._blocks, self._library = library.blocks(resources, 1.0), library
        self._work = library.workspace(self._kind, self._blocks, rows, "cuda")
        self._calls = [cuda.call_of(step, layer, self._work, resources.stages) for layer in layers]
        self._kept = step, layers

    def plan(self) -> None:
        self._library.plan(self._calls[0], torch.cuda.current_stream().cuda_stream)

    def layer(self, number: int) -> None:
        self._library.attend(self._calls[number], self._kind, self._blocks, torch.cuda.current_stream().cuda_stream)

    def step(self) -> None:
        self.plan()
        for number in range(LAYERS):
            self.layer(number)


def milliseconds(launch: Callable[[], object], repeats: int, begin: Callable[[], object] | None = None) -> float:
    """Return the median time of a launch, each after `begin`, which is not counted."""
    found = []
    for _ in range(WARM + repeats):
        if begin is not None:
            begin()
        found += gpu_timing.times(launch, 1)
    return 1e3 * report.median(found[WARM:])


def measure(decode: Decode, prefill: Prefill, rows: int, own: torch.Tensor, repeats: int) -> dict[str, float]:
    """Return the times of steps with `rows` offloaded and as many local rows, and what beside."""
    local, everything = Local(rows, own), Local(2 * rows, own)
    batch = Batch(prefill, [CONTEXT - 1] * rows)
    batch.draw()
    plan = decode.begin(batch)

    def offloaded() -> None:
        local.plan()
        for number, (q, k, v, out) in enumerate(batch.layers):
            plan.send(number, q, k, v)
            local.layer(number)
            plan.receive(number, out)

    graph = gpu_timing.captured(offloaded)
    graph.replay()  # the step that was begun before
    assert not decode.remote.transport.end()
    times = {
        "local_ms": milliseconds(gpu_timing.captured(local.step).replay, repeats),
        "all_local_ms": milliseconds(gpu_timing.captured(everything.step).replay, repeats),
        "replayed_ms": milliseconds(graph.replay, repeats, lambda: decode.begin(batch)),
        "launched_ms": milliseconds(offloaded, repeats, lambda: decode.begin(batch)),
    }
    before = decode.remote.transport.times_ns
    decode.begin(batch)
    graph.replay()
    assert not decode.remote.transport.end()
    waited = decode.remote.transport.times_ns[1] - before[1]
    busy = decode.link.attended[2]
    decode.begin(batch)
    graph.replay()
    assert not decode.remote.transport.end()
    return times | {"waited_ms": waited / 1e6, "executor_ms": (decode.link.attended[2] - busy) / 1e6}


def main() -> None:
    options = mps.options_of(__file__, __doc__ or "", "under 30 seconds, with fewer repeats")
    os.environ[cuda_library.PATH] = str(options.library.resolve())
    has_mps = mps.is_on()
    prefill, points = Prefill(SHAPE, LAYERS, BLOCKS), []
    own = torch.randn(prefill.cache.shape, device="cuda", dtype=SHAPE.dtype)
    names = ("local_ms", "all_local_ms", "replayed_ms", "launched_ms", "waited_ms", "executor_ms")
    print(f"{torch.cuda.get_device_name()}; {LAYERS} layers, {CONTEXT} tokens a row; {'MPS' if has_mps else 'no MPS'}")
    print(f"{'share':<7}{'rows':>6}" + "".join(f"{name:>14}" for name in names))
    for share in SHARES:
        with tempfile.TemporaryDirectory() as folder, executor_at(address_in(Path(folder)), prefill, share):
            decode = Decode(address_in(Path(folder)), prefill)
            for rows in ROWS:
                found = measure(decode, prefill, rows, own, 5 if options.quick else 30)
                print(f"{share:<7}{rows:>6}" + "".join(f"{found[name]:>14.3f}" for name in names), flush=True)
                points.append({"share": share, "rows": rows, **found})
            decode.remote.close()
    report.finish({"gpu": torch.cuda.get_device_name(), "mps": has_mps, "points": points}, options.json)


if __name__ == "__main__":
    main()
