"""How the CUDA kernel's work is divided (csrc/cuda/work.h): every token once, evenly, whatever the lengths are."""

from __future__ import annotations

from collections import Counter, defaultdict

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from vllm.utils.math_utils import cdiv

from tests.unit.cuda_emulator import KERNELS, Emulator, build_library, kept_programs
from vllm_adrenaline.native import cuda

TILE, ROW_BLOCK, LEAST = 64, 64, 2
"""Tokens of a tile, queries of a row block, and tiles that a block of the grid takes at least (csrc/cuda/work.h)."""
ROWS = st.lists(
    st.tuples(st.integers(0, 20000) | st.sampled_from([0, 1, 63, 64, 65, 128]), st.integers(0, 9)),
    min_size=1,
    max_size=300,
)


@pytest.fixture(scope="module")
def emulator(pytestconfig: pytest.Config, tmp_path_factory: pytest.TempPathFactory) -> Emulator:
    return Emulator(build_library(kept_programs(pytestconfig, tmp_path_factory), KERNELS, ["-O1"]))


class Work:
    """The division of a batch among the blocks of a grid. Rows: (tokens, queries)."""

    def __init__(
        self, on: Emulator, rows: list[tuple[int, int]], group: int, kv_heads: int, window: int, grid: int
    ) -> None:
        starts = torch.tensor([0, *(queries for _, queries in rows)]).cumsum(0).int()
        lens = torch.tensor([length for length, _ in rows], dtype=torch.int32)
        self.first_tile = torch.full((len(rows) + 1,), -1, dtype=torch.int32)
        batch = cuda.Batch(starts.data_ptr(), lens.data_ptr(), len(rows), group, kv_heads, window)
        self._alive = starts, lens
        self.call = cuda.Call(batch=batch, first_tile=self.first_tile.data_ptr())
        on.plan_on_host(self.call, self.first_tile)
        self.parts = [on.parts(self.call, block, grid) for block in range(grid)]


@settings(max_examples=60, deadline=None)
@given(ROWS, st.integers(1, 16), st.integers(1, 8), st.integers(0, 300), st.integers(1, 300))
@example([(0, 0)], 1, 1, 0, 5)
@example([(5, 9), (70, 1)], 4, 2, 0, 5)
@example([(131072, 1), (1, 1)], 8, 8, 0, 264)
def test_every_token_is_attended_once_and_blocks_share_evenly(
    emulator: Emulator, rows: list[tuple[int, int]], group: int, kv_heads: int, window: int, grid: int
) -> None:
    work = Work(emulator, rows, group, kv_heads, window, grid)
    wanted: dict[tuple[int, int, int], int] = {}  # tiles of each unit: a row, a row block, a KV head
    for row, (length, queries) in enumerate(rows):
        if queries == 0 or length < queries:
            continue  # a row without tokens, or one that makes no sense
        begin = max(0, length - queries - window + 1) if window else 0
        for row_block in range(cdiv(queries * group, ROW_BLOCK)):
            wanted |= {(row, row_block, head): cdiv(length - begin, TILE) for head in range(kv_heads)}
    seen: Counter[tuple[int, int, int, int]] = Counter()
    sharers = defaultdict(list)
    for block, parts in enumerate(work.parts):
        for row, row_block, head, tile, tiles, count, first in parts:
            assert tiles > 0
            seen.update((row, row_block, head, tile + i) for i in range(tiles))
            sharers[row, row_block, head].append((block, count, first))
    every = Counter((*unit, tile) for unit, tiles in wanted.items() for tile in range(tiles))
    assert seen == every

    most = max(cdiv(sum(wanted.values()), grid), LEAST)
    assert max(sum(part[4] for part in parts) for parts in work.parts) <= most

    begun, continued = Counter(), Counter()
    for shared in sharers.values():
        blocks = [block for block, _, _ in shared]
        assert blocks == [*range(blocks[0], blocks[0] + len(blocks))]
        assert all((count, first) == (len(blocks), blocks[0]) for _, count, first in shared)
        begun.update(blocks[:1] if len(blocks) > 1 else [])
        continued.update(blocks[1:])
    # So a block needs one counter, and room for two parts, however many rows there are.
    assert {*begun.values(), *continued.values()} <= {1}


@settings(max_examples=15, deadline=None)
@given(ROWS, st.integers(1, 16), st.integers(0, 300))
def test_the_device_makes_the_same_plan_as_the_host(
    emulator: Emulator, rows: list[tuple[int, int]], group: int, window: int
) -> None:
    work = Work(emulator, rows, group, 2, window, 1)
    on_host = work.first_tile.clone()
    work.first_tile.fill_(-1)
    emulator.plan(work.call)
    assert torch.equal(work.first_tile, on_host)
