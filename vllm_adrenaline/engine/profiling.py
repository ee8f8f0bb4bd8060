"""The profile of an engine, measured when it starts: seconds of work, once per model, machine and vLLM version.

Runs in the first worker of an engine, on the engine's own model, KV cache and channels, at the core shares in force.
The scheduler, in another process, reads what was measured from disk (placement/profile.py). Checked against
vllm/v1/worker/gpu_model_runner.py of 0.32 (run).
"""

from __future__ import annotations

import functools
import logging
import os
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from vllm.distributed.kv_transfer import get_kv_transfer_group
from vllm.distributed.parallel_state import get_tp_group
from vllm.utils.math_utils import cdiv

from vllm_adrenaline.attention.kernels import CpuAttention
from vllm_adrenaline.compat.engine_threads import CORES_ENV
from vllm_adrenaline.config import Options
from vllm_adrenaline.engine import profile
from vllm_adrenaline.engine.identity import identity_of
from vllm_adrenaline.errors import AdrenalineError
from vllm_adrenaline.kv import space
from vllm_adrenaline.placement.costs import Costs, undisturbed
from vllm_adrenaline.system.machine import cpu_model

if TYPE_CHECKING:
    from vllm.config import VllmConfig

    from vllm_adrenaline.decode.remote_attention import RemoteAttention

logger = logging.getLogger("vllm.adrenaline")

REPEATS = 5
ROWS, CONTEXT = 8, 512
PROMPTS = (32, 128, 512, 2048)


def key(config: VllmConfig, options: Options, executors: Sequence[str]) -> profile.Key:
    """Return what a profile depends on. `executors`: what each peer says of its executors' share of its device."""
    identity = identity_of(config)
    found = {
        "role": options.role,
        "machine": cpu_model(),
        "cores": f"{os.environ.get(CORES_ENV, 'auto')} of {os.cpu_count()}",
        "kernel": platform.release(),
        "batch": f"{config.scheduler_config.max_num_seqs}, {config.scheduler_config.max_num_batched_tokens} tokens",
        "eager": str(config.model_config.enforce_eager),
        "executors": "; ".join(executors),
        "figures": ",".join((*Costs.__struct_fields__, "greedy", "native attention", "undisturbed")),
    }
    return found | {name: str(getattr(identity, name)) for name in identity.__struct_fields__}


def decode_costs(config: VllmConfig, options: Options, executors: Sequence[str]) -> Costs:
    """Return a decode engine's costs as its worker measured them, or as the user gave them; raises AdrenalineError."""
    if options.ratio is not None:
        return Costs([(1, 0.0)], 0.0, [0.0] * len(executors))  # a fixed ratio asks nobody
    found = profile.load(Path(options.profile)) if options.profile else profile.cached(key(config, options, executors))
    if found is None or found.costs is None:
        raise AdrenalineError("there is no profile of this decode engine; is the cache folder writable?")
    if len(found.costs.remote) != len(executors):
        raise AdrenalineError(
            f"the profile is of {len(found.costs.remote)} executor(s), and there are {len(executors)} peers"
        )
    return found.costs


def profile_decode(config: VllmConfig, options: Options, runner: Any, remote: RemoteAttention) -> None:
    """Measure a decode engine's costs unless they are known: steps without attention, attention here and there."""
    executors = [link.executor_share for link in remote.links]
    if options.ratio is not None or options.profile or _is_known(key(config, options, executors)):
        return
    began = time.monotonic()
    logger.info("measuring what a decode step costs here, once (some seconds)")
    sizes = list(_powers(min(config.scheduler_config.max_num_seqs, config.scheduler_config.max_num_batched_tokens)))
    step = undisturbed(_step_seconds(runner, sizes, sample=True))
    logger.info("step without attention: %s", ", ".join(f"{rows} rows {1e3 * s:.1f} ms" for rows, s in step))
    attention = _attention_of(config)
    rows, context = min(ROWS, sizes[-1]), min(CONTEXT, config.model_config.max_model_len)
    local = _attention_seconds(attention, rows, 1, context) / (rows * context)
    exchange, plan, away = [], [], []
    for executor, link in enumerate(remote.links):
        one = _remote_seconds(remote, executor, 1, 1, attention)
        few = _remote_seconds(remote, executor, rows, 1, attention)
        many = _remote_seconds(remote, executor, rows, context, attention)
        plan.append(one)
        exchange.append(max(few - one, 0.0) / max(rows - 1, 1))
        # Of a small model the difference drowns in noise: serving shows what a token really costs.
        away.append(max((many - few) / (rows * (context - 1)), local / 100))
        us = (1e6 * each[-1] for each in (away, exchange, plan))
        logger.info("executor at %s: %.3f us a token, %.0f us a row, %.0f us a step", link.address, *us)
    costs = Costs(step, local, away, max(exchange, default=0.0), max(plan, default=0.0))
    logger.info("local attention: %.3f us a token; all in %.1f s", 1e6 * local, time.monotonic() - began)
    _keep(profile.Profile(key(config, options, executors), costs))


