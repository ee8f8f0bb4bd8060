"""The masks of a batch on a GPU: the same as on the CPU, and the host waits for nothing. Needs torch alone."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from vllm_adrenaline.decode.masked_batch import MaskedBatch

ROWS, TOKENS, WIDTH, STEPS = 64, 96, 128, 6
BUSY_CYCLES = 500_000_000
"""Some tenths of a second."""

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU, and torch with CUDA")


@pytest.fixture
def waiting_raises() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


def batch(step: int) -> tuple[Any, torch.Tensor, torch.Tensor]:
    """Return a batch on the host, and its masks of rows and tokens."""
    random = torch.Generator().manual_seed(step)
    queries = torch.ones(ROWS, dtype=torch.int32)
    queries[: TOKENS - ROWS] = 2
    rows = torch.rand(ROWS, generator=random) < 0.5
    common = SimpleNamespace(
        num_reqs=ROWS,
        block_table_tensor=torch.randint(1, 1 << 30, (ROWS, WIDTH), generator=random, dtype=torch.int32),
        seq_lens=torch.randint(2, 1000, (ROWS,), generator=random, dtype=torch.int32),
        query_start_loc=torch.cat([torch.zeros(1, dtype=torch.int32), queries.cumsum(0, dtype=torch.int32)]),
        slot_mapping=torch.arange(TOKENS),
    )
    return common, rows, rows.repeat_interleave(queries)


def masked(on: MaskedBatch, common: Any, rows: torch.Tensor, tokens: torch.Tensor) -> list[torch.Tensor]:
    on.send(rows, tokens)
    on.mask_slots(common.slot_mapping, TOKENS)
    return [each.clone() for each in (*on.mask_rows(common), common.slot_mapping)]


def test_steps_are_masked_as_on_the_cpu_while_the_device_is_busy(waiting_raises: None) -> None:
    here, there = (MaskedBatch(ROWS, TOKENS, WIDTH, torch.device(name)) for name in ("cpu", "cuda"))
    batches = [batch(step) for step in range(STEPS)]
    on_gpu = [SimpleNamespace(**vars(common)) for common, _, _ in batches]
    for common in on_gpu:
        for name, value in vars(common).items():
            if isinstance(value, torch.Tensor):
                setattr(common, name, value.pin_memory().to("cuda", non_blocking=True))
    torch.cuda._sleep(BUSY_CYCLES)
    found = [masked(there, common, *masks) for common, (_, *masks) in zip(on_gpu, batches, strict=True)]
    assert not torch.cuda.current_stream().query(), "all steps were launched before the device got to the first"
    torch.cuda.set_sync_debug_mode("default")
    for (common, *masks), step in zip(batches, found, strict=True):
        for expected, got in zip(masked(here, common, *masks), step, strict=True):
            assert torch.equal(got.cpu(), expected)
