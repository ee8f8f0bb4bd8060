"""What is simulated: engines, their memory, and how requests are placed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from vllm_adrenaline.placement.bounds import Rule
from vllm_adrenaline.placement.costs import Costs
from vllm_adrenaline.simulate.row import Model

Pool = Literal["remote", "mapped", "both"]
"""What --adrenaline-pool may be."""
Elasticity = Literal["off", "prompts", "decodes", "both"]
"""What --adrenaline-elastic may be."""


@dataclass(frozen=True)
class Setup:
    """A cluster.

    Attributes:
        model: What things cost in truth.
        prefill: How many prefill engines there are; 0 for aggregated engines, which compute prompts themselves.
        decode: How many decode engines there are.
        prefill_blocks: KV blocks of each prefill engine.
        decode_blocks: KV blocks of each decode engine.
        block_size: Tokens in a KV block.
        max_rows: The largest batch.
        pool: How KV that stays with a prefill engine is attended (--adrenaline-pool).
        ratio: The fixed share of requests to offload, 0 to 1; None for placement by load.
        rule: How the paper's two conditions are combined.
        tpot_slo: Objective for the time per output token in seconds; None for no objective.
        ttft_slo: Objective for the time to first token in seconds; None for no objective.
        elastic: Which engines do the other's work (--adrenaline-elastic).
        believed: The costs that placement starts from; None for the true ones.
    """

    model: Model
    prefill: int = 1
    decode: int = 1
    prefill_blocks: int = 1000
    decode_blocks: int = 1000
    block_size: int = 128
    max_rows: int = 256
    pool: Pool = "remote"
    ratio: float | None = None
    rule: Rule = "or"
    tpot_slo: float | None = None
    ttft_slo: float | None = None
    elastic: Elasticity = "off"
    believed: Costs | None = None
