"""Admission: which pending requests are placed, in which order, and when a move back is looked for.

Pure: it knows no vLLM, no clock and no sockets. A decode engine and the simulator run the same loop. They only
translate: their requests into `Pending`, their memory into `Pools`, and what is decided into what they do.

A step goes like this: `begin_step`; if `is_move_due`, `choose_move`; then `admit`.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import islice
from typing import Protocol, TypeVar

import msgspec

from vllm_adrenaline.placement import elastic, policy
from vllm_adrenaline.placement.batch import Batch, PlacementLoad, Progress
from vllm_adrenaline.placement.bounds import Rule
from vllm_adrenaline.placement.costs import Costs
from vllm_adrenaline.placement.feedback import Feedback, Step
from vllm_adrenaline.placement.memory import Memory
from vllm_adrenaline.placement.output_length import OutputLengths
from vllm_adrenaline.placement.policy import Candidate, Decision, EngineState, Observed, Placement, Reason
from vllm_adrenaline.placement.pools import Pools
from vllm_adrenaline.system.arithmetic import cdiv

MAX_PENDING_PER_STEP = 64
"""How many pending requests are looked at in a step."""
MOVE_INTERVAL = 32
"""Steps between two looks for a request to move. In that time the costs follow the last move."""


class Placeable(Protocol):
    """A request whose prompt a prefill engine has computed."""

    @property
    def executor(self) -> int:
        """Number of the executor beside that prefill engine."""

    @property
    def is_mapped(self) -> bool:
        """Whether the decode engine attends it in the memory of that prefill engine."""

    @property
    def progress(self) -> Progress:
        """How far it is."""


class Pending(Placeable, Protocol):
    """A request that waits to be placed.

    Attributes:
        decision: Why it may take local memory in this step; None if it may not.
        waited: Whether it was counted as one that has to wait.
    """

    decision: Decision | None
    waited: bool

    @property
    def only_local(self) -> Reason | None:
        """Why it can be nowhere but in local memory; None if it can be elsewhere."""


PlaceableT = TypeVar("PlaceableT", bound=Placeable)
PendingT = TypeVar("PendingT", bound=Pending)


class Settings(msgspec.Struct, frozen=True):
    """What does not change while serving.

    Attributes:
        block_size: Tokens in a KV block.
        max_rows: The largest batch.
        rule: How the paper's two conditions are combined.
        tpot_slo: Objective for the time per output token in seconds; None for no objective.
    """

    block_size: int
    max_rows: int
    rule: Rule = "or"
    tpot_slo: float | None = None


class Admission:
    """Places pending requests, and keeps what must be known from one step to the next.

    Attributes:
        feedback: What steps cost, corrected while serving.
        lengths: How long answers get.
        counts: What was decided so far, by placement (or "moved") and reason.
        bound: The lowest bound on offloaded over local attention when a move was looked for last; 0 for no bound.
    """

    def __init__(self, settings: Settings, costs: Costs, ratio: float | None = None) -> None:
        """Begin with nothing placed.

        Args:
            settings: What does not change.
            costs: What steps are believed to cost.
            ratio: The fixed share of requests to offload, 0 to 1; None for placement by load.
        """
        self._settings = settings
        self._ratio = ratio
        self.feedback, self.lengths = Feedback(costs), OutputLengths()
        self.counts: Counter[tuple[str, str]] = Counter()
        self.bound = 0.0
        self._decided = self._offloaded = self._mapped = 0
        self._steps = 0
        self._is_move_due = False

    @property
    def ratio(self) -> float | None:
        """The fixed share of requests to offload; None for placement by load."""
        return self._ratio

    def set_ratio(self, ratio: float | None) -> None:
        """Change the fixed share. It holds for the requests from now on."""
        self._ratio = ratio
        self._decided = self._offloaded = self._mapped = 0

    # A step

    def begin_step(self, any_offloaded: bool) -> None:
        """Count a step.

        Args:
            any_offloaded: Whether there is an offloaded request. Steps without any do not count.
        """
        if any_offloaded:
            self._steps += 1
        self._is_move_due = any_offloaded and self._steps % MOVE_INTERVAL == 0

    @property
    def is_move_due(self) -> bool:
        """Whether a request to move is to be looked for in this step."""
        return self._is_move_due

    def choose_move(
        self, pools: Pools, batch: Batch, offloaded: Iterable[PlaceableT]
    ) -> tuple[PlaceableT, Reason] | None:
        """Return an offloaded request that is to go on locally, and why. The lowest bound is noted.

        Nothing is counted. Call `count_move` when the request has moved.

        Args:
            pools: The memory as it is now.
            batch: All requests that hold memory.
            offloaded: The requests that can move.

        Returns:
            None if no request is to move. With a fixed ratio none moves.
        """
        observed = self.observed(pools, batch)
        bounds = [policy.bound(observed, executor) for executor in range(len(observed.executors))]
        self.bound = min((each for each in bounds if math.isfinite(each)), default=0.0)
        if self._ratio is not None:
            return None
        requests = list(offloaded)
        found = policy.move(observed, [self._candidate(each) for each in requests])
        return None if found is None else (requests[found[0]], found[1])

    def admit(self, queue: Iterable[PendingT], pools: Pools, batch: Batch) -> list[tuple[PendingT, Decision]]:
        """Decide about pending requests, first come first served.

        What is offloaded or mapped is counted here, and is so from now on. What may go local has its `decision` set:
        the caller gives it local memory if there is some, and then calls `count_local`. If it gets none in this step it
        is decided about anew in the next. A fixed ratio decides once and counts at once.

        Behind a request that waits nobody else gets local memory, nor memory of its executor.

        Args:
            queue: The pending requests in their order. The first `MAX_PENDING_PER_STEP` are looked at.
            pools: The memory as it is now.
            batch: All requests that hold memory. It grows with what is decided.

        Returns:
            The requests that were decided about in this step and what is to be done with each, in order. Requests that
            the rules above hold back are not among them.
        """
        by_load = self._ratio is None
        decided: list[tuple[PendingT, Decision]] = []
        is_blocked, full = False, set[int]()
        for pending in islice(queue, MAX_PENDING_PER_STEP):
            if by_load:
                pending.decision = None
            if pending.decision is not None or (by_load and batch.rows >= self._settings.max_rows):
                continue
            if pending.executor in full:
                continue
            decision = self._decide(pools, batch, pending)
            if decision.placement in (Placement.OFFLOADED, Placement.MAPPED):
                self._count_placed(decision)
                batch.add(pending.progress, pending.executor, decision.placement is Placement.MAPPED)
            elif decision.placement is Placement.WAIT:
                is_blocked = True
                full.add(pending.executor)
                if not pending.waited:
                    pending.waited = True
                    self._count(decision.placement.value, decision.reason)
            elif is_blocked:
                continue
            else:
                pending.decision = decision
                if not by_load:
                    self._count_placed(decision)
                batch.add(pending.progress, None)
                pools = pools.with_local_taken(self._blocks(pending.progress.tokens))
            decided.append((pending, decision))
        return decided

    def count_local(self, pending: Pending) -> None:
        """Count the decision by which a request took local memory, unless a fixed ratio has counted it already."""
        if pending.decision is not None and self._ratio is None:
            self._count_placed(pending.decision)

    def count_move(self, reason: Reason) -> None:
        """Count an offloaded request that goes on locally."""
        self._count("moved", reason)

    def take_counts(self) -> Counter[tuple[str, str]]:
        """Return what was counted since the last call."""
        counts, self.counts = self.counts, Counter()
        return counts

    def observe_step(self, batch: Batch, total: float, local: float, remote: Sequence[float], exposed: float) -> None:
        """Take what a step took, in seconds, so that the believed costs follow.

        Args:
            batch: What was decoded.
            total: The whole step; 0 if it computed prompts as well.
            local: Local attention; 0 if nobody measured it.
            remote: Attention of each executor; 0 where it had nothing to attend.
            exposed: How long there was nothing left to do but wait for executors.
        """
        tokens, rows = batch.remote_tokens(len(remote)), batch.remote_rows(len(remote))
        _, here = batch.attended_here
        self.feedback.observe(Step(batch.rows, here, tokens, total, local, remote, exposed, rows))

    # What the policy sees

    # What other engines are told (placement/elastic.py)

    def step_seconds(self, batch: Batch, executors: int) -> float:
        """Return what a step of `batch` is believed to take, in seconds; 0 for none."""
        if not batch.rows:
            return 0.0
        _, tokens = batch.attended_here
        remote = [(batch.remote[e].rows, batch.remote[e].tokens) for e in range(executors)]
        return self.feedback.costs.seconds(batch.rows, tokens, remote)

    def work_seconds(self, batch: Batch, pending: Iterable[Progress]) -> float:
        """Return how long all requests take until the last one ends, in seconds.

        Attention of executors counts as if it were done here.
        """
        known = [
            each for load in (batch.local, *batch.remote.values(), *batch.mapped.values()) for each in load.requests
        ]
        return elastic.work_seconds(
            self.feedback.costs, [(each.tokens, self._growth(each)) for each in (*known, *pending)]
        )

    def own_memory(self, free: int, batch: Batch) -> Memory:
        """Return the memory of this engine, of which `free` blocks are free."""
        return self._memory(free, batch.local)

    # What is decided from

    def observed(self, pools: Pools, batch: Batch) -> Observed:
        """Return the present state as the policy sees it."""
        size = self._settings.block_size
        rows, tokens = batch.attended_here
        decode = EngineState(
            capacity=pools.local.total * size,
            memory=self._memory(pools.local.free, batch.local),
            rows=rows,
            tokens=tokens,
        )
        executors = [
            EngineState(
                capacity=(pool.total - pool.reserve) * size,
                memory=self._memory(pool.room, batch.remote[number], batch.mapped[number]),
                rows=batch.remote[number].rows,
                tokens=batch.remote[number].tokens,
                available=pool.available,
                mappable=pool.mappable,
                busy=pool.busy,
                recalls=pool.recalls,
            )
            for number, pool in enumerate(pools.executors)
        ]
        return Observed(
            decode=decode,
            executors=executors,
            costs=self.feedback.costs,
            rule=self._settings.rule,
            tpot_slo=self._settings.tpot_slo,
            max_rows=self._settings.max_rows,
            ratio=self._ratio,
            decided=self._decided,
            offloaded=self._offloaded,
            mapped=self._mapped,
        )

    def _memory(self, room: int, *loads: PlacementLoad) -> Memory:
        for load in loads:
            for request in islice(load.requests, len(load.lengths), None):
                load.blocks += self._blocks(request.tokens)
                load.lengths.append((request.tokens, self._growth(request)))
        lengths = loads[0].lengths if len(loads) == 1 else [each for load in loads for each in load.lengths]
        return Memory(room + sum(load.blocks for load in loads), self._settings.block_size, lengths)

    def _decide(self, pools: Pools, batch: Batch, pending: Pending) -> Decision:
        if pending.only_local is not None:
            return Decision(Placement.LOCAL, pending.only_local)
        return policy.place(self.observed(pools, batch), self._candidate(pending))

    def _candidate(self, request: Placeable) -> Candidate:
        progress = request.progress
        final = progress.prompt + progress.max_output
        return Candidate(request.executor, progress.tokens, self._growth(progress), final, request.is_mapped)

    def _growth(self, progress: Progress) -> int:
        return self.lengths.expected_growth(progress.output, progress.max_output)

    def _blocks(self, tokens: int) -> int:
        return cdiv(tokens, self._settings.block_size)

    def _count_placed(self, decision: Decision) -> None:
        self._count(decision.placement.value, decision.reason)
        if decision.reason not in (Reason.NO_CACHE, Reason.UNFINISHED):
            self._decided += 1
            self._offloaded += decision.placement is Placement.OFFLOADED
            self._mapped += decision.placement is Placement.MAPPED

    def _count(self, what: str, reason: Reason) -> None:
        self.counts[what, reason.value] += 1
