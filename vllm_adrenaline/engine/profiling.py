"""Measuring what an engine's work takes when it starts, unless there is a profile of it already.

Runs in all workers of an engine at once, on its own model, KV cache and channels, at the core shares in force. The
first worker writes the profile to disk (engine/profile.py), and the scheduler, another process, reads it there. What
each role measures is in decode/profiling.py and prefill/profiling.py. Checked against
vllm/v1/worker/gpu_model_runner.py of 0.32 (run).
"""

from __future__ import annotations

import functools
import logging
import os
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from vllm.distributed.kv_transfer import get_kv_transfer_group
from vllm.distributed.parallel_state import get_tp_group, model_parallel_is_initialized
from vllm.utils.math_utils import cdiv

from vllm_adrenaline.attention.kernels import CpuAttention
from vllm_adrenaline.compat.model_runner import run_dummy
from vllm_adrenaline.compat.worker_cores import CORES_ENV
from vllm_adrenaline.config import Options
from vllm_adrenaline.engine import profile
from vllm_adrenaline.engine.identity import identity_of
from vllm_adrenaline.placement.costs import Costs, undisturbed
from vllm_adrenaline.system.machine import cpu_model

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.model_executor.layers.attention import Attention
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    from vllm_adrenaline.engine.connector import AdrenalineConnector

logger = logging.getLogger("vllm.adrenaline")

REPEATS = 5
"""How often each thing is measured, once it is warm; the shortest time counts."""
LONG_S = 5.0
"""After how many seconds nothing is measured once more, with one rank: engines are to start."""
DISTURBED = 1.25
"""What a run takes over its own work, above which others had the core: engines that start at the same time."""
ROWS, CONTEXT = 8, 512
"""The batch whose attention is measured, at most: its rows, and the tokens of each."""


def key(config: VllmConfig, options: Options, executors: Sequence[str]) -> profile.Key:
    """Return what an engine's profile depends on.

    Args:
        config: the engine's.
        options: the engine's.
        executors: of a decode engine, what each peer says of its executors (engine/setup.py, executors_of); else empty.
    """
    identity = identity_of(config)
    found = {
        "role": options.role,
        "machine": cpu_model(),
        "cores": f"{os.environ.get(CORES_ENV, 'auto')} of {os.cpu_count()}",
        "kernel": platform.release(),
        "batch": f"{config.scheduler_config.max_num_seqs}, {config.scheduler_config.max_num_batched_tokens} tokens",
        "eager": str(config.model_config.enforce_eager),
        "executors": "; ".join(executors),
        "figures": ",".join((*Costs.__struct_fields__, "greedy", "native attention", "own work")),
    }
    if options.role == "prefill" and options.moves_decodes:
        found["decodes"] = "measured, too"
    return found | {name: str(getattr(identity, name)) for name in identity.__struct_fields__}


def agree_on_known(wanted: profile.Key) -> bool:
    """Ask the first rank whether there is a profile; return its answer. All ranks must ask together.

    They have to measure together, so one of them decides.
    """
    group = get_tp_group()
    return bool(group.broadcast_object(profile.cached(wanted) is not None if group.is_first_rank else None, src=0))


def keep(measured: profile.Profile) -> None:
    """Store a profile, on the first rank only. Raises AdrenalineError when it cannot be written."""
    if get_tp_group().is_first_rank:
        logger.info("kept in %s", profile.store(measured))


def shortest_seconds(*measures: Callable[[], object], is_own_work: bool = True) -> list[float]:
    """Return the shortest of REPEATS runs of each measure, in seconds; of fewer if they take LONG_S.

    Other runs are longer because engines start beside this one. The measures take turns, for such a disturbance lasts
    longer than a few runs.

    `is_own_work`: whether this thread computes all the time. Where it then had its core for less than a part
    1 / DISTURBED of every run, what counts is the time for which it had it.
    """

    def timed(measure: Callable[[], object]) -> tuple[float, float]:
        began, own = time.perf_counter(), time.thread_time()
        measure()
        return time.perf_counter() - began, time.thread_time() - own

    # Ranks measure together, so with several of them none may stop before the others.
    is_alone = not model_parallel_is_initialized() or get_tp_group().world_size == 1
    began, rounds = time.perf_counter(), []
    for _ in range(1 + REPEATS):  # the first one warms up
        rounds.append([timed(each) for each in measures])
        if is_alone and time.perf_counter() - began > LONG_S:
            break
    shortest = []
    for runs in zip(*rounds, strict=True):
        passed, own = (min(each) for each in zip(*runs, strict=True))
        shortest.append(own if is_own_work and is_alone and passed > DISTURBED * own else passed)
    return shortest


