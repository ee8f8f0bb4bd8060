"""The shared-memory channel and the split of a batch by place."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vllm_adrenaline import kv_space
from vllm_adrenaline.data.plan import RowsPlan
from vllm_adrenaline.data.shm import Shape, ShmDecodeChannel, ShmExecutorChannel, wait_word
from vllm_adrenaline.decode.split import split_rows
from vllm_adrenaline.errors import AdrenalineError

SHAPE = Shape(4, 8, 3, num_heads=2, num_kv_heads=1, head_size=4, dtype=torch.float32)


def rows_plan(tokens: list[int]) -> RowsPlan:
    count = len(tokens)
    return RowsPlan(
        torch.tensor(tokens),
        torch.arange(count + 1, dtype=torch.int32),
        torch.full((count,), 5, dtype=torch.int32),
        torch.ones((count, SHAPE.max_blocks), dtype=torch.int32),
        torch.arange(count),
    )


@pytest.fixture
def ends() -> tuple[ShmDecodeChannel, ShmExecutorChannel]:
    woken = threading.Event()
    decode = ShmDecodeChannel(SHAPE, 5.0, woken.set)
    executor = ShmExecutorChannel(decode.fd, SHAPE)
    yield decode, executor
    decode.close()


def test_rows_go_over_and_their_outputs_come_back(ends: tuple[ShmDecodeChannel, ShmExecutorChannel]) -> None:
    decode, executor = ends
    query = torch.randn(6, 2, 4)
    key, value = torch.randn(6, 1, 4), torch.randn(6, 1, 4)
    output = torch.zeros(6, 2, 4)

    def serve() -> None:
        while not executor.has_step:
            pass
        step = executor.take_step()
        for layer in range(3):
            assert executor.wait_layer(layer, 5)
            step["out"].copy_(step["q"] + step["k"] * step["v"])
            executor.reply(layer, rows=2)

    thread = threading.Thread(target=serve)
    thread.start()
    decode.begin(rows_plan([4, 1]))
    for layer in range(3):
        decode.send(layer, query, key, value)
        assert decode.receive(layer, output)
    thread.join()
    assert torch.equal(output[[4, 1]], (query + key * value)[[4, 1]])
    assert not output[[0, 2, 3, 5]].any()
    assert decode.counters == (6, 3)


def test_a_late_executor_is_a_returned_status_and_its_late_answer_is_not_believed(
    ends: tuple[ShmDecodeChannel, ShmExecutorChannel],
) -> None:
    decode, executor = ends
    decode._timeout_s = 0.01
    zeros = torch.zeros(8, 2, 4)
    decode.begin(rows_plan([0]))
    decode.send(0, zeros, zeros[:, :1], zeros[:, :1])
    assert not decode.receive(0, zeros)
    executor.take_step()
    executor.reply(0, rows=1)  # too late: the next step is on its way
    decode.begin(rows_plan([0]))
    decode.send(0, zeros, zeros[:, :1], zeros[:, :1])
    assert not decode.receive(0, zeros)


def test_an_executor_that_has_ended_is_noticed_at_once() -> None:
    words = memoryview(bytearray(64)).cast("Q")
    assert not wait_word(words, 0, 1, timeout_s=60, gone=lambda: True)


def test_a_plan_that_does_not_fit_is_not_believed(ends: tuple[ShmDecodeChannel, ShmExecutorChannel]) -> None:
    decode, executor = ends
    decode.begin(rows_plan([0]))
    executor.words[48] = SHAPE.max_rows + 1
    with pytest.raises(AdrenalineError, match="does not fit"):
        executor.take_step()


def test_a_file_of_another_size_is_no_channel() -> None:
    fd = os.memfd_create("x")
    os.ftruncate(fd, 4096)
    with pytest.raises(AdrenalineError, match="bytes"):
        ShmExecutorChannel(fd, SHAPE)
    os.close(fd)


def test_channels_leave_nothing_behind() -> None:
    before = len(os.listdir("/proc/self/fd")), set(Path("/dev/shm").iterdir())
    for _ in range(300):
        decode = ShmDecodeChannel(SHAPE, 1.0, lambda: None)
        executor = ShmExecutorChannel(decode.fd, SHAPE)
        decode.close()
        del decode, executor
    assert len(os.listdir("/proc/self/fd")) <= before[0] + 2
    assert set(Path("/dev/shm").iterdir()) == before[1]


BLOCK = 32
rows = st.lists(st.tuples(st.integers(0, 2), st.integers(1, 5), st.integers(0, 90)), min_size=1, max_size=8)


@given(rows, st.data())
def test_a_split_batch_masks_remote_rows_and_loses_no_token(
    spec: list[tuple[int, int, int]], data: st.DataObject
) -> None:
    width = 4
    queries = [query for _, query, _ in spec]
    lens = [query + past for _, query, past in spec]
    table = torch.tensor(
        [[place << kv_space.INDEX_BITS | data.draw(st.integers(1, 50)) for _ in range(width)] for place, _, _ in spec],
        dtype=torch.int32,
    )
    starts = torch.tensor([0, *torch.tensor(queries).cumsum(0).tolist()], dtype=torch.int32)
    single = [row for row, query in enumerate(queries) if query == 1]
    received = data.draw(st.lists(st.sampled_from(single), unique=True)) if single else []
    split = split_rows(table, starts, torch.tensor(lens, dtype=torch.int32), received, BLOCK)
    expected_masked = []
    for row, (place, query, past) in enumerate(spec):
        tokens = range(int(starts[row]), int(starts[row + 1]))
        if place == 0:
            assert torch.equal(split.local_block_table[row], table[row])
            assert split.local_seq_lens[row] == lens[row]
            expected_masked += list(tokens) if row in received else []
            continue
        expected_masked += tokens
        assert not split.local_block_table[row].any()
        assert split.local_seq_lens[row] == query
        plan = split.remote[place - 1]
        where = split.remote_rows[place - 1].tolist().index(row)
        begin, end = plan.query_start_loc[where : where + 2].tolist()
        assert plan.tokens[begin:end].tolist() == list(tokens)
        for offset, slot in enumerate(plan.slot_mapping[begin:end].tolist()):
            position = past + offset
            block = kv_space.index_of(int(table[row, position // BLOCK]))
            assert slot == (-1 if row in received else block * BLOCK + position % BLOCK)
    assert split.masked_tokens.tolist() == expected_masked
    assert split.has_local == any(place == 0 for place, _, _ in spec)
    assert sum(len(plan.tokens) for plan in split.remote.values()) == sum(q for p, q, _ in spec if p)
