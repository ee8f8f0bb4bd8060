"""A prefill engine's KV cache, its attention executor as a process, a decode worker: on one GPU, without vLLM.

The test's process is prefill worker and decode worker in one. The executor, its protocol, the link to it and the steps
are those of engines.
"""

from __future__ import annotations

import contextlib
import math
import os
import random
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import msgspec
import torch

if find_spec("vllm") is None:  # one class of it is a base of ours
    name = "vllm.distributed.kv_transfer.kv_connector.v1.base"
    for depth in range(name.count(".") + 1):
        sys.modules[".".join(name.split(".")[: depth + 1])] = ModuleType(name)
    sys.modules[name].KVConnectorWorkerMetadata = object  # type: ignore[attr-defined]

from vllm_adrenaline.attention.spec import ExecutorSpec
from vllm_adrenaline.control import messages
from vllm_adrenaline.control.kv_export import GpuKVExport, GpuLayerSpec
from vllm_adrenaline.decode.link import Link
from vllm_adrenaline.decode.remote_attention import RemoteAttention, StepPlan
from vllm_adrenaline.kv.space import remote_id
from vllm_adrenaline.native import cuda_library
from vllm_adrenaline.native.cuda_channel import ChannelKernels
from vllm_adrenaline.placement.patience import Patience
from vllm_adrenaline.prefill.executor_pool import ExecutorProcess
from vllm_adrenaline.system import device_memory
from vllm_adrenaline.transport.gpu import GpuSteps
from vllm_adrenaline.transport.shape import Shape

BLOCK, TIMEOUT_S = 16, 1.0
IDENTITY = messages.Identity(
    protocol=messages.PROTOCOL,
    vllm="0.33.0",
    model="m",
    architecture="LlamaForCausalLM",
    dtype="bfloat16",
    kv_cache_dtype="auto",
    num_layers=4,
    num_heads=16,
    num_kv_heads=2,
    head_size=128,
    block_size=BLOCK,
    kv_layout="NHD",
    isa="cuda",
    split_kv=True,
    tensor_parallel_size=1,
)


@dataclass(frozen=True)
class Common:
    """What RemoteAttention reads of vLLM's CommonAttentionMetadata; on the host."""

    num_reqs: int
    block_table_tensor: torch.Tensor
    query_start_loc: torch.Tensor
    seq_lens: torch.Tensor
    slot_mapping: torch.Tensor

    def replace(self, **changes: Any) -> Common:
        return replace(self, **changes)


class Prefill:
    """A KV cache in GPU memory, as vLLM lays it out for FlashAttention: [layers, blocks, 2, block size, Hk, D]."""

    def __init__(self, shape: Shape, layers: int, blocks: int) -> None:
        self.shape, self.layers, self.blocks = shape, layers, blocks
        sizes = (layers, blocks, 2, BLOCK, shape.num_kv_heads, shape.head_size)
        self.memory = device_memory.allocate(math.prod(sizes) * 2)
        self.cache = self.memory.tensor()[: math.prod(sizes) * 2].view(torch.bfloat16).view(sizes)
        self.cache.normal_()
        torch.cuda.synchronize()

    def export(self) -> GpuKVExport:
        """Return how it is read."""
        plane = BLOCK * self.shape.num_kv_heads * self.shape.head_size
        layers = [
            GpuLayerSpec(str(i), 0, 2 * i * self.blocks * 2 * plane, 2 * (i * self.blocks * 2 + 1) * plane, 128**-0.5)
            for i in range(self.layers)
        ]
        shape = [self.blocks, BLOCK, self.shape.num_kv_heads, self.shape.head_size]
        strides = [2 * plane, self.shape.num_kv_heads * self.shape.head_size, self.shape.head_size, 1]
        cpus = sorted(os.sched_getaffinity(0))
        handles = [device_memory.export(self.memory)]
        return GpuKVExport(0, handles, shape, strides, "bfloat16", "bfloat16", self.shape.num_heads, layers, cpus, 1)


@contextlib.contextmanager
def executor_at(address: str, prefill: Prefill, share: float = 1.0) -> Iterator[ExecutorProcess]:
    """An executor process that serves until the context ends."""
    cpus = sorted(os.sched_getaffinity(0))
    identity = identity_of(prefill)
    process = ExecutorProcess(ExecutorSpec(0, address, identity, prefill.export(), -1, cpus, 1, 5.0, share))
    try:
        process.wait_ready()
        yield process
    finally:
        process.stop()


def identity_of(prefill: Prefill) -> messages.Identity:
    """Return the identity of engines with this KV cache."""
    heads = {"num_heads": prefill.shape.num_heads, "num_kv_heads": prefill.shape.num_kv_heads}
    return msgspec.structs.replace(IDENTITY, num_layers=prefill.layers, **heads)


class Direct(Link):
    """A link that knows where its executor is."""

    def _find(self) -> str:
        self.is_far = False
        return self.address