def profile_prefill(config: VllmConfig, options: Options, runner: Any) -> None:
    """Measure how long a prefill engine takes for prompts of some sizes, unless it is known."""
    wanted = key(config, options, ())
    if _is_known(wanted):
        return
    attention = _attention_of(config)
    most = min(config.scheduler_config.max_num_batched_tokens, config.model_config.max_model_len)
    sizes = sorted({min(tokens, most) for tokens in PROMPTS})
    times = [
        (tokens, seconds + _attention_seconds(attention, 1, tokens, tokens))
        for tokens, seconds in _step_seconds(runner, sizes, sample=False)
    ]
    logger.info("prompts: %s", ", ".join(f"{tokens} tokens {1e3 * seconds:.0f} ms" for tokens, seconds in times))
    _keep(profile.Profile(wanted, prefill=times))


def _is_known(wanted: profile.Key) -> bool:
    """Whether there is a profile; the first rank decides for all, since they have to measure together."""
    group = get_tp_group()
    return bool(group.broadcast_object(profile.cached(wanted) is not None if group.is_first_rank else None, src=0))


def _keep(measured: profile.Profile) -> None:
    if get_tp_group().is_first_rank:
        logger.info("kept in %s", profile.store(measured))


def _powers(most: int) -> Iterator[int]:
    size = 1
    while size < most:
        yield size
        size *= 2
    yield most


def _seconds(*measures: Callable[[], object]) -> list[float]:
    """Return the shortest of some runs of each: what makes the others longer is engines that start beside this one. In
    turns, for such a disturbance lasts longer than a few runs."""

    def timed(measure: Callable[[], object]) -> float:
        began = time.perf_counter()
        measure()
        return time.perf_counter() - began

    for each in measures:
        each()
    rounds = [[timed(each) for each in measures] for _ in range(REPEATS)]
    return [min(times) for times in zip(*rounds, strict=True)]


def _step_seconds(runner: Any, sizes: Sequence[int], sample: bool) -> list[tuple[int, float]]:
    """Return the seconds of a step without attention for each of `sizes` tokens."""

    def step(tokens: int) -> None:
        hidden, _ = runner._dummy_run(tokens)
        if sample:
            # Greedy; vLLM's _dummy_sampler_run sorts the vocabulary for top-k and top-p, twice.
            runner.model.compute_logits(hidden).argmax(dim=-1)

    return list(zip(sizes, _seconds(*(functools.partial(step, tokens) for tokens in sizes)), strict=True))


def _attention_of(config: VllmConfig) -> CpuAttention:
    """Return vLLM's attention over this engine's own KV cache."""
    caches, layers = [], []
    for name, cache in get_kv_transfer_group().kv_caches.items():
        blocks, heads, block_size, double = cache.shape
        caches.append(cache.view(blocks, heads, 2 * block_size, double // 2))
        layers.append(config.compilation_config.static_forward_context[name])
    scales = [layer.impl.scale for layer in layers]
    return CpuAttention(caches, scales, layers[0].impl.num_heads, layers[0].isa, identity_of(config).split_kv)


def _plan(
    rows: int, queries: int, context: int, blocks: int, block_size: int, width: int = 0
) -> dict[str, torch.Tensor]:
    """Return a step that reads different blocks for every row, as far as there are, and writes none. `width`: columns
    of the block table, 0 for as many as are needed."""
    width = width or cdiv(context, block_size)
    return {
        "query_start_loc": torch.arange(0, rows * queries + 1, queries, dtype=torch.int32),
        "seq_lens": torch.full((rows,), context, dtype=torch.int32),
        "block_table": (torch.arange(rows * width, dtype=torch.int32) % blocks).view(rows, width),
        "slot_mapping": torch.full((rows * queries,), -1, dtype=torch.int64),
    }


def _qkv(attention: CpuAttention, tokens: int) -> dict[str, torch.Tensor]:
    shapes = {"q": attention.num_heads, "k": attention.num_kv_heads, "v": attention.num_kv_heads}
    made = {name: torch.randn(tokens, heads, attention.head_size).to(attention.dtype) for name, heads in shapes.items()}
    return made | {"out": torch.empty_like(made["q"])}


def _attention_seconds(attention: CpuAttention, rows: int, queries: int, context: int) -> float:
    step = _plan(rows, queries, context, attention.num_blocks, attention.block_size) | _qkv(attention, rows * queries)

    def attend() -> None:
        schedule = attention.schedule(step["query_start_loc"], step["seq_lens"])
        for layer in range(attention.num_layers):
            attention.layer(layer, step, schedule)

    return _seconds(attend)[0]


def _remote_seconds(remote: RemoteAttention, executor: int, rows: int, context: int, like: CpuAttention) -> float:
    """Seconds of a step's remote attention through the channel, with nothing else to do meanwhile."""
    from vllm_adrenaline.decode.remote_attention import StepPlan
    from vllm_adrenaline.transport.split import split_rows

    link = remote.links[executor]
    step = _plan(rows, 1, context, link.num_blocks, like.block_size, link.shape.max_blocks)
    qkv = _qkv(like, rows)
    table = step["block_table"] + space.remote_id(executor, 0)

    def attend() -> None:
        # Every row counts as received: no slot, so nothing is written into blocks that may be somebody's.
        split = split_rows(
            table.clone(),
            step["query_start_loc"],
            step["seq_lens"].clone(),
            step["slot_mapping"].clone(),
            list(range(rows)),
            like.block_size,
        )
        plan = StepPlan(remote, split)
        for layer in range(like.num_layers):
            plan.send(layer, qkv["q"], qkv["k"], qkv["v"])
            plan.receive(layer, qkv["out"])

    return _seconds(attend)[0]
