"""Where requests go: the policy, its bounds and costs, without vLLM."""

from __future__ import annotations

import itertools
import math

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from vllm_adrenaline.placement import bounds
from vllm_adrenaline.placement.costs import Costs, undisturbed
from vllm_adrenaline.placement.memory import Memory, peak
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

COSTS = Costs(step=[(1, 0.010), (8, 0.012), (64, 0.050)], local=2e-6, remote=[2e-6], exchange=1e-4)


def engine(capacity: int, room: int, rows: int, tokens: int) -> EngineState:
    """An engine with `room` tokens of memory beyond what its requests have and need."""
    return EngineState(capacity, Memory(room, 1), rows, tokens)


ROOMY = engine(capacity=10_000, room=10_000, rows=0, tokens=0)
FULL = engine(capacity=4_000, room=-1_000, rows=8, tokens=4_000)
REQUEST = Candidate(executor=0, tokens=500, growth=140, final=640)


def observed(decode: EngineState = ROOMY, executor: EngineState = ROOMY, **other: object) -> Observed:
    return Observed(**({"decode": decode, "executors": [executor], "costs": COSTS} | other))


def offloaded_of(ratio: float, count: int, available: bool = True) -> int:
    offloaded, executor = 0, msgspec.structs.replace(ROOMY, available=available)
    for decided in range(count):
        state = observed(executor=executor, ratio=ratio, decided=decided, offloaded=offloaded)
        offloaded += place(state, REQUEST).placement is Placement.OFFLOADED
    return offloaded


@given(st.floats(0, 1), st.integers(0, 300))
def test_a_fixed_share_is_kept_at_every_moment(ratio: float, count: int) -> None:
    assert ratio * count - 1 < offloaded_of(ratio, count) <= ratio * count + 1e-6


@pytest.mark.parametrize(("ratio", "expected"), [(0.0, 0), (0.5, 16), (0.7, 22), (1.0, 32)])
def test_exact_counts_of_32_requests(ratio: float, expected: int) -> None:
    assert offloaded_of(ratio, 32) == expected


def test_nothing_is_offloaded_to_an_executor_that_is_away() -> None:
    assert offloaded_of(1.0, 10, available=False) == 0
    away = msgspec.structs.replace(ROOMY, available=False)
    assert place(observed(decode=FULL, executor=away), REQUEST) == Decision(Placement.LOCAL, Reason.EXECUTOR_AWAY)


def test_one_request_alone_stays_local_for_nothing_could_hide_its_attention() -> None:
    assert place(observed(), REQUEST) == Decision(Placement.LOCAL, Reason.FITS)


def test_with_memory_to_spare_offloading_must_shorten_the_step() -> None:
    long = engine(capacity=100_000, room=90_000, rows=8, tokens=20_000)  # 40 ms of attention beside 12 ms of GEMMs
    assert place(observed(decode=long), msgspec.structs.replace(REQUEST, tokens=4_000)) == Decision(
        Placement.OFFLOADED, Reason.SHORTER_STEP
    )
    assert place(observed(decode=long), REQUEST).placement is Placement.LOCAL, "1 ms of 53 is noise"


MAPPABLE = msgspec.structs.replace(ROOMY, available=False, mappable=True)


def test_what_can_be_mapped_is_not_moved_while_the_prefill_engine_has_room() -> None:
    assert place(observed(executor=MAPPABLE), REQUEST) == Decision(Placement.MAPPED, Reason.NO_TRANSFER)
    assert place(observed(decode=FULL, executor=MAPPABLE), REQUEST) == Decision(Placement.MAPPED, Reason.LOCAL_FULL)


def test_with_less_to_spare_on_the_prefill_engine_than_here_it_is_pulled_for_prompts_would_wait() -> None:
    tight = msgspec.structs.replace(MAPPABLE, memory=Memory(1_500, 1))
    assert place(observed(executor=tight), REQUEST) == Decision(Placement.LOCAL, Reason.FITS)
    small = msgspec.structs.replace(ROOMY, memory=Memory(1_000, 1))
    assert place(observed(decode=small, executor=tight), REQUEST) == Decision(Placement.MAPPED, Reason.NO_TRANSFER)


