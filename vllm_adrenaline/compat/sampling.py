"""A context in which rows whose sampled token is thrown away draw nothing from their own random generators.

vLLM sets a generator back by what such a row drew (_bookkeeping_sync in vllm/v1/worker/gpu_model_runner.py). On CPU a
generator cannot be set back: a prompt with a `seed` that is computed in more than one step ends the engine with "CPU
Generator does not use offset" (0.32, run). Rows whose attention failed have the same need on any device.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner


@contextmanager
def without_generators(runner: GPUModelRunner, failed: Collection[int] = ()) -> Iterator[None]:
    """Hide the generators of some rows while a batch is sampled.

    They are those of rows whose prompt goes on in a later step, and of the rows in `failed`.
    """
    generators = runner.input_batch.generators
    if not generators:
        yield
        return
    unfinished = np.nonzero(runner.discard_request_mask.np[: runner.input_batch.num_reqs])[0]
    hidden = {row: generators.pop(row) for row in {*map(int, unfinished), *failed} if row in generators}
    try:
        yield
    finally:
        generators.update(hidden)
