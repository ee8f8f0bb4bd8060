"""Where a request's decode attention runs: pure functions from observed state to a decision.

The rules, in order (docs/placement.md): offload only to an available executor, map only memory that may be mapped; with
a fixed ratio, keep it; else offload what makes the step clearly shorter, if the prefill engine has the time; map what
the prefill engine's memory has more room for than the decode engine's; else stay local while the decode engine has
memory; offload what does not fit while remote attention hides under local attention (placement/bounds.py), and the link
to another host does; beyond that, while a larger batch is clearly worth it; otherwise wait, as in vLLM.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from enum import Enum

import msgspec

from vllm_adrenaline.placement import bounds
from vllm_adrenaline.placement.costs import Costs
from vllm_adrenaline.placement.memory import Memory
from vllm_adrenaline.system.arithmetic import cdiv

GAIN = 0.1
"""By how much of a step offloading must shorten it before a request that fits locally is offloaded: less is noise."""
MOVE_GAIN = 0.02
"""By how much moving a request back must shorten the step: less is noise. Until its end it must also gain a whole step,
for it costs a transfer."""
MAX_MARGINAL_COST = 0.85
"""Maximum marginal cost of an offloaded request whose attention is not hidden, as a fraction of the batch's mean cost
per request. Below 1, throughput rises. TPOT grows; `tpot_slo` bounds it."""
BUSY = 0.7
"""Busy share of a prefill engine and executor together, above which nothing is offloaded just to shorten a step."""


class Placement(Enum):
    """Where the KV cache of a request lives, and so where its attention runs; or that it is to wait."""

    LOCAL = "local"
    OFFLOADED = "offloaded"
    MAPPED = "mapped"
    WAIT = "wait"


class Reason(Enum):
    """Why; every pair of placement and reason is counted."""

    RATIO = "ratio"
    NO_CACHE = "no_prefix_cache"
    UNFINISHED = "unfinished_prompt"
    EXECUTOR_AWAY = "executor_away"
    FITS = "fits"
    SHORTER_STEP = "shorter_step"
    NO_TRANSFER = "no_transfer"
    LOCAL_FULL = "local_full"
    THROUGHPUT = "throughput"
    OVER_BOUND = "over_bound"
    EXECUTOR_FULL = "executor_full"
    EXECUTOR_SLOW = "executor_slow"
    RECALLED = "recalled"
    STARVED = "starved"


class Decision(msgspec.Struct, frozen=True):
    """What is to be done with a request, and why."""

    placement: Placement
    reason: Reason


class EngineState(msgspec.Struct, frozen=True):
    """The policy's view of one engine or executor.

    Attributes:
        capacity: The KV memory there is, in tokens.
        memory: What its requests have and could get of that.
        rows: How many requests it attends: the decode engine local and mapped ones.
        tokens: Tokens of context that they have.
        available: Whether it answers.
        mappable: Whether the decode engine may attend its memory itself.
        busy: Share of its time, 0 to 1, that its prefill engine computes.
        recalls: Whether its prefill engine asks for memory back.
    """

    capacity: int
    memory: Memory
    rows: int
    tokens: int
    available: bool = True
    mappable: bool = False
    busy: float = 0.0
    recalls: bool = False


class Observed(msgspec.Struct, frozen=True):
    """What a decision depends on.

    Attributes:
        decode: The decode engine.
        executors: The executors. The place of one in the list is its number.
        costs: What a step is believed to cost.
        rule: How the paper's two conditions are combined.
        tpot_slo: Objective for the time per output token in seconds; None for no objective.
        max_rows: The largest batch.
        ratio: The fixed share of requests to offload, 0 to 1; None for placement by load.
        decided: Requests placed so far.
        offloaded: How many of those were offloaded to an executor.
        mapped: How many of those were mapped.
    """

    decode: EngineState
    executors: Sequence[EngineState]
    costs: Costs
    rule: bounds.Rule = "or"
    tpot_slo: float | None = None
    max_rows: int = 256
    ratio: float | None = None
    decided: int = 0
    offloaded: int = 0
    mapped: int = 0

    @property
    def rows(self) -> int:
        """How many requests the batch has."""
        return self.decode.rows + sum(executor.rows for executor in self.executors)

    @property
    def tokens(self) -> int:
        """How many tokens of context they have."""
        return self.decode.tokens + sum(executor.tokens for executor in self.executors)

    @property
    def remote(self) -> list[tuple[int, int]]:
        """Rows and tokens of each executor."""
        return [(executor.rows, executor.tokens) for executor in self.executors]


class Candidate(msgspec.Struct, frozen=True):
    """A request to place. All lengths are tokens.

    Attributes:
        executor: Number of the executor beside its prompt.
        tokens: What it has.
        growth: How many more are expected.
        final: What it has at its end at the very most.
        is_mapped: Whether it is mapped already.
    """

    executor: int
    tokens: int
    growth: int
    final: int
    is_mapped: bool = False


def bound(o: Observed, executor: int) -> float:
    """Return OB, the bound on offloaded over local, of one executor."""
    capacity = o.executors[executor].capacity
    memory = bounds.ob_mem(capacity, o.decode.capacity, o.costs.remote[executor], o.costs.local)
    return min(memory, _comp(o))


def place(o: Observed, request: Candidate) -> Decision:
    """Decide about one request; see the module."""
    executor = o.executors[request.executor]
    if not executor.available and not executor.mappable:
        return Decision(Placement.LOCAL, Reason.EXECUTOR_AWAY)
    if o.ratio is not None:
        return Decision(_by_ratio(o, executor, o.ratio), Reason.RATIO)
    own = cdiv(request.tokens, executor.memory.block_size)
    has_room = executor.memory.fits(request.tokens, request.growth, own)
    # An empty decode engine takes any request: vLLM has checked that it fits, and waiting would be for ever.
    if o.decode.rows == 0 or o.decode.memory.fits(request.tokens, request.growth):
        if has_room and executor.available and _shortens(o, request):
            return Decision(Placement.OFFLOADED, Reason.SHORTER_STEP)
        if has_room and executor.mappable and _is_emptier(o, executor, request, own):
            return Decision(Placement.MAPPED, Reason.NO_TRANSFER)
        return Decision(Placement.LOCAL, Reason.FITS)
    if not has_room:
        return Decision(Placement.WAIT, Reason.EXECUTOR_FULL)
    if executor.mappable and not (executor.available and _shortens(o, request)):
        return Decision(Placement.MAPPED, Reason.LOCAL_FULL)
    local = (o.decode.rows, o.decode.tokens)
    limit = bound(o, request.executor)
    is_within = bounds.within(o.rule, (executor.rows, executor.tokens), request.tokens, request.final, local, limit)
    if is_within and _is_hidden(o, request.executor):
        return Decision(Placement.OFFLOADED, Reason.LOCAL_FULL)
    if executor.mappable:
        return Decision(Placement.MAPPED, Reason.LOCAL_FULL)
    if _is_worth(o, request):
        return Decision(Placement.OFFLOADED, Reason.THROUGHPUT)
    return Decision(Placement.WAIT, Reason.OVER_BOUND)


def _is_hidden(o: Observed, executor: int) -> bool:
    """Whether local attention hides the link to an executor. The bounds know memory and bandwidth, and no time."""
    return o.costs.link_seconds(executor) <= o.costs.local * o.decode.tokens


def _is_emptier(o: Observed, executor: EngineState, request: Candidate, own: int) -> bool:
    """Whether the prefill engine's memory has more to spare for a request than the decode engine's own.

    Else what is saved by not moving it is paid for by prompts that wait for memory.
    """
    there = executor.memory.part_needed(request.tokens, request.growth, own)
    return there <= o.decode.memory.part_needed(request.tokens, request.growth)


def _by_ratio(o: Observed, executor: EngineState, ratio: float) -> Placement:
    """Return the placement that keeps a fixed ratio. Who may be offloaded and mapped is so by turns."""
    if o.offloaded + o.mapped + 1 > ratio * (o.decided + 1) + 1e-9:
        return Placement.LOCAL
    is_mapped = executor.mappable and (not executor.available or o.mapped < o.offloaded)
    return Placement.MAPPED if is_mapped else Placement.OFFLOADED


def move(o: Observed, offloaded: Sequence[Candidate]) -> tuple[int, Reason] | None:
    """Return which offloaded request is to go on locally, as an index, and why; None for none.

    A prefill engine that asks for memory comes first: it gets the request that holds most. Else an executor that is
    slower than local attention gives up the request whose move shortens the step most.
    """
    fits = [(i, r) for i, r in enumerate(offloaded) if o.decode.memory.fits(r.tokens, r.growth)]
    recalled = [(r.tokens, i) for i, r in fits if o.executors[r.executor].recalls]
    if recalled:
        return max(recalled)[1], Reason.RECALLED
    now = _seconds(o)
    remote = [(i, r) for i, r in fits if not r.is_mapped]
    gains = [(gain, i) for i, r in remote if (gain := now - _seconds(o, moved=r)) * r.growth > now]
    gain, index = max(gains, default=(0.0, -1))
    return (index, Reason.EXECUTOR_SLOW) if gain > MOVE_GAIN * now else None


def _comp(o: Observed) -> float:
    """OB_comp, from measured costs: B_TPOT is the largest all-local batch of present lengths that meets the objective,
    B_max the largest whose GEMMs meet it beside the present local attention."""
    if o.tpot_slo is None:
        return math.inf
    per_row = o.costs.local * o.tokens / max(o.rows, 1)
    b_tpot = o.costs.most_rows(o.tpot_slo, 0.0, per_row, o.max_rows)
    b_max = o.costs.most_rows(o.tpot_slo, o.costs.local * o.decode.tokens, 0.0, o.max_rows)
    return bounds.ob_comp(b_max, max(b_tpot, 1))


def _seconds(o: Observed, moved: Candidate | None = None) -> float:
    """Seconds of a step now, or with `moved` local instead of offloaded."""
    remote, local = o.remote, o.decode.tokens
    if moved is not None:
        rows, tokens = remote[moved.executor]
        remote[moved.executor] = (rows - 1, tokens - moved.tokens)
        local += moved.tokens
    return o.costs.seconds(o.rows, local, remote)


def _with(o: Observed, executor: int, tokens: int) -> list[tuple[int, int]]:
    """Rows and tokens of each executor, with one more request of `tokens` on `executor`."""
    remote = o.remote
    rows, held = remote[executor]
    remote[executor] = (rows + 1, held + tokens)
    return remote


def _is_worth(o: Observed, request: Candidate) -> bool:
    """Whether a request beyond the bound still raises throughput clearly: where a step is mostly weights, a larger
    batch pays even if its attention does not hide. It counts as long as the batch's mean, for it will be: compared at
    its greatest length with others at their present one, it would wait while all are young."""
    rows, now = o.rows, _seconds(o)
    tokens = max(request.tokens, o.tokens // max(rows, 1))
    then = o.costs.seconds(rows + 1, o.decode.tokens, _with(o, request.executor, tokens))
    if o.tpot_slo is not None and then > o.tpot_slo:
        return False
    return (then - now) * rows <= MAX_MARGINAL_COST * now


def _shortens(o: Observed, request: Candidate) -> bool:
    rows, remote = o.rows + 1, _with(o, request.executor, request.tokens)
    here = o.costs.seconds(rows, o.decode.tokens + request.tokens, o.remote)
    there = o.costs.seconds(rows, o.decode.tokens, remote)
    if o.tpot_slo is not None and here > o.tpot_slo >= there:
        return True
    taken = o.costs.remote_seconds(request.executor, *remote[request.executor]) / there
    return there <= (1 - GAIN) * here and o.executors[request.executor].busy + taken <= BUSY