def test_without_room_on_the_prefill_engine_it_is_pulled_and_with_none_here_either_it_waits() -> None:
    full = msgspec.structs.replace(FULL, available=False, mappable=True)
    assert place(observed(executor=full), REQUEST) == Decision(Placement.LOCAL, Reason.FITS)
    assert place(observed(decode=FULL, executor=full), REQUEST) == Decision(Placement.WAIT, Reason.EXECUTOR_FULL)


def test_of_an_executor_and_mapped_memory_the_one_with_the_shorter_step_is_taken() -> None:
    both = msgspec.structs.replace(ROOMY, mappable=True)
    long = engine(capacity=100_000, room=90_000, rows=8, tokens=20_000)
    request = msgspec.structs.replace(REQUEST, tokens=4_000)
    assert place(observed(decode=long, executor=both), request).placement is Placement.OFFLOADED
    assert place(observed(executor=both), REQUEST).placement is Placement.MAPPED
    busy, short = msgspec.structs.replace(both, busy=0.9), msgspec.structs.replace(long, memory=Memory(5_000, 1))
    assert place(observed(decode=short, executor=busy), request).placement is Placement.MAPPED


@given(st.floats(0, 1), st.integers(0, 100))
def test_a_fixed_share_is_divided_between_executor_and_mapped_memory(ratio: float, count: int) -> None:
    both, counts = msgspec.structs.replace(ROOMY, mappable=True), dict.fromkeys(Placement, 0)
    for decided in range(count):
        offloaded, mapped = counts[Placement.OFFLOADED], counts[Placement.MAPPED]
        state = observed(executor=both, ratio=ratio, decided=decided, offloaded=offloaded, mapped=mapped)
        counts[place(state, REQUEST).placement] += 1
    offloaded, mapped = counts[Placement.OFFLOADED], counts[Placement.MAPPED]
    assert 0 <= offloaded - mapped <= 1
    assert ratio * count - 1 < offloaded + mapped <= ratio * count + 1e-6


def test_a_mapped_request_moves_only_when_its_prefill_engine_wants_the_memory() -> None:
    slow = Costs(step=COSTS.step, local=2e-6, remote=[1e-3], exchange=1e-4)
    mapped = msgspec.structs.replace(REQUEST, is_mapped=True)
    decode = engine(capacity=100_000, room=90_000, rows=4, tokens=2_000)
    assert move(observed(decode=decode, executor=MAPPABLE, costs=slow), [mapped]) is None
    recalls = msgspec.structs.replace(MAPPABLE, recalls=True)
    assert move(observed(decode=decode, executor=recalls, costs=slow), [mapped]) == (0, Reason.RECALLED)


def test_a_busy_prefill_engine_is_left_alone_unless_memory_is_needed() -> None:
    long = engine(capacity=100_000, room=90_000, rows=8, tokens=20_000)
    busy = msgspec.structs.replace(ROOMY, busy=0.9)
    request = msgspec.structs.replace(REQUEST, tokens=4_000)
    assert place(observed(decode=long, executor=busy), request).placement is Placement.LOCAL
    assert place(observed(decode=FULL, executor=busy), REQUEST) == Decision(Placement.OFFLOADED, Reason.LOCAL_FULL)


def test_what_does_not_fit_is_offloaded_while_it_hides_then_waits() -> None:
    assert place(observed(decode=FULL), REQUEST) == Decision(Placement.OFFLOADED, Reason.LOCAL_FULL)
    as_much = engine(capacity=10_000, room=5_000, rows=8, tokens=4_000)
    dear = msgspec.structs.replace(COSTS, local=8e-6, remote=[8e-6])
    state = observed(decode=FULL, executor=as_much, costs=dear)
    assert place(state, REQUEST) == Decision(Placement.WAIT, Reason.OVER_BOUND)


def test_beyond_the_bound_a_larger_batch_is_made_where_steps_are_mostly_weights() -> None:
    as_much = engine(capacity=10_000, room=5_000, rows=8, tokens=4_000)
    weights = Costs([(1, 0.050), (64, 0.060)], 2e-6, [2e-6])
    state = observed(decode=FULL, executor=as_much, costs=weights)
    assert place(state, REQUEST) == Decision(Placement.OFFLOADED, Reason.THROUGHPUT)
    tight = observed(decode=FULL, executor=as_much, costs=weights, tpot_slo=0.061)  # it takes 60 ms now
    assert place(tight, REQUEST).placement is Placement.WAIT


