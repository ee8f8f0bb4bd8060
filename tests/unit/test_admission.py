"""The admission loop: in order, nobody overtakes into memory that somebody waits for, and all is counted once."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_adrenaline.placement.admission import MAX_PENDING_PER_STEP, MOVE_INTERVAL, Admission, Settings
from vllm_adrenaline.placement.batch import Batch, Progress
from vllm_adrenaline.placement.costs import Costs
from vllm_adrenaline.placement.policy import Decision, Placement, Reason
from vllm_adrenaline.placement.pools import ExecutorPool, LocalPool, Pools
from vllm_adrenaline.placement.starvation import STARVE_S, reserve_growth

BLOCK = 16
COSTS = Costs([(1, 0.010), (64, 0.050)], 2e-6, [2e-6, 2e-6])
ONLY_LOCAL = (Reason.NO_CACHE, Reason.UNFINISHED)
LOCAL, OFFLOADED, WAIT = Placement.LOCAL, Placement.OFFLOADED, Placement.WAIT


@dataclass(eq=False)
class Request:
    tokens: int
    executor: int = 0
    only_local: Reason | None = None
    decision: Decision | None = None
    waited: bool = False
    is_mapped: bool = False

    @property
    def progress(self) -> Progress:
        return Progress(self.tokens, 0, 16)


def admission(ratio: float | None = None, max_rows: int = 8) -> Admission:
    return Admission(Settings(BLOCK, max_rows), COSTS, ratio)


def pools(free: int, *executors: int, available: bool = True, recalls: bool = False) -> Pools:
    """`free`: of 100 local blocks; `executors`: free blocks of each."""
    remote = [ExecutorPool(2000, each, 0, available=available, recalls=recalls) for each in executors or (1000, 1000)]
    return Pools(LocalPool(100, free), remote)


def running(count: int, tokens: int = 160, offloaded: int = 0) -> Batch:
    batch = Batch()
    for i in range(count):
        batch.add(Progress(tokens, 0, 16), 0 if i < offloaded else None)
    return batch


def placements(decided: list[tuple[Request, Decision]]) -> list[tuple[int, Placement]]:
    return [(request.tokens, decision.placement) for request, decision in decided]


def test_local_memory_goes_to_those_who_came_first() -> None:
    queue = [Request(160), Request(161), Request(162)]  # 11 blocks each with their growth
    batch = running(2)
    decided = admission().admit(queue, pools(23), batch)
    assert placements(decided) == [(160, LOCAL), (161, OFFLOADED), (162, OFFLOADED)]
    assert [request.decision is not None for request in queue] == [True, False, False]
    assert (batch.local.rows, batch.remote[0].rows, batch.remote[0].tokens) == (3, 2, 323)


def test_behind_one_that_waits_nobody_gets_local_memory_nor_its_executors() -> None:
    queue = [Request(640), Request(16), Request(17, executor=1), Request(320, executor=1)]
    found = admission()
    decided = found.admit(queue, pools(20, 0, 1000), running(2))
    # The small ones fit locally, but it is not their turn. The last does not, and its own executor has room.
    assert placements(decided) == [(640, WAIT), (320, OFFLOADED)]
    assert queue[1].decision is None
    assert queue[2].decision is None
    assert found.counts == {("wait", "executor_full"): 1, ("offloaded", "local_full"): 1}


def test_a_wait_is_counted_once_however_long_it_lasts() -> None:
    found, queue = admission(), [Request(640)]
    for _ in range(5):
        assert placements(found.admit(queue, pools(20, 0, 0), running(2))) == [(640, WAIT)]
    assert found.counts == {("wait", "executor_full"): 1}


def test_a_local_decision_is_counted_when_there_is_memory_and_forgotten_when_there_is_none() -> None:
    found, queue = admission(), [Request(160)]
    found.admit(queue, pools(50), Batch())
    assert queue[0].decision == Decision(LOCAL, Reason.FITS)
    found.admit(queue, pools(5, 0, 0), running(2))
    assert queue[0].decision is None
    found.count_local(queue[0])
    assert not found.counts - Counter({("wait", "executor_full"): 1})
    found.admit(queue, pools(50), Batch())
    found.count_local(queue[0])
    assert found.counts["local", "fits"] == 1


def test_a_batch_grows_to_its_largest_size_and_no_further() -> None:
    queue = [Request(16) for _ in range(5)]
    batch = running(6)
    assert len(admission(max_rows=8).admit(queue, pools(90), batch)) == 2
    assert batch.rows == 8
    assert [request.decision is not None for request in queue] == [True, True, False, False, False]


def test_no_more_than_so_many_are_looked_at() -> None:
    queue = [Request(16) for _ in range(MAX_PENDING_PER_STEP + 10)]
    assert len(admission(ratio=0.5, max_rows=4).admit(queue, pools(0), Batch())) == MAX_PENDING_PER_STEP


@pytest.mark.parametrize("ratio", [0.0, 0.3, 0.5, 1.0])
def test_a_fixed_ratio_decides_once_whatever_the_memory_and_the_batch(ratio: float) -> None:
    found, queue = admission(ratio, max_rows=1), [Request(160) for _ in range(10)]
    first = found.admit(queue, pools(0, 0, 0), running(3))
    assert len(first) == 10
    local = [request for request, decision in first if decision.placement is LOCAL]
    assert len(local) == 10 - round(10 * ratio)
    assert found.admit(local, pools(0, 0, 0), running(3)) == []
    for request in local:
        found.count_local(request)
    assert sum(found.counts.values()) == 10, "not once more when there is memory"
    assert {reason for _, reason in found.counts} == {"ratio"}


def test_a_new_ratio_counts_from_the_beginning() -> None:
    found = admission(0.0)
    found.admit([Request(160) for _ in range(10)], pools(0), Batch())
    found.set_ratio(0.5)
    again = found.admit([Request(160) for _ in range(2)], pools(0), Batch())
    assert [decision.placement for _, decision in again] == [LOCAL, OFFLOADED]


@pytest.mark.parametrize("ratio", [None, 0.5])
def test_a_request_that_cannot_use_cached_kv_is_local_and_no_part_of_the_ratio(ratio: float | None) -> None:
    found, queue = admission(ratio), [Request(160, only_local=Reason.NO_CACHE), Request(161), Request(162)]
    decided = found.admit(queue, pools(90), Batch())
    assert decided[0][1] == Decision(LOCAL, Reason.NO_CACHE)
    found.count_local(queue[0])
    assert found.counts["local", "no_prefix_cache"] == 1
    if ratio is not None:
        assert placements(decided)[1:] == [(161, LOCAL), (162, OFFLOADED)]


def test_nothing_is_offloaded_to_an_executor_that_is_not_available() -> None:
    decided = admission(1.0).admit([Request(160)], pools(90, available=False), Batch())
    assert decided[0][1] == Decision(LOCAL, Reason.EXECUTOR_AWAY)


def test_a_move_is_looked_for_so_often_and_only_while_something_is_offloaded() -> None:
    found, due = admission(), []
    for step in range(4 * MOVE_INTERVAL):
        any_offloaded = step % 2 == 1
        found.begin_step(any_offloaded)
        assert found.is_move_due == found.is_move_due, "asking changes nothing"
        if found.is_move_due:
            due.append(step)
    assert due == [2 * MOVE_INTERVAL - 1, 4 * MOVE_INTERVAL - 1]


def test_a_move_is_counted_when_it_is_made_and_a_fixed_ratio_makes_none() -> None:
    offloaded, state = [Request(160)], pools(90, 5, 5, recalls=True)
    found = admission()
    assert found.choose_move(state, running(2, offloaded=1), offloaded) == (offloaded[0], Reason.RECALLED)
    assert found.counts == {}
    found.count_move(Reason.RECALLED)
    assert found.take_counts() == {("moved", "recalled"): 1}
    assert found.take_counts() == {}
    fixed = admission(0.5)
    assert fixed.choose_move(state, running(2, offloaded=1), offloaded) is None
    assert fixed.bound == found.bound > 0


def test_leased_blocks_are_room_and_the_reserve_is_none() -> None:
    assert ExecutorPool(100, 30, 5, leased=3).room == 28
    assert ExecutorPool(100, 3, 5, leased=3).room == 3


@given(
    st.lists(
        st.builds(Request, st.integers(1, 900), st.integers(0, 1), st.sampled_from([None, *ONLY_LOCAL])), max_size=80
    ),
    st.integers(0, 100),
    st.lists(st.integers(0, 300), min_size=2, max_size=2),
    st.integers(0, 10),
    st.sampled_from([None, 0.0, 0.4, 1.0]),
)
def test_whatever_waits_is_decided_in_order_and_never_past_somebody_who_waits(
    queue: list[Request], free: int, executors: list[int], rows: int, ratio: float | None
) -> None:
    found, batch = admission(ratio), running(rows)
    tokens = batch.local.tokens
    decided = found.admit(queue, pools(free, *executors), batch)
    seen = [request for request, _ in decided]
    assert seen == [request for request in queue[:MAX_PENDING_PER_STEP] if any(request is each for each in seen)]
    waits_for: set[int] = set()
    for request, decision in decided:
        if decision.placement is WAIT:
            waits_for.add(request.executor)
        assert decision.placement is not LOCAL or not waits_for
        assert decision.placement is not OFFLOADED or request.executor not in waits_for
        assert (request.decision is not None) == (decision.placement is LOCAL)
    kinds = Counter(decision.placement for _, decision in decided)
    assert batch.rows == rows + kinds[LOCAL] + kinds[OFFLOADED]
    assert batch.local.tokens == tokens + sum(each.tokens for each, d in decided if d.placement is LOCAL)
    if ratio is None:
        assert batch.rows <= max(8, rows)
        counted = kinds[OFFLOADED] + kinds[WAIT]  # local ones when they have memory
    else:
        counted = len(decided)
        assert len(decided) == min(len(queue), MAX_PENDING_PER_STEP)
    assert sum(found.counts.values()) == counted


# Starvation


@dataclass(eq=False)
class Growing:
    starved_since: float | None = None


def test_blocks_go_to_those_who_run_first_and_who_starves_for_long_leaves() -> None:
    first, second, other = Growing(), Growing(), Growing()
    needs = [(first, "a", 2), (second, "a", 1), (other, "b", 0)]
    assert reserve_growth(needs, {"a": 2}, now=10.0) == ([second], [])
    assert reserve_growth(needs, {"a": 2}, now=10.0 + STARVE_S / 2) == ([second], [])
    assert reserve_growth(needs, {"a": 2}, now=10.0 + STARVE_S) == ([], [second])
    assert reserve_growth(needs, {"a": 3}, now=20.0) == ([], [])
    assert second.starved_since is None, "it begins anew"
    assert reserve_growth(needs, {"a": 2}, now=30.0) == ([second], [])


def test_a_request_that_needs_nothing_runs_even_where_nothing_is_left() -> None:
    full = Growing()
    assert reserve_growth([(full, "a", -1)], {}, now=0.0) == ([], [])
    assert reserve_growth([(full, "a", 1)], {}, now=0.0) == ([full], [])
    assert full.starved_since == 0.0
