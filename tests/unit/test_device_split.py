"""A batch that is split for a GPU, on tensors of the CPU: what vLLM's stock kernels may see of it, and may not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.worker.gpu.block_table import BlockTables

from vllm_adrenaline.compat.block_tables import BlockTablesOnHost
from vllm_adrenaline.decode.device_split import BatchTables, DeviceRemoteAttention, MaskedBatch, RequestTables
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
        for i, token in enumerate(range(begin, end)):
            seen = past[: length - (end - begin) + i + 1]
            weights = torch.einsum("hd,thd->ht", queries[token], seen).softmax(dim=-1)
            output[token] = torch.einsum("ht,thd->hd", weights, seen)
    return output


def tokens_of(batch: Batch, row: int) -> range:
    return range(*batch.common.query_start_loc_cpu[row : row + 2].tolist())


@pytest.mark.parametrize("runner", RUNNERS)
@given(batch=st.lists(rows(), min_size=1, max_size=8), padding=st.integers(0, 3))
def test_stock_kernels_see_local_rows_as_they_are_and_nothing_of_other_pools(
    runner: Runner, batch: list[Row], padding: int
) -> None:
    given = Batch(batch, padding)
    random = torch.Generator().manual_seed(0)
    queries = torch.randn(len(given.slots), HEADS, HEAD, generator=random, dtype=torch.float64)
    keys = torch.randn(LOCAL_BLOCKS, BLOCK, HEADS, HEAD, generator=random, dtype=torch.float64)
    local = [number for number in range(len(batch)) if number not in given.offloaded]
    alone = attended(without(given, given.offloaded), queries, keys)

    common, _ = remote_of(given, runner).split(given.common)
    found = attended(common, queries, keys)

    for number in local:
        for token in tokens_of(given, number):
            assert torch.equal(found[token], alone[token])


def without(batch: Batch, rows: list[int]) -> CommonAttentionMetadata:
    """The metadata of the batch with empty sequences for these rows, made by the test itself."""
    lens, table = batch.common.seq_lens.clone(), batch.common.block_table_tensor.clone()
    for row in rows:
        lens[row] = batch.rows[row].query
        table[row] = 0
    return batch.common.replace(seq_lens=lens, block_table_tensor=table)


@pytest.mark.parametrize("runner", RUNNERS)
@given(batch=st.lists(rows(), min_size=1, max_size=8), padding=st.integers(0, 3))
def test_only_tokens_that_the_stock_kernel_is_to_write_have_a_slot(
    runner: Runner, batch: list[Row], padding: int
) -> None:
    given = Batch(batch, padding)
    remote_of(given, runner).split(given.common)
    expected = given.slots.clone()
    for number, row in enumerate(batch):
        if row.pool != space.LOCAL or row.is_received:
            expected[list(tokens_of(given, number))] = -1
    # In place: the same memory is what every layer's cache update is given.
    assert torch.equal(given.common.slot_mapping, expected)


@pytest.mark.parametrize("runner", RUNNERS)
@given(batch=st.lists(rows(), min_size=1, max_size=8), padding=st.integers(0, 3))
def test_the_host_knows_the_masked_lengths_and_the_bound_stays(runner: Runner, batch: list[Row], padding: int) -> None:
    given = Batch(batch, padding)
    known = given.common.seq_lens_cpu_upper_bound.clone()
    common, _ = remote_of(given, runner).split(given.common)
    expected = [row.query if row.pool != space.LOCAL else row.length for row in batch] + [0] * padding
    assert common.seq_lens_cpu_upper_bound.tolist() == common.seq_lens.tolist() == expected
    assert common.max_seq_len == max(row.length for row in batch)
    assert torch.equal(given.common.seq_lens_cpu_upper_bound, known), "what belongs to the runner is left alone"


@pytest.mark.parametrize("runner", RUNNERS)
@given(batch=st.lists(rows(), min_size=1, max_size=8))
def test_every_executor_is_given_its_rows(runner: Runner, batch: list[Row]) -> None:
    given = Batch(batch)
    remote = remote_of(given, runner)
    _, plan = remote.split(given.common)
    expected = {
        executor: found
        for executor in range(16)
        if (found := [n for n, row in enumerate(batch) if row.pool == space.remote_pool(executor)])
    }
    assert remote.transport.began == ([expected] if expected else [])  # type: ignore[attr-defined]
    assert (plan is None) == (not expected)
    if plan is not None:
        assert plan.has_local == any(row.pool == space.LOCAL for row in batch)


def test_nothing_is_read_back_from_the_device() -> None:
    batch = Batch([Row(0, 9), Row(1, 7), Row(0, 5, is_received=True), Row(space.MAPPED, 3)], device="meta")
    common, plan = remote_of(batch, device="meta").split(batch.common)
    # Tensors of this device have no values: whoever asks for one raises.
    assert common.block_table_tensor.is_meta
    assert plan is not None


def test_masked_tensors_stay_where_they_are_from_step_to_step() -> None:
    batch = Batch([Row(0, 9), Row(1, 7)])
    remote = remote_of(batch)
    addresses = set()
    for _ in range(3):
        common, _ = remote.split(batch.common)
        addresses.add((common.block_table_tensor.data_ptr(), common.seq_lens.data_ptr()))
    assert len(addresses) == 1
    assert batch.common.seq_lens.tolist() == [9, 7], "what belongs to the runner is left alone"


def test_a_step_does_not_see_the_masks_of_the_one_before() -> None:
    before, after = Batch([Row(1, 7), Row(1, 7, 3), Row(0, 3)]), Batch([Row(0, 7), Row(0, 7, 3), Row(1, 3)], padding=2)
    remote = remote_of(before)
    remote.split(before.common)
    tables, row_of = of_runner_v1(after)
    remote._tables = tables
    remote.begin_step(frozenset(), {}, row_of)
    common, _ = remote.split(after.common)
    assert common.seq_lens.tolist() == [7, 7, 1, 0, 0]
    assert after.common.slot_mapping.tolist() == [*after.slots[:4].tolist(), -1, -1, -1]


def test_a_step_of_local_rows_is_as_vllm_made_it() -> None:
    batch = Batch([Row(0, 9), Row(0, 7, 2)], padding=1)
    slots = batch.slots.clone()
    assert remote_of(batch).split(batch.common) == (batch.common, None)
    assert torch.equal(batch.common.slot_mapping, slots)


def test_rows_of_memory_that_is_mapped_on_cpu_are_lost_on_a_gpu() -> None:
    batch = Batch([Row(0, 9), Row(space.MAPPED, 7)])
    remote = remote_of(batch)
    _, plan = remote.split(batch.common)
    assert plan is None
    assert remote.agree_on_failed_rows(SimpleNamespace(world_size=1)) == [1]


def test_the_host_has_what_vllm_has_on_the_gpu() -> None:
    tables = block_tables()
    on_host = BlockTablesOnHost(tables)
    tables.append_block_ids(3, ([5, 6, 7],), overwrite=True)
    tables.append_block_ids(3, ([8],), overwrite=False)
    tables.append_block_ids(4, ([9],), overwrite=True)
    assert on_host.ids[3].tolist() == [5, 6, 7, 8, 0]
    tables.append_block_ids(3, ([1, 2],), overwrite=True)  # another request
    assert on_host.ids[3:5].tolist() == [[1, 2, 0, 0, 0], [9, 0, 0, 0, 0]]
    assert tables.num_blocks.np[0, 3:5].tolist() == [2, 1]
    with pytest.raises(RuntimeError, match="row capacity"):
        tables.append_block_ids(3, ([3, 4, 5, 6],), overwrite=False)
    assert on_host.ids[3].tolist() == [1, 2, 0, 0, 0]