def test_a_request_waits_when_neither_side_has_blocks_and_an_empty_engine_takes_any() -> None:
    full = msgspec.structs.replace(FULL, rows=2, tokens=900)
    assert place(observed(decode=FULL, executor=full), REQUEST) == Decision(Placement.WAIT, Reason.EXECUTOR_FULL)
    nothing = engine(capacity=100, room=100, rows=0, tokens=0)
    assert place(observed(decode=nothing, executor=full), REQUEST) == Decision(Placement.LOCAL, Reason.FITS)


def test_a_slower_executor_gets_less() -> None:
    slow = msgspec.structs.replace(COSTS, remote=[8e-6])
    quarter = engine(capacity=10_000, room=5_000, rows=2, tokens=1_000)
    assert bound(observed(decode=FULL), 0) == 1
    assert bound(observed(decode=FULL, costs=slow), 0) == 0.25
    assert place(observed(decode=FULL, executor=quarter), REQUEST).placement is Placement.OFFLOADED
    assert place(observed(decode=FULL, executor=quarter, costs=slow), REQUEST).placement is Placement.WAIT


def test_a_tpot_objective_bounds_the_batch() -> None:
    free, tight = observed(decode=FULL), observed(decode=FULL, tpot_slo=0.0205)  # it takes 20 ms with 8 local rows
    assert place(free, REQUEST).placement is Placement.OFFLOADED
    assert place(tight, REQUEST).placement is Placement.WAIT
    assert bound(tight, 0) < bound(free, 0)


@pytest.mark.parametrize(("rule", "permitted"), [("c1", False), ("c2", True), ("or", True), ("and", False)])
def test_the_paper_conditions_and_their_combinations(rule: bounds.Rule, permitted: bool) -> None:
    # 3,500 of 4,000 tokens: 400 more fit now, 700 at the end would not.
    assert bounds.within(rule, (7, 3_500), 400, 700, (8, 4_000), 1.0) is permitted


@given(st.floats(1, 1e6), st.floats(1, 1e6), st.floats(1e-9, 1), st.floats(1e-9, 1))
def test_ob_mem_is_the_smaller_of_memory_and_bandwidth(p: float, d: float, slow: float, fast: float) -> None:
    assert bounds.ob_mem(p, d, slow, fast) == min(p / d, fast / slow)


def test_ob_comp_is_the_papers() -> None:
    assert bounds.ob_comp(180, 100) == pytest.approx(0.8)
    assert bounds.ob_comp(80, 100) == 0
    assert math.isinf(bounds.ob_comp(10, 0))


@given(st.integers(1, 500), st.integers(1, 500))
def test_a_larger_batch_never_costs_less(a: int, b: int) -> None:
    assert COSTS.other(min(a, b)) <= COSTS.other(max(a, b)) + 1e-12


def test_a_hump_in_a_profile_is_not_believed() -> None:
    true = [(1, 8.0), (8, 9.0), (16, 12.0), (32, 18.0), (64, 30.0)]
    assert undisturbed(true) == true
    disturbed = [(1, 8.0), (8, 9.0), (16, 26.0), (32, 34.0), (64, 30.0)]
    assert undisturbed(disturbed) == [(1, 8.0), (8, 9.0), (64, 30.0)]


@given(st.lists(st.floats(0.001, 1.0), min_size=1, max_size=9))
def test_an_undisturbed_profile_never_falls_and_grows_no_slower_for_larger_batches(seconds: list[float]) -> None:
    times = [(2**i, each) for i, each in enumerate(seconds)]
    found = undisturbed(times)
    costs = Costs(found, 0.0, [])
    assert all(costs.other(rows) <= each * (1 + 1e-9) for rows, each in times)
    slopes = [(b[1] - a[1]) / (b[0] - a[0]) for a, b in itertools.pairwise(found)]
    assert slopes == sorted(slopes)
    assert all(slope >= 0 for slope in slopes)
    assert {found[0][0], found[-1]} == {times[0][0], times[-1]}


