"""The fused kernel on a GPU: what it appends, byte for byte, and what it attends, against double precision.

The steps are those of the emulator's tests. docs/gpu-status.md says where they ran.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.unit import cuda_cases
from tests.unit.cuda_cases import Case, Expected, Made
from tests.unit.cuda_emulator import ALL_KERNELS
from vllm_adrenaline.native import cuda

LONG = ((12_000, 1), (1, 1), (700, 3), (0, 0), (4096, 1), (129, 2), (64, 1), (65, 1), (9000, 1))
MODEL = Case(rows=LONG, kv_heads=2, group=8, received=frozenset({6}), moves_output=True)
CASES = {
    "plain": MODEL,
    "flat": replace(MODEL, flat=True),
    "window and sinks": replace(MODEL, window=130, has_sinks=True, is_hnd=True, block_size=64),
    "cap and many queries": replace(MODEL, soft_cap=5.0, group=16, rows=((900, 5), (5000, 4))),
    "one query head": replace(MODEL, group=1, block_size=128),
}


class OnGpu:
    """A step on the GPU, its launch, and what must come of it."""

    def __init__(self, library: cuda.CudaLibrary, case: Case, share: float = 1.0) -> None:
        made = cuda_cases.make(case)
        self._expected = Expected(made)
        self.step = {name: x.cuda() for name, x in made.step.items()}
        sinks = None if made.layer.sinks is None else made.layer.sinks.cuda()
        self.layer = replace(made.layer, keys=made.layer.keys.cuda(), values=made.layer.values.cuda(), sinks=sinks)
        self._library, self._kind = library, cuda.kind_of(self.step["q"], self.layer.keys)
        resources = library.prepare(self._kind)
        self._blocks = library.blocks(resources, share)
        self.work = library.workspace(self._kind, self._blocks, len(self.step["seq_lens"]), "cuda")
        self._call = cuda.call_of(self.step, self.layer, self.work, resources.stages)
        self._first = Made(
            {"out": self.step["out"].clone()},
            replace(self.layer, keys=self.layer.keys.clone(), values=self.layer.values.clone()),
            [],
        )

    def launch(self) -> None:
        stream = torch.cuda.current_stream().cuda_stream
        self._library.plan(self._call, stream)
        self._library.attend(self._call, self._kind, self._blocks, stream)

    def reset(self) -> None:
        """Put output and cache back to what they were before the launch."""
        self.step["out"].copy_(self._first.step["out"])
        self.layer.keys.copy_(self._first.layer.keys)
        self.layer.values.copy_(self._first.layer.values)

    def hold(self) -> torch.Tensor:
        """Compare what came with what must; return the output's bits."""
        torch.cuda.synchronize()
        self._expected.hold(self.step["out"].cpu(), self.layer.keys.cpu(), self.layer.values.cpu())
        assert not self.work.counters.any(), "counters are not left as they were"
        return self.step["out"].view(torch.int16).clone()


@pytest.mark.parametrize("kernel", ALL_KERNELS, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_a_step_is_appended_and_attended(case: str, kernel: tuple[str, str, int], library: cuda.CudaLibrary) -> None:
    scales = (0.05, 0.3) if kernel[1] == "Fp8" else (1.0, 1.0)
    on_gpu = OnGpu(library, replace(CASES[case], kernel=kernel, scales=scales))
    on_gpu.launch()
    on_gpu.hold()


@pytest.mark.parametrize("share", [0.1, 0.5])
def test_a_share_of_the_device_computes_the_same(share: float, library: cuda.CudaLibrary) -> None:
    on_gpu = OnGpu(library, MODEL, share)
    on_gpu.launch()
    on_gpu.hold()


def test_a_hundred_launches_give_the_same_bits(library: cuda.CudaLibrary) -> None:
    """Which block merges differs from launch to launch."""
    on_gpu = OnGpu(library, MODEL)
    on_gpu.launch()
    first = on_gpu.hold()
    for _ in range(100):
        on_gpu.reset()
        on_gpu.launch()
        assert torch.equal(on_gpu.step["out"].view(torch.int16), first)


def test_a_captured_launch_attends_what_is_there_when_it_is_replayed(library: cuda.CudaLibrary) -> None:
    on_gpu = OnGpu(library, MODEL)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        on_gpu.launch()
    on_gpu.reset()
    graph.replay()
    on_gpu.hold()
