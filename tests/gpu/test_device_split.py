"""A batch on a GPU, split between a decode worker's own KV cache and an executor's, and attended by both.

The fused kernel stands for vLLM's stock one: it sees the masked batch, appends by the masked slots, and attends. The
host gives the batch's blocks and lengths, and waits for nothing before the end of the step.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.gpu.executor_world import BLOCK, Batch, Decode, Prefill, address_in, executor_at
from vllm_adrenaline.decode.device_split import DeviceRemoteAttention
from vllm_adrenaline.decode.masked_batch import MaskedBatch
from vllm_adrenaline.native import cuda, cuda_library
from vllm_adrenaline.native.cuda import CudaLibrary
from vllm_adrenaline.placement.patience import Patience
from vllm_adrenaline.transport.gpu import GpuSteps
from vllm_adrenaline.transport.shape import Shape

SHAPE = Shape(64, 128, 96, 16, 2, 128, torch.bfloat16)
LAYERS, BLOCKS, STEPS = 4, 2000, 12
LENS = [700, 1, 65, 64, 1400, 17, 333]


@dataclass(frozen=True)
class OnDevice:
    """What is read of vLLM's CommonAttentionMetadata: tensors of the GPU, and what the host knows."""

    num_reqs: int
    block_table_tensor: torch.Tensor
    query_start_loc: torch.Tensor
    query_start_loc_cpu: torch.Tensor
    seq_lens: torch.Tensor
    seq_lens_cpu_upper_bound: torch.Tensor
    slot_mapping: torch.Tensor

    def replace(self, _num_computed_tokens_cache: None = None, **changes: Any) -> OnDevice:
        return replace(self, **changes)


class HostTable:
    """The block table of one batch, on the host."""

    table: torch.Tensor

    def block_table(self, common: Any) -> torch.Tensor:
        return self.table

    def row(self, common: Any, index: int) -> int:
        return index


class Worker:
    """A decode worker with a KV cache of its own, beside an executor."""

    def __init__(self, address: str, prefill: Prefill) -> None:
        attached = Decode(address, prefill)
        self.link, self.own = attached.link, Prefill(SHAPE, LAYERS, BLOCKS)
        self.tables = HostTable()
        self.remote = DeviceRemoteAttention(
            [self.link],
            GpuSteps(SHAPE, LAYERS),
            None,
            [str(index) for index in range(LAYERS)],
            BLOCK,
            True,
            Patience(1.0),
            tables=self.tables,
            masked=MaskedBatch(SHAPE.max_rows, SHAPE.max_tokens, SHAPE.max_blocks, torch.device("cuda")),
        )
        self._library = cuda_library.load()

    def step(self, batch: Batch) -> None:
        """Attend a step of a batch, as an engine does: local rows here, the others by the executor."""
        host = batch.common()
        self.tables.table = host.block_table_tensor
        positions = torch.tensor(batch.lens) - 1
        slots = batch.table[torch.arange(len(batch.lens)), positions // BLOCK].long() * BLOCK + positions % BLOCK
        common = OnDevice(
            host.num_reqs,
            host.block_table_tensor.cuda(),
            host.query_start_loc.cuda(),
            host.query_start_loc,
            host.seq_lens.cuda(),
            host.seq_lens.clone(),
            slots.cuda(),
        )
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")  # from here on the host waits for nothing
        try:
            self.remote.begin_step(frozenset(), {}, {})
            seen, plan = self.remote.split(common)  # type: ignore[arg-type]
            assert plan is not None
            calls = self._calls(batch, seen)
            for layer, (q, k, v, out) in enumerate(batch.layers):
                plan.send(layer, q, k, v)
                calls.attend(layer)
                plan.receive(layer, out)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        report = self.remote.take_report()
        assert report is not None
        assert not report.failed

    def _calls(self, batch: Batch, seen: Any) -> Stock:
        return Stock(self._library, self.own, batch, seen)


class Stock:
    """What stands for vLLM's stock kernel over the worker's own KV cache."""

    def __init__(self, library: CudaLibrary, own: Prefill, batch: Batch, seen: Any) -> None:
        self._library = library
        common = {
            "query_start_loc": seen.query_start_loc,
            "seq_lens": seen.seq_lens,
            "block_table": seen.block_table_tensor,
            "slot_mapping": seen.slot_mapping,
        }
        layers = [cuda.Layer(own.cache[i, :, 0], own.cache[i, :, 1], 128**-0.5) for i in range(LAYERS)]
        steps = [common | dict(zip(("q", "k", "v", "out"), layer, strict=True)) for layer in batch.layers]
        self._kind = cuda.kind_of(steps[0]["q"], layers[0].keys)
        resources = library.prepare(self._kind)
        self._blocks = library.blocks(resources, 1.0)
        self._work = library.workspace(self._kind, self._blocks, len(batch.lens), "cuda")
        self._calls = [
            cuda.call_of(step, layer, self._work, resources.stages) for step, layer in zip(steps, layers, strict=True)
        ]
        library.plan(self._calls[0], torch.cuda.current_stream().cuda_stream)
        self._kept = steps, layers

    def attend(self, layer: int) -> None:
        self._library.attend(self._calls[layer], self._kind, self._blocks, torch.cuda.current_stream().cuda_stream)


@pytest.fixture(autouse=True)
def _library(library: CudaLibrary, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(cuda_library.PATH, str(library.path))


@pytest.mark.parametrize("local", [{0, 3, 6}, {4}, set()], ids=["some", "one", "none"])
def test_local_and_offloaded_rows_of_a_batch_on_the_gpu_are_attended_where_their_memory_is(
    local: set[int], tmp_path: Path
) -> None:
    prefill = Prefill(SHAPE, LAYERS, BLOCKS)
    with executor_at(address_in(tmp_path), prefill):
        worker = Worker(address_in(tmp_path), prefill)
        batch = Batch(prefill, [*LENS], frozenset(local))
        if local:
            of_ours = Batch(worker.own, [*LENS], frozenset(range(len(LENS))) - frozenset(local))
            of_ours.table = batch.table
        for _ in range(STEPS):
            batch.draw()
            untouched = worker.own.cache.clone()
            worker.step(batch)
            batch.hold([layer[3] for layer in batch.layers])
            if local:
                of_ours.layers, of_ours.lens = batch.layers, batch.lens
                of_ours.hold([layer[3] for layer in batch.layers])
            changed = (worker.own.cache != untouched).flatten(3).any(-1)  # [layers, blocks, 2]
            written = {int(batch.table[row, (batch.lens[row] - 1) // BLOCK]) for row in local}
            assert set(changed.any(-1).any(0).nonzero()[:, 0].tolist()) <= written, (
                "an offloaded token was written here"
            )
            batch.grow()
        worker.remote.close()
