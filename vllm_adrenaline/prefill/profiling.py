"""Measuring the profile of a prefill engine: how long prompts take, and steps of decodes if it is to decode."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from vllm_adrenaline.config import Options
from vllm_adrenaline.engine import profile, profiling
from vllm_adrenaline.placement.costs import Costs

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

logger = logging.getLogger("vllm.adrenaline")

PROMPTS = (32, 128, 512, 2048)
"""Tokens of the prompts that are measured. The longest that the engine takes at once stands for those beyond it."""


def measure(config: VllmConfig, options: Options, runner: GPUModelRunner) -> None:
    """Measure a prefill engine's work and store that, unless there is a profile already. All ranks call at once."""
    wanted = profiling.key(config, options, ())
    if profiling.agree_on_known(wanted):
        return
    attention = profiling.attention_of(config)
    most = min(config.scheduler_config.max_num_batched_tokens, config.model_config.max_model_len)
    sizes = sorted({min(tokens, most) for tokens in PROMPTS})
    times = [
        (tokens, seconds + profiling.attention_seconds(attention, 1, tokens, tokens))
        for tokens, seconds in profiling.step_seconds(runner, sizes, sample=False)
    ]
    logger.info("prompts: %s", ", ".join(f"{tokens} tokens {1e3 * seconds:.0f} ms" for tokens, seconds in times))
    costs = None
    if options.moves_decodes:
        rows, context = profiling.typical_batch(config)
        local = profiling.attention_seconds(attention, rows, 1, context) / (rows * context)
        costs = Costs(profiling.decode_step(config, runner), local, remote=[])
    profiling.keep(profile.Profile(wanted, costs, times))