class Decode:
    """A decode worker: its remote attention over one executor."""

    def __init__(self, address: str, prefill: Prefill, engine: str = "d") -> None:
        kernels = ChannelKernels(cuda_library.load().path)
        names = [str(index) for index in range(prefill.layers)]
        self.prefill, self.shape = prefill, prefill.shape
        self.link = Direct(address, identity_of(prefill), engine, 0, names, self.shape, TIMEOUT_S, kernels=kernels)
        self.link.attach((60.0, 60.0))
        steps = GpuSteps(self.shape, prefill.layers)
        self.remote = RemoteAttention([self.link], steps, None, names, BLOCK, True, Patience(TIMEOUT_S))

    def begin(self, batch: Batch) -> StepPlan:
        """Begin a step of the batch."""
        self.remote.begin_step(frozenset(), {}, {})
        _, plan = self.remote.split(batch.common())
        assert plan is not None
        return plan

    def step(self, batch: Batch) -> list[torch.Tensor]:
        """Have a step attended; return each layer's output [T, Hq, D]. Other rows stay as they were."""
        batch.draw()
        plan = self.begin(batch)
        outs = []
        for layer, (q, k, v, out) in enumerate(batch.layers):
            plan.send(layer, q, k, v)
            plan.receive(layer, out)
            outs.append(out)
        return outs


class Batch:
    """Rows of which some are offloaded. Row i has `lens[i]` tokens, of which the last `queries` are new."""

    def __init__(
        self,
        prefill: Prefill,
        lens: list[int],
        local: frozenset[int] = frozenset(),
        queries: int = 1,
        blocks: range | None = None,
    ) -> None:
        """`blocks`: those that it may have; None: all."""
        self.prefill, self.lens, self.local, self.queries = prefill, lens, local, queries
        width = prefill.shape.max_blocks
        usable = blocks or range(prefill.blocks)
        free = random.sample(usable, len(usable))
        self.table = torch.zeros(len(lens), width, dtype=torch.int32)
        for row in range(len(lens)):
            need = -(-(lens[row] + 64) // BLOCK)
            self.table[row, :need] = torch.tensor([free.pop() for _ in range(min(need, width))])
        self.layers: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]] = []

    def common(self) -> Common:
        rows = len(self.lens)
        ids = self.table + remote_id(0, 0)
        ids[sorted(self.local)] = self.table[sorted(self.local)]
        starts = torch.arange(rows + 1, dtype=torch.int32) * self.queries
        lens = torch.tensor(self.lens, dtype=torch.int32)
        return Common(rows, ids, starts, lens, torch.zeros(rows * self.queries, dtype=torch.int64))

    def draw(self) -> None:
        """Draw q, k, v and what is in the outputs before, for every layer."""
        shape, tokens = self.prefill.shape, len(self.lens) * self.queries

        def draw(heads: int) -> torch.Tensor:
            return torch.randn(tokens, heads, shape.head_size, device="cuda", dtype=torch.bfloat16)

        queries, keys = shape.num_heads, shape.num_kv_heads
        self.layers = [(draw(queries), draw(keys), draw(keys), draw(queries)) for _ in range(self.prefill.layers)]

    def grow(self) -> None:
        """Have one more token in each row."""
        self.lens = [length + 1 for length in self.lens]

    def expected(self, layer: int) -> torch.Tensor:
        """Return the layer's output in double precision [T, Hq, D], over a cache with the new tokens. Local rows: 0."""
        q, k, v, _ = self.layers[layer]
        cache = self.prefill.cache[layer].double()
        out = torch.zeros(q.shape, dtype=torch.float64, device="cuda")
        group = self.prefill.shape.num_heads // self.prefill.shape.num_kv_heads
        for row, length in enumerate(self.lens):
            if row in self.local:
                continue
            blocks = self.table[row, : -(-length // BLOCK)].long().cuda()
            keys, values = (cache[blocks, part].flatten(0, 1)[:length] for part in (0, 1))
            new = slice(row * self.queries, (row + 1) * self.queries)
            keys[length - self.queries :], values[length - self.queries :] = k[new].double(), v[new].double()
            for index in range(self.queries):
                seen = length - self.queries + index + 1
                logits = torch.einsum(
                    "hd,thd->ht",
                    q[row * self.queries + index].double(),
                    keys[:seen].repeat_interleave(group, 1),
                )
                weights = (logits * 128**-0.5).softmax(-1)
                out[row * self.queries + index] = torch.einsum(
                    "ht,thd->hd", weights, values[:seen].repeat_interleave(group, 1)
                )
        return out

    def hold(self, outs: list[torch.Tensor]) -> None:
        """Compare the outputs of offloaded rows with what they must be."""
        for layer, out in enumerate(outs):
            wanted = self.expected(layer)
            rows = [t for t in range(len(out)) if t // self.queries not in self.local]
            torch.testing.assert_close(out[rows].double(), wanted[rows], atol=0.02, rtol=0.02)


def address_in(folder: Path) -> str:
    """Return where an executor may listen."""
    return f"ipc://{folder}/e"
