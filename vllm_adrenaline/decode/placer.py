"""Between the decode engine's scheduler and the placement policy: what is observed, what was decided, what it cost.

The policy itself is pure (placement/policy.py). The scheduler is the only caller, from one thread.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict, deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from vllm_adrenaline.placement.feedback import Feedback, Step
from vllm_adrenaline.placement.memory import Memory
from vllm_adrenaline.placement.output_length import OutputLengths
from vllm_adrenaline.placement.policy import (
    Candidate,
    Decision,
    EngineState,
    Observed,
    Placement,
    Reason,
    bound,
    move,
    place,
)
from vllm_adrenaline.system.statistics import percentile

if TYPE_CHECKING:
    from vllm.v1.request import Request

    from vllm_adrenaline.config import Options
    from vllm_adrenaline.decode.blocks import RemotePool
    from vllm_adrenaline.decode.remote_attention import Report
    from vllm_adrenaline.placement.costs import Costs

MOVE_EVERY = 32
"""Steps between two looks for a request to move: time for the costs to follow the last one."""
TPOT_STEPS = 64
"""Steps over which the time per output token is told to prefill engines."""


@dataclass
class PlacementLoad:
    """The part of a batch that one place attends. `lengths`: tokens and expected growth of each request; `blocks`: what
    they have."""

    tokens: int = 0
    blocks: int = 0
    lengths: list[tuple[int, int]] = field(default_factory=list)

    @property
    def rows(self) -> int:
        """How many requests there are."""
        return len(self.lengths)


@dataclass
class Batch:
    """All requests that hold KV memory of the decode engine or of an executor."""

    local: PlacementLoad = field(default_factory=PlacementLoad)
    remote: dict[int, PlacementLoad] = field(default_factory=lambda: defaultdict(PlacementLoad))

    def of(self, executor: int | None) -> PlacementLoad:
        """Return the share of an executor, None for the decode engine itself."""
        return self.local if executor is None else self.remote[executor]

    @property
    def rows(self) -> int:
        """How many requests there are."""
        return self.local.rows + sum(share.rows for share in self.remote.values())


class Placer:
    """See the module. `counts`: what was decided, by (placement, reason)."""

    def __init__(self, options: Options, costs: Costs, local_blocks: int, block_size: int, max_rows: int) -> None:
        self.ratio, self._rule = options.ratio, options.offload_rule
        self._tpot_slo = options.tpot_slo_ms / 1000 or None
        self._local_blocks, self._block_size, self._max_rows = local_blocks, block_size, max_rows
        self.feedback, self.lengths = Feedback(costs), OutputLengths()
        self.counts: Counter[tuple[str, str]] = Counter()
        self._decided = self._offloaded = 0
        self._since_move = 0
        self._steps: deque[float] = deque(maxlen=TPOT_STEPS)
        self._batch, self._bound = Batch(), 0.0
        self._remote_tokens = 0

    def candidate(self, request: Request, executor: int) -> Candidate:
        """Describe a request to the policy."""
        growth = self.lengths.expected_growth(request.num_output_tokens, request.max_tokens)
        return Candidate(executor, request.num_tokens, growth, request.num_prompt_tokens + request.max_tokens)

    def add(self, batch: Batch, request: Request, executor: int | None) -> None:
        """Count a request in a batch."""
        share, tokens = batch.of(executor), request.num_tokens
        share.tokens += tokens
        share.blocks += -(-tokens // self._block_size)
        share.lengths.append((tokens, self.lengths.expected_growth(request.num_output_tokens, request.max_tokens)))

    def observed(self, batch: Batch, free: int, pools: Sequence[RemotePool], down: frozenset[int]) -> Observed:
        """Return the present state as the policy sees it; `free`: local blocks."""
        size, local = self._block_size, batch.local
        capacity = self._local_blocks * size
        decode = EngineState(capacity, Memory(free + local.blocks, size, local.lengths), local.rows, local.tokens)
        executors = [
            EngineState(
                capacity=(pool.client.load.total - pool.client.load.reserve) * size,
                memory=Memory(pool.spare + share.blocks, size, share.lengths),
                rows=share.rows,
                tokens=share.tokens,
                available=pool.executor not in down and pool.client.welcome is not None,
                busy=pool.client.load.busy,
                recalls=pool.client.load.recalls,
            )
            for pool, share in ((pool, batch.remote[pool.executor]) for pool in pools)
        ]
        return Observed(
            decode=decode,
            executors=executors,
            costs=self.feedback.costs,
            rule=self._rule,
            tpot_slo=self._tpot_slo,
            max_rows=self._max_rows,
            ratio=self.ratio,
            decided=self._decided,
            offloaded=self._offloaded,
        )

    def place(self, observed: Observed, request: Request, executor: int) -> Decision:
        """Decide about a request. Nothing is counted: a decision that waits is made anew in the next step."""
        if request.skip_reading_prefix_cache:
            return Decision(Placement.LOCAL, Reason.NO_CACHE)
        return place(observed, self.candidate(request, executor))

    def committed(self, decision: Decision) -> None:
        """A decision was carried out."""
        self.counts[decision.placement.value, decision.reason.value] += 1
        if decision.reason is not Reason.NO_CACHE:
            self._decided += 1
            self._offloaded += decision.placement is Placement.OFFLOADED

    def waited(self, decision: Decision) -> None:
        """A request has to wait for the first time."""
        self.counts[decision.placement.value, decision.reason.value] += 1

    def is_time_to_move(self) -> bool:
        """Say, once a step, whether `move` is to be asked: every MOVE_EVERY steps."""
        self._since_move = (self._since_move + 1) % MOVE_EVERY
        return self._since_move == 0

    def move(self, observed: Observed, offloaded: Iterable[tuple[Request, int]]) -> Request | None:
        """Return an offloaded request that is to go on locally, if there is one; none with a fixed ratio."""
        bounds = [bound(observed, executor) for executor in range(len(observed.executors))]
        self._bound = min((each for each in bounds if math.isfinite(each)), default=0.0)
        if self.ratio is not None:
            return None
        requests = list(offloaded)
        found = move(observed, [self.candidate(request, executor) for request, executor in requests])
        if found is None:
            return None
        self.counts["moved", found[1].value] += 1
        return requests[found[0]][0]

    def moved(self, reason: Reason) -> None:
        """A request moved for a reason that is none of the policy's."""
        self.counts["moved", reason.value] += 1

    def tpot(self, seconds: float) -> float:
        """Note the length of a step; return the 90th percentile of the last TPOT_STEPS."""
        if seconds > 0:
            self._steps.append(seconds)
        return percentile(self._steps, 0.9)

    @property
    def gauges(self) -> dict[str, float]:
        """What is believed at present (vllm_adrenaline/engine/metrics.py, GAUGES)."""
        costs, batch = self.feedback.costs, self._batch
        return {
            "local_attention_seconds_per_token": costs.local,
            "remote_attention_seconds_per_token": max(costs.remote, default=0.0),
            "step_seconds_without_attention": costs.other(batch.rows),
            "offload_bound_ratio": self._bound,
            "local_rows": batch.local.rows,
            "offloaded_rows": batch.rows - batch.local.rows,
        }

    def observe(self, batch: Batch, report: Report | None, seconds: float, executors: int) -> None:
        """Take a step that decoded `batch`; `seconds` is 0 when it computed prompts as well."""
        self._batch = batch
        remote = [batch.remote[e].tokens if e in batch.remote else 0 for e in range(executors)]
        self._remote_tokens += sum(remote)
        times: Mapping[int, float] = report.remote if report is not None else {}
        self.feedback.observe(
            Step(
                rows=batch.rows,
                local_tokens=batch.local.tokens,
                remote_tokens=remote,
                total=seconds,
                local_seconds=report.local if report is not None else 0.0,
                remote_seconds=[times.get(e, 0.0) for e in range(executors)],
                exposed=report.exposed if report is not None else 0.0,
            )
        )

    def take_counts(self) -> dict[str, float]:
        """Return what was decided and attended since the last call, as counters (vllm_adrenaline/engine/metrics.py)."""
        counts, self.counts = self.counts, Counter()
        tokens, self._remote_tokens = self._remote_tokens, 0
        decided = {f"placements/{placement}/{reason}": float(count) for (placement, reason), count in counts.items()}
        return decided | {"remote_attention_tokens": float(tokens)}
