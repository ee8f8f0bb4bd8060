"""Measuring the profile of a decode engine: a step without attention, attention here, attention of each executor."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from vllm_adrenaline.attention.kernels import CpuAttention
from vllm_adrenaline.config import Options
from vllm_adrenaline.decode.remote_attention import StepPlan
from vllm_adrenaline.engine import profile, profiling
from vllm_adrenaline.errors import AdrenalineError
from vllm_adrenaline.kv import space
from vllm_adrenaline.placement.costs import Costs
from vllm_adrenaline.transport.split import split_rows

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    from vllm_adrenaline.decode.remote_attention import RemoteAttention

logger = logging.getLogger("vllm.adrenaline")

PATIENCE_S = 60.0
"""How long a step that is measured waits for its executor. Nobody waits for it yet."""


def costs_of(config: VllmConfig, options: Options, executors: Sequence[str]) -> Costs:
    """Return a decode engine's costs, as its worker measured them or as the user gave them; zeros for a fixed ratio.

    Args:
        config: the engine's.
        options: the engine's.
        executors: what each peer says of its executors (engine/setup.py, executors_of).

    Raises:
        AdrenalineError: there is no profile, or it is of another number of executors.
    """
    peers = len(options.peer_addresses)
    if options.ratio is not None:
        return Costs([(1, 0.0)], 0.0, [0.0] * peers)  # a fixed ratio asks nobody
    executors = executors if options.uses_executors else []
    found = (
        profile.load(Path(options.profile))
        if options.profile
        else profile.cached(profiling.key(config, options, executors))
    )
    if found is None or found.costs is None:
        raise AdrenalineError("there is no profile of this decode engine; is the cache folder writable?")
    if not executors:  # mapped memory is attended here
        return msgspec.structs.replace(found.costs, remote=[found.costs.local] * peers)
    if len(found.costs.remote) != len(executors):
        raise AdrenalineError(
            f"the profile is of {len(found.costs.remote)} executor(s), and there are {len(executors)} peers"
        )
    return found.costs


def measure(config: VllmConfig, options: Options, runner: GPUModelRunner, remote: RemoteAttention) -> None:
    """Measure a decode engine's costs and store them. All ranks call it at once.

    Nothing is measured with a fixed ratio, with a profile that the user gave, or if there is a profile already.

    Args:
        config: the engine's.
        options: the engine's.
        runner: the worker's model runner.
        remote: the worker's remote attention, attached to all executors.
    """
    executors = [link.executors for link in remote.links]
    if options.ratio is not None or options.profile:
        return
    # A network may be another one than it was, and nothing that a profile is kept by would tell.
    is_any_far = any(link.is_far for link in remote.links)
    if not is_any_far and profiling.agree_on_known(profiling.key(config, options, executors)):
        return
    began = time.monotonic()
    logger.info("measuring what a decode step costs here, once (some seconds)")
    step = profiling.decode_step(config, runner)
    attention = profiling.attention_of(config)
    rows, context = profiling.typical_batch(config)
    local = profiling.attention_seconds(attention, rows, 1, context) / (rows * context)
    per_row, per_step, per_token, links = [], [], [], []  # seconds of remote attention, by executor
    for executor, link in enumerate(remote.links):
        one = _remote_seconds(remote, executor, 1, 1, attention)
        few = _remote_seconds(remote, executor, rows, 1, attention)
        many = _remote_seconds(remote, executor, rows, context, attention)
        per_step.append(0.0 if link.is_far else one)
        links.append(one if link.is_far else 0.0)
        per_row.append(max(few - one, 0.0) / max(rows - 1, 1))
        # Of a small model the difference drowns in noise: serving shows what a token really costs.
        per_token.append(max((many - few) / (rows * (context - 1)), local / 100))
        logger.info(
            "executor at %s%s: %.3f us a token, %.0f us a row, %.0f us a step",
            link.address,
            " on another host" if link.is_far else "",
            *(1e6 * each for each in (per_token[-1], per_row[-1], one)),
        )
    costs = Costs(
        step,
        local,
        per_token,
        max(per_row, default=0.0),
        max(per_step, default=0.0),
        links if is_any_far else [],
    )
    logger.info("local attention: %.3f us a token; all in %.1f s", 1e6 * local, time.monotonic() - began)
    profiling.keep(profile.Profile(profiling.key(config, options, executors), costs))


def _remote_seconds(remote: RemoteAttention, executor: int, rows: int, context: int, like: CpuAttention) -> float:
    """Return the seconds of a step's remote attention through one executor's channel, with nothing else to do.

    Args:
        remote: the worker's remote attention.
        executor: its number.
        rows, context: of the step: its rows, and the tokens of each.
        like: an attention of the same model.
    """
    link = remote.links[executor]
    step = profiling.plan_of(rows, 1, context, link.num_blocks, like.block_size, link.shape.max_blocks)
    qkv = profiling.qkv_of(like, rows)
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
        plan = StepPlan(remote, split, (PATIENCE_S, PATIENCE_S))
        for layer in range(like.num_layers):
            plan.send(layer, qkv["q"], qkv["k"], qkv["v"])
            plan.receive(layer, qkv["out"])

    return profiling.shortest_seconds(attend, is_own_work=False)[0]