def test_an_executor_that_is_slower_gives_a_request_back_but_not_for_little() -> None:
    slow = msgspec.structs.replace(COSTS, remote=[10e-6])
    executor = engine(capacity=10_000, room=5_000, rows=2, tokens=2_000)
    offloaded = [REQUEST, msgspec.structs.replace(REQUEST, tokens=1_500)]
    state = observed(decode=msgspec.structs.replace(ROOMY, rows=4, tokens=2_000), executor=executor, costs=slow)
    assert move(state, offloaded) == (1, Reason.EXECUTOR_SLOW)
    assert move(msgspec.structs.replace(state, costs=COSTS), offloaded) is None
    assert move(msgspec.structs.replace(state, decode=FULL), offloaded) is None, "there is no room for it"


def test_memory_asked_back_is_given_back_where_there_is_room() -> None:
    executor = msgspec.structs.replace(FULL, recalls=True)
    assert move(observed(executor=executor), [REQUEST]) == (0, Reason.RECALLED)
    assert move(observed(decode=FULL, executor=executor), [REQUEST]) is None


@given(st.lists(st.tuples(st.integers(1, 300), st.integers(0, 200)), max_size=12))
def test_the_peak_is_what_growing_in_step_needs(rows: list[tuple[int, int]]) -> None:
    needs = [
        sum(-(-(tokens + step) // BLOCK) for tokens, growth in rows if growth >= step)
        for step in range(max((growth for _, growth in rows), default=0) + 1)
    ]
    assert peak(rows, BLOCK) == max(needs)


def test_the_peak_of_many_requests_is_found_nearly() -> None:
    rows = [(100 + 7 * i % 50, i) for i in range(400)]
    exact = max(sum(-(-(t + step) // BLOCK) for t, growth in rows if growth >= step) for step in range(400))
    assert 0.95 * exact <= peak(rows, BLOCK) <= exact


BLOCK = 16


class Cluster(RuleBasedStateMachine):
    """A decode engine and two executors in blocks, driven by the policy: every request grows to its end."""

    @initialize(local=st.integers(20, 60), remote=st.integers(5, 80))
    def start(self, local: int, remote: int) -> None:
        self.capacity = {None: local, 0: remote, 1: remote}
        self.used: dict[int | None, int] = {None: 0, 0: 0, 1: 0}
        self.live: list[tuple[int | None, int, int]] = []  # place, tokens, final
        self.waiting: list[Candidate] = []
        self.available = [True, True]
        self.costs = msgspec.structs.replace(COSTS, remote=[2e-6, 2e-6])
        self.admitted = 0

    def engine(self, where: int | None) -> EngineState:
        here = [(tokens, final - tokens) for place_, tokens, final in self.live if place_ == where]
        available = True if where is None else self.available[where]
        memory = Memory(self.capacity[where], BLOCK, here)
        return EngineState(self.capacity[where] * BLOCK, memory, len(here), sum(t for t, _ in here), available)

    def state(self) -> Observed:
        return Observed(self.engine(None), [self.engine(0), self.engine(1)], self.costs)

    @rule(executor=st.integers(0, 1), tokens=st.integers(1, 200), output=st.integers(1, 100))
    def arrive(self, executor: int, tokens: int, output: int) -> None:
        blocks = -(-(tokens + output) // BLOCK)
        if blocks <= self.capacity[None]:
            self.waiting.append(Candidate(executor, tokens, output, tokens + output))

    @precondition(lambda self: self.waiting)
    @rule()
    def admit(self) -> None:
        request, state = self.waiting[0], self.state()
        decision = place(state, request)
        if decision.placement is Placement.WAIT:
            assert state.decode.rows > 0, "waiting for nobody"
            return
        where = request.executor if decision.placement is Placement.OFFLOADED else None
        site, limit = state.executors[request.executor], bound(state, request.executor)
        if where is not None and decision.reason is Reason.THROUGHPUT:
            rows = state.decode.rows + sum(each.rows for each in state.executors)
            remote = [(each.rows, each.tokens) for each in state.executors]
            now = state.costs.seconds(rows, state.decode.tokens, remote)
            remote[where] = (site.rows + 1, site.tokens + request.tokens)
            assert (rows + 1) / state.costs.seconds(rows + 1, state.decode.tokens, remote) > rows / now
        if where is not None and decision.reason is Reason.LOCAL_FULL:
            assert self.available[where]
            assert site.tokens + request.tokens <= limit * state.decode.tokens + 1e-9, "over its bound"
        memory = (state.decode if where is None else site).memory
        # A prompt is with its executor already, in blocks of its own.
        own = 0 if where is None else -(-request.tokens // BLOCK)
        if (
            where is None
            and decision.reason is Reason.EXECUTOR_AWAY
            and not memory.fits(request.tokens, request.growth)
        ):
            return  # as in vLLM: it queues until local memory is free
        if state.decode.rows or where is not None:
            assert memory.fits(request.tokens, request.growth, own)
        if where is not None:
            self.capacity[where] += -(-request.tokens // BLOCK)
        self.live.append((where, request.tokens, request.final))
        self.waiting.pop(0)
        self.admitted += 1

    @rule(steps=st.integers(1, 40))
    def step(self, steps: int) -> None:
        for _ in range(steps):
            self.live = [(where, tokens + 1, final) for where, tokens, final in self.live if tokens < final]
            self.memory_suffices()

    @precondition(lambda self: self.live)
    @rule(index=st.integers(0, 1000))
    def abort(self, index: int) -> None:
        self.live.pop(index % len(self.live))

    @rule(executor=st.integers(0, 1), available=st.booleans())
    def joins_or_leaves(self, executor: int, available: bool) -> None:
        self.available[executor] = available
        if not available:
            self.live = [each for each in self.live if each[0] != executor]

    @rule(executor=st.integers(0, 1), factor=st.floats(0.5, 20))
    def slows(self, executor: int, factor: float) -> None:
        remote = list(self.costs.remote)
        remote[executor] = 2e-6 * factor
        self.costs = msgspec.structs.replace(self.costs, remote=remote)

    @invariant()
    def memory_suffices(self) -> None:
        for where in (None, 0, 1):
            needed = sum(-(-tokens // BLOCK) for place_, tokens, _ in self.live if place_ == where)
            assert needed <= self.capacity[where]

    def teardown(self) -> None:
        """Whatever happened: when the others end, every request gets its turn."""
        while getattr(self, "waiting", None):
            before = self.admitted
            self.admit()
            if self.admitted == before:
                assert self.live, "a request starves"
                self.live.pop()


TestCluster = Cluster.TestCase


def over(link_s: float) -> Costs:
    """Costs of an executor on another host."""
    return msgspec.structs.replace(COSTS, link=[link_s])


def test_nothing_is_offloaded_over_a_link_that_local_attention_does_not_hide() -> None:
    assert place(observed(decode=FULL, costs=over(0.002)), REQUEST) == Decision(Placement.OFFLOADED, Reason.LOCAL_FULL)
    assert place(observed(decode=FULL, costs=over(0.020)), REQUEST) == Decision(Placement.WAIT, Reason.OVER_BOUND)
    long = engine(capacity=100_000, room=90_000, rows=8, tokens=20_000)
    request = msgspec.structs.replace(REQUEST, tokens=4_000)
    assert place(observed(decode=long, costs=over(0.002)), request).placement is Placement.OFFLOADED
    assert place(observed(decode=long, costs=over(0.060)), request) == Decision(Placement.LOCAL, Reason.FITS)


def test_a_request_behind_a_link_that_became_slow_comes_back() -> None:
    decode = engine(capacity=100_000, room=90_000, rows=4, tokens=2_000)
    remote = engine(capacity=10_000, room=9_000, rows=1, tokens=500)
    assert move(observed(decode=decode, executor=remote, costs=over(0.002)), [REQUEST]) is None
    assert move(observed(decode=decode, executor=remote, costs=over(0.060)), [REQUEST]) == (0, Reason.EXECUTOR_SLOW)


def test_the_link_of_one_executor_is_not_anothers() -> None:
    costs = Costs(COSTS.step, COSTS.local, [2e-6, 2e-6], COSTS.exchange, link=[0.0, 0.060])
    state = observed(decode=FULL, executors=[ROOMY, ROOMY], costs=costs)
    assert place(state, REQUEST) == Decision(Placement.OFFLOADED, Reason.LOCAL_FULL)
    second = msgspec.structs.replace(REQUEST, executor=1)
    assert place(state, second) == Decision(Placement.WAIT, Reason.OVER_BOUND)