def step_seconds(runner: GPUModelRunner, sizes: Sequence[int], sample: bool) -> list[tuple[int, float]]:
    """Return (tokens, seconds) of a step without attention for each of `sizes`, in tokens.

    `sample`: whether the step ends with logits and greedy sampling.
    """

    def step(tokens: int) -> None:
        hidden = run_dummy(runner, tokens)
        if sample:
            # Greedy; vLLM's _dummy_sampler_run sorts the vocabulary for top-k and top-p, twice.
            runner.model.compute_logits(hidden).argmax(dim=-1)

    return list(zip(sizes, shortest_seconds(*(functools.partial(step, tokens) for tokens in sizes)), strict=True))


def powers_of_two(most: int) -> Iterator[int]:
    """Yield the powers of two below `most`, then `most`."""
    size = 1
    while size < most:
        yield size
        size *= 2
    yield most


def decode_step(config: VllmConfig, runner: GPUModelRunner) -> list[tuple[int, float]]:
    """Return (rows, seconds) of a step of decodes without attention, for batches up to the largest."""
    most = min(config.scheduler_config.max_num_seqs, config.scheduler_config.max_num_batched_tokens)
    step = undisturbed(step_seconds(runner, list(powers_of_two(most)), sample=True))
    logger.info("step without attention: %s", ", ".join(f"{rows} rows {1e3 * s:.1f} ms" for rows, s in step))
    return step


def typical_batch(config: VllmConfig) -> tuple[int, int]:
    """Return the batch whose attention is measured: its rows, and the tokens of context of each."""
    return min(ROWS, config.scheduler_config.max_num_seqs), min(CONTEXT, config.model_config.max_model_len)


def attention_of(config: VllmConfig) -> CpuAttention:
    """Return the attention of this worker over its own KV cache."""
    connector: AdrenalineConnector = get_kv_transfer_group()
    caches: list[torch.Tensor] = []
    layers: list[Attention] = []
    for name, cache in connector.connector_worker.kv_caches.items():
        blocks, heads, block_size, double = cache.shape
        caches.append(cache.view(blocks, heads, 2 * block_size, double // 2))
        layers.append(config.compilation_config.static_forward_context[name])
    scales = [layer.impl.scale for layer in layers]
    return CpuAttention(caches, scales, layers[0].impl.num_heads, layers[0].isa, identity_of(config).split_kv)


def plan_of(
    rows: int, queries: int, context: int, blocks: int, block_size: int, width: int = 0
) -> dict[str, torch.Tensor]:
    """Return a step that writes no block. Its rows read different blocks, as far as there are enough.

    Args:
        rows: R.
        queries: tokens of each row in the step.
        context: tokens of each row in all.
        blocks: of the KV cache.
        block_size: tokens of a block.
        width: columns of the block table; 0 for as many as `context` needs.

    Returns:
        query_start_loc int32 [R + 1], seq_lens int32 [R], block_table int32 [R, width], slot_mapping int64 [T].
    """
    width = width or cdiv(context, block_size)
    return {
        "query_start_loc": torch.arange(0, rows * queries + 1, queries, dtype=torch.int32),
        "seq_lens": torch.full((rows,), context, dtype=torch.int32),
        "block_table": (torch.arange(rows * width, dtype=torch.int32) % blocks).view(rows, width),
        "slot_mapping": torch.full((rows * queries,), -1, dtype=torch.int64),
    }


def qkv_of(attention: CpuAttention, tokens: int) -> dict[str, torch.Tensor]:
    """Return random q [tokens, Hq, D], k and v [tokens, Hk, D], and an output like q, by name."""
    shapes = {"q": attention.num_heads, "k": attention.num_kv_heads, "v": attention.num_kv_heads}
    made = {name: torch.randn(tokens, heads, attention.head_size).to(attention.dtype) for name, heads in shapes.items()}
    return made | {"out": torch.empty_like(made["q"])}


def attention_seconds(attention: CpuAttention, rows: int, queries: int, context: int) -> float:
    """Return the seconds of one step's attention in all layers. The arguments are those of `plan_of`."""
    step = plan_of(rows, queries, context, attention.num_blocks, attention.block_size) | qkv_of(
        attention, rows * queries
    )

    def attend() -> None:
        schedule = attention.schedule(step["query_start_loc"], step["seq_lens"])
        for layer in range(attention.num_layers):
            attention.layer(layer, step, schedule)

    return shortest_seconds(attend)[0]
