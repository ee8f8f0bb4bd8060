"""Elastic work in simulation: decided by the code of real engines, which are told of simulated ones.

A prefill engine's part is ElasticPrefill, a decode engine's OwnPrompts. Their requests are vLLM's; here they are rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from vllm_adrenaline.config import Options
from vllm_adrenaline.control.messages import Slack
from vllm_adrenaline.engine.profile import Profile
from vllm_adrenaline.kv.stamp import STAY
from vllm_adrenaline.placement.elastic import Outcome
from vllm_adrenaline.prefill.elastic import ElasticPrefill
from vllm_adrenaline.simulate.row import Row
from vllm_adrenaline.simulate.setup import Setup


@dataclass(frozen=True)
class AsRequest:
    """A row as a prefill engine's vLLM would have it, with the attributes that ElasticPrefill reads."""

    row: Row
    asks: bool

    num_in_flight_tokens = 0
    sampling_params = SimpleNamespace(prompt_logprobs=None)

    @property
    def request_id(self) -> str:
        return str(id(self.row))

    @property
    def num_tokens(self) -> int:
        return self.row.tokens

    @property
    def num_computed_tokens(self) -> int:
        return self.row.tokens - 1 if self.row.made else self.row.computed

    @property
    def num_output_tokens(self) -> int:
        return self.row.made

    @property
    def max_tokens(self) -> int:
        return self.row.output if self.row.stays else 1

    @property
    def arrival_time(self) -> float:
        return self.row.arrived

    @property
    def kv_transfer_params(self) -> dict[str, Any]:
        if self.row.stays:
            return {}
        return {"do_remote_decode": True, **({STAY: self.row.output} if self.asks else {})}


class Elastic:
    """What one simulated prefill engine decides about its prompts."""

    def __init__(self, setup: Setup, clock: Callable[[], float], slacks: Callable[[], Sequence[Slack]]) -> None:
        """Begin with nothing moved. `slacks`: what decode engines say of themselves."""
        model = setup.model
        known = Profile({}, model.prefill_costs, model.prefill)
        options = Options(role="prefill", elastic=setup.elastic, ttft_slo_ms=1000 * (setup.ttft_slo or 0.0))
        self._asks, self._slacks = options.moves_decodes, slacks
        self.rules = ElasticPrefill(options, known, setup.block_size, setup.max_rows, lambda _: 0, clock, clock)

    def decide(self, running: Iterable[Row], queue: Iterable[Row], free: int) -> tuple[list[Row], list[Row]]:
        """Return the rows of the queue that stay and those that are handed over. `free`: blocks for those that stay."""
        rows = {str(id(row)): row for row in queue}
        moved = self.rules.decide(self._seen(running), self._seen(rows.values()), self._slacks(), free)
        stay: list[Row] = []
        leave: list[Row] = []
        for each in moved:
            (stay if each.outcome is Outcome.STAYS else leave).append(rows[each.request.request_id])
        return stay, leave

    def come_back(self, row: Row) -> None:
        """A row that was told to stay is here again."""
        row.stays = True
        self.rules.note_arrival(AsRequest(row, self._asks))

    def chunk(self, decoding: Iterable[Row]) -> int | None:
        """Return how many tokens of prompts a step beside these rows may compute; None for any number."""
        return self.rules.chunk(self._seen(decoding))

    def _seen(self, rows: Iterable[Row]) -> Any:
        return [AsRequest(row, self._asks) for row in rows]
