"""Batches of local and offloaded rows, as vLLM's model runners describe them, and a worker that splits them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.worker.gpu.block_table import BlockTables

from vllm_adrenaline.compat.block_tables import BlockTablesOnHost
from vllm_adrenaline.decode.device_split import BatchTables, DeviceRemoteAttention, RequestTables
from vllm_adrenaline.decode.masked_batch import MaskedBatch
from vllm_adrenaline.kv import space
from vllm_adrenaline.placement.patience import Patience

BLOCK, WIDTH, LOCAL_BLOCKS, HEADS, HEAD = 4, 5, 64, 2, 8
MOST_ROWS, MOST_TOKENS = 12, 40


@dataclass(frozen=True)
class Row:
    """A request of a batch: the pool of its blocks, its tokens, and how many of them are new."""

    pool: int
    length: int
    query: int = 1
    is_received: bool = False


@st.composite
def rows(draw: st.DrawFn) -> Row:
    pool = draw(st.sampled_from([space.LOCAL, space.LOCAL, space.remote_pool(0), space.remote_pool(15), space.MAPPED]))
    length = draw(st.integers(1, BLOCK * WIDTH))
    is_received = draw(st.booleans())
    return Row(pool, length, 1 if is_received else draw(st.integers(1, min(length, 3))), is_received)


class Batch:
    """What a model runner has of some rows: on the host, and in vLLM's metadata.

    `padding`: rows, and tokens, behind them. `index`: of each request in model runner V2.
    """

    def __init__(self, batch: list[Row], padding: int = 0, device: str = "cpu") -> None:
        self.rows, total = batch, len(batch) + padding
        blocks = iter(range(1, LOCAL_BLOCKS))
        # Behind the blocks of a row is what earlier requests have left there.
        self.table = torch.full((total, WIDTH), space.remote_id(3, 7), dtype=torch.int32)
        self.table[len(batch) :] = 0
        lens, queries = torch.zeros(total, dtype=torch.int32), torch.zeros(total, dtype=torch.int32)
        for number, row in enumerate(batch):
            for i in range(-(-row.length // BLOCK)):
                self.table[number, i] = row.pool << space.INDEX_BITS | next(blocks)
            lens[number], queries[number] = row.length, row.query
        starts = torch.cat([torch.zeros(1, dtype=torch.int32), queries.cumsum(0, dtype=torch.int32)])
        self.index = np.random.default_rng(len(batch)).permutation(MOST_ROWS)[: len(batch)]
        self.slots = torch.full((int(starts[-1]) + padding,), -1, dtype=torch.int64)
        for number, row in enumerate(batch):
            for i, position in enumerate(range(row.length - row.query, row.length)):
                self.slots[int(starts[number]) + i] = self.slot(number, position)
        self.common = CommonAttentionMetadata(
            query_start_loc=starts.to(device),
            query_start_loc_cpu=starts,
            seq_lens=lens.to(device),
            num_reqs=total,
            num_actual_tokens=len(self.slots),
            max_query_len=int(queries.max()),
            max_seq_len=int(lens.max()),
            block_table_tensor=self.table.to(device),
            slot_mapping=self.slots.clone().to(device),
            seq_lens_cpu_upper_bound=lens.clone(),
            req_idx=self.index,
        )

    def slot(self, row: int, position: int) -> int:
        """As model runner V2 computes it: in 32 bits, which the slots of other pools do not fit into."""
        product = np.array(int(self.table[row, position // BLOCK]), dtype=np.int64) * BLOCK
        return int(product.astype(np.int32)) + position % BLOCK

    def in_pool(self, pool: int) -> CommonAttentionMetadata:
        """The metadata as the owner of a pool would have it: its own rows as they are, and of the others nothing."""
        table, lens = self.table.clone(), torch.tensor([row.length for row in self.rows], dtype=torch.int32)
        for number, row in enumerate(self.rows):
            if row.pool == pool:
                table[number] &= space.MAX_BLOCKS - 1
            else:
                table[number], lens[number] = 0, row.query
        return self.common.replace(block_table_tensor=table, seq_lens=lens)

    @property
    def received(self) -> frozenset[str]:
        return frozenset(str(number) for number, row in enumerate(self.rows) if row.is_received)

    @property
    def offloaded(self) -> list[int]:
        return [number for number, row in enumerate(self.rows) if row.pool != space.LOCAL]


class Transport:
    """A data plane that only notes which rows it is given, by executor."""

    times_ns = (0, 0)

    def __init__(self) -> None:
        self.began: list[dict[int, list[int]]] = []
        self.calls: list[tuple[Any, ...]] = []

    def begin(self, split: Any, channels: dict[int, Any], budget_s: tuple[float, float]) -> None:
        self.began.append({executor: split.rows(executor) for executor in channels})

    def send(self, layer: int, *qkv: torch.Tensor) -> None:
        self.calls.append(("send", layer))

    def receive(self, layer: int, output: torch.Tensor) -> int:
        self.calls.append(("receive", layer))
        return 0

    def end(self) -> int:
        return 0


def of_runner_v1(batch: Batch) -> tuple[BatchTables, dict[str, int]]:
    """The tables that model runner V1 has, and its row of each request."""
    table = torch.zeros((MOST_ROWS, WIDTH), dtype=torch.int32)
    table[: len(batch.rows)] = batch.table[: len(batch.rows)]
    blocks = SimpleNamespace(get_cpu_tensor=lambda: table)
    runner: Any = SimpleNamespace(input_batch=SimpleNamespace(num_reqs=len(batch.rows), block_table=[blocks]))
    return BatchTables(runner), {str(row): row for row in range(len(batch.rows))}


def of_runner_v2(batch: Batch) -> tuple[RequestTables, dict[str, int]]:
    """The tables that model runner V2 has, and its index of each request."""
    tables = block_tables()
    on_host = BlockTablesOnHost(tables)
    for row, index in enumerate(batch.index):
        first, rest = batch.table[row, :1].tolist(), batch.table[row, 1:].tolist()
        tables.append_block_ids(int(index), (first,), overwrite=True)
        tables.append_block_ids(int(index), (rest,), overwrite=False)
    return RequestTables(on_host), {str(row): int(index) for row, index in enumerate(batch.index)}


def block_tables(rows: int = MOST_ROWS) -> BlockTables:
    """vLLM's block tables of model runner V2, without the GPU's side of them."""
    tables = object.__new__(BlockTables)
    tables.num_kv_cache_groups = 1
    tables.num_blocks = SimpleNamespace(np=np.zeros((1, rows), dtype=np.int32))
    tables.block_tables = [SimpleNamespace(gpu=torch.zeros((rows, WIDTH)), stage_write=lambda *_: None)]
    return tables


RUNNERS = (of_runner_v1, of_runner_v2)
Runner = Callable[[Batch], tuple[Any, dict[str, int]]]


def remote_of(batch: Batch, runner: Runner = of_runner_v1, device: str = "cpu") -> DeviceRemoteAttention:
    """The remote attention of a worker with sixteen executors, in the step of a batch."""
    links: list[Any] = [SimpleNamespace(channel=object(), is_writing=False) for _ in range(16)]
    tables, row_of = runner(batch)
    masked = MaskedBatch(MOST_ROWS, MOST_TOKENS, WIDTH, torch.device(device))
    remote = DeviceRemoteAttention(
        links, Transport(), None, ["a"], BLOCK, counts_rows=False, patience=Patience(1.0), tables=tables, masked=masked
    )
    remote.begin_step(batch.received, {}, row_of)
    return remote


def attended(common: CommonAttentionMetadata, queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """Causal attention by the metadata alone, as a stock kernel reads it. Keys are the values, too.

    Blocks of other pools are outside of `keys` [blocks, block, heads, head]: to read one raises.
    """
    output = torch.zeros_like(queries)
    for row in range(common.num_reqs):
        begin, end = common.query_start_loc[row : row + 2].tolist()
        length = int(common.seq_lens[row])
        blocks = common.block_table_tensor[row, : -(-length // BLOCK)].long()
        past = keys[blocks].reshape(-1, HEADS, HEAD)[:length]
        scores = torch.einsum("qhd,thd->qht", queries[begin:end], past)
        is_later = torch.arange(length) > torch.arange(length - (end - begin), length).unsqueeze(1)
        weights = scores.masked_fill(is_later.unsqueeze(1), float("-inf")).softmax(dim=-1)
        output[begin:end] = torch.einsum("qht,thd->qhd", weights, past)
    return output
