"""A batch that is split for a GPU, on tensors of the CPU: what vLLM's stock kernels may see of it, and may not."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from vllm.v1.attention.backend import CommonAttentionMetadata

from tests.unit.split_cases import (
    BLOCK,
    HEAD,
    HEADS,
    LOCAL_BLOCKS,
    RUNNERS,
    Batch,
    Row,
    Runner,
    attended,
    block_tables,
    of_runner_v1,
    remote_of,
    rows,
)
from vllm_adrenaline.compat.block_tables import BlockTablesOnHost
from vllm_adrenaline.kv import space


def tokens_of(batch: Batch, row: int) -> range:
    return range(*batch.common.query_start_loc_cpu[row : row + 2].tolist())


@pytest.mark.parametrize("runner", RUNNERS)
@settings(max_examples=40)
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
@settings(max_examples=40)
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
@settings(max_examples=40)
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
@settings(max_examples=40)
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
