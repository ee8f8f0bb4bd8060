"""Prompts that a decode engine computes itself, in chunks beside its decodes, and what prefill engines are told of it.

Only with --adrenaline-elastic. Without it such prompts (those that no prefill engine has, and what is recomputed) are
computed as vLLM does it, as much in a step as fits.
"""

from __future__ import annotations

from collections.abc import Collection

from vllm_adrenaline.control.messages import MAX_COUNT, Slack
from vllm_adrenaline.placement import elastic
from vllm_adrenaline.placement.costs import Costs
from vllm_adrenaline.placement.memory import MARGIN, Memory, peak

STRETCH = 1.5
"""How much longer a step with decodes gets by prompts, at most, without an objective for the TPOT."""
WEIGHT = 0.2
"""Weight of the last step in what a token of a prompt is believed to cost."""


class OwnPrompts:
    """How much of prompts a step computes, and how much more work of this kind could be taken over."""

    def __init__(self, costs: Costs, tpot_slo: float | None, most: int, takes_over: bool) -> None:
        """Begin with what steps without attention cost.

        Args:
            costs: of this engine.
            tpot_slo: objective for the time per output token, in seconds.
            most: tokens that a step may compute.
            takes_over: whether prefill engines may hand prompts over.
        """
        rows, seconds = costs.step[-1]
        self._per_token, self._one_row = seconds / rows, costs.step[0][1]
        self._tpot_slo, self._most, self._takes_over = tpot_slo, most, takes_over

    def chunk(self, step: float) -> int:
        """Return how many tokens of prompts a step may compute whose decodes alone take `step` seconds."""
        limit = self._tpot_slo if self._tpot_slo is not None else STRETCH * step
        return elastic.chunk(step, self._per_token, limit, self._most)

    def observe(self, seconds: float, step: float, tokens: Collection[int]) -> None:
        """Note that a step with prompts took `seconds`, and would have taken `step` without.

        `tokens`: how many of each request it computed.
        """
        prompts = sum(each for each in tokens if each > 1)
        if prompts >= elastic.LEAST_CHUNK:
            self._per_token += WEIGHT * (max(0.0, seconds - step) / prompts - self._per_token)

    def slack(self, step: float, work: float, memory: Memory, growth: int, missing: int, is_full: bool) -> Slack:
        """Return what prefill engines are told.

        Args:
            step: seconds of a step of the present decodes.
            work: seconds until all requests have ended, without prompts that are to be computed here.
            memory: of this engine, with all requests that have or want some.
            growth: tokens that an answer is expected to have.
            missing: tokens of prompts that this engine has to compute already.
            is_full: whether requests wait for memory.
        """
        room = int((1 - MARGIN) * memory.blocks) - peak(memory.rows, memory.block_size)
        accepts = self._takes_over and not is_full
        # Who decodes nothing now will soon: the request whose prompt was taken over last.
        soon = max(step, self._one_row)
        return Slack(
            prompt_rate=elastic.chunk_rate(soon, self._per_token, self.chunk(soon)) if accepts else 0.0,
            prompt_backlog=min(missing, MAX_COUNT),
            prompt_room=min(max(0, room * memory.block_size - growth), MAX_COUNT),
            work=work + missing * self._per_token,
            is_full=is_full,
        )
