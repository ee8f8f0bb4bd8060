"""Requests that wait to be placed: in order, decided anew each step, nobody lost."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest

from vllm_adrenaline.control.messages import Load
from vllm_adrenaline.decode.admission import EngineAdmission
from vllm_adrenaline.decode.blocks import RemotePool
from vllm_adrenaline.decode.placement_queue import PlacementQueue
from vllm_adrenaline.decode.request import RemoteRequest, progress_of
from vllm_adrenaline.placement.batch import Batch
from vllm_adrenaline.placement.costs import Costs
from vllm_adrenaline.prefill.utilization import PrefillUtilization

COSTS = Costs([(1, 0.010), (64, 0.050)], 2e-6, [2e-6])
BLOCK = 16


@dataclass
class Request:
    request_id: str
    num_tokens: int
    max_tokens: int = 16
    num_output_tokens: int = 0
    skip_reading_prefix_cache: bool = False
    kv_transfer_params: dict[str, Any] = field(default_factory=lambda: {"do_remote_prefill": True})

    @property
    def num_prompt_tokens(self) -> int:
        return self.num_tokens - self.num_output_tokens


class Engine:
    """A decode engine with `free` of 100 local blocks and a prefill engine with plenty."""

    def __init__(self, ratio: float | None, free: int, remote_free: int = 1000) -> None:
        options: Any = SimpleNamespace(ratio=ratio, offload_rule="or", tpot_slo_ms=0.0, maps=False, uses_executors=True)
        client: Any = SimpleNamespace(
            holds=lambda life, now: True,
            load=Load(total=2000, free=remote_free),
            welcome=object(),
            waiting=0,
            beat=lambda: None,
        )
        self.admission = EngineAdmission(options, COSTS, 100, BLOCK, max_rows=8)
        self.waiting = PlacementQueue(self.admission, BLOCK)
        self.pool = RemotePool(0, client)
        self.free, self.running = free, 0

    def arrive(self, *tokens: int) -> list[Any]:
        requests: list[Any] = [Request(f"r{i}", count) for i, count in enumerate(tokens)]
        for request in requests:
            self.waiting.add(RemoteRequest(request, self.pool, request.request_id))
        return requests

    def local(self) -> list[str]:
        """Return who may take local memory in this step."""
        return [name for name, waiting in self.waiting._pending.items() if waiting.decision is not None]

    def goes_local(self, name: str) -> None:
        """vLLM gave it blocks."""
        waiting = self.waiting._pending[name]
        self.waiting.drop(name)
        self.admission.count_local(waiting)

    def step(self) -> tuple[list[str], list[str]]:
        """Decide; return who is offloaded and who may go on locally."""
        batch = Batch()
        for i in range(self.running):
            batch.add(progress_of(Request(f"running{i}", 160)), None)  # type: ignore[arg-type]
        pools = self.admission.pools(self.free, [self.pool], frozenset(), ())
        offloaded = [each.request.request_id for each, _ in self.waiting.admit(pools, batch)]
        return offloaded, self.local()


def test_what_fits_goes_local_in_order_and_the_rest_is_offloaded() -> None:
    engine = Engine(None, free=23)
    engine.running = 2
    engine.arrive(160, 160, 160)  # 11 blocks each with their growth; two running ones grow by one each
    assert engine.step() == (["r1", "r2"], ["r0"])


def test_a_decision_is_made_anew_until_vllm_gives_the_blocks() -> None:
    engine = Engine(None, free=50)
    engine.arrive(160)
    assert engine.step() == ([], ["r0"])
    assert engine.step() == ([], ["r0"])
    assert engine.admission.counts == {}
    engine.goes_local("r0")
    assert engine.admission.counts == {("local", "fits"): 1}


def test_behind_a_request_that_waits_nobody_takes_local_memory() -> None:
    engine = Engine(None, free=20, remote_free=0)
    engine.running = 2
    engine.arrive(640, 16)
    assert engine.step() == ([], [])
    assert engine.admission.counts == {("wait", "executor_full"): 1}
    engine.step()
    assert engine.admission.counts == {("wait", "executor_full"): 1}, "a wait is counted once"
    engine.free = 90
    assert engine.step() == ([], ["r0", "r1"])


def test_a_full_batch_takes_nobody() -> None:
    engine = Engine(None, free=90)
    engine.running = 8
    engine.arrive(16)
    assert engine.step() == ([], [])


def test_a_fixed_ratio_decides_once_and_at_once() -> None:
    engine = Engine(0.5, free=0)
    engine.arrive(160, 160, 160, 160)
    assert engine.step() == (["r1", "r3"], ["r0", "r2"])
    assert engine.step() == ([], ["r0", "r2"])
    assert engine.admission.counts == {("local", "ratio"): 2, ("offloaded", "ratio"): 2}


def test_a_request_that_may_not_use_cached_kv_is_local_and_counts_for_no_ratio() -> None:
    engine = Engine(1.0, free=50)
    (request,) = engine.arrive(160)
    request.skip_reading_prefix_cache = True
    assert engine.step() == ([], ["r0"])
    assert engine.admission.counts == {("local", "no_prefix_cache"): 1}


def test_an_aborted_request_is_forgotten() -> None:
    engine = Engine(None, free=50)
    engine.arrive(160)
    engine.waiting.drop("r0")
    assert not engine.waiting
    assert engine.step() == ([], [])


@pytest.mark.parametrize(("spans", "share"), [([], 0), ([(9.5, 9.75)], 0.25), ([(8, 9.5)], 0.5), ([(0, 1)], 0)])
def test_how_busy_a_prefill_engine_was_in_the_last_second(spans: list[tuple[float, float]], share: float) -> None:
    now = [0.0]
    busy = PrefillUtilization(lambda: now[0])
    for begin, end in spans:
        now[0] = begin
        busy.begin()
        now[0] = end
        busy.end()
    now[0] = 10.0
    assert busy.share() == pytest.approx(share)
    busy.begin()
    now[0] = 10.5
    assert busy.share() >= 0.5, "the step that is running counts as well"


@pytest.mark.parametrize(("ratio", "told"), [(None, 40), (0.5, 0)])
def test_a_prefill_engine_knows_what_waits_unless_a_fixed_ratio_decides(ratio: float | None, told: int) -> None:
    engine = Engine(ratio, free=0, remote_free=0)
    engine.running = 2
    engine.arrive(320, 320)
    assert engine.pool.client.waiting == told
    engine.waiting.drop("r0")
    engine.waiting.drop("r1")
    engine.waiting.drop("r1")
    assert engine.pool.client.waiting == 0


@pytest.mark.parametrize(("before", "after"), [(None, 0.5), (0.5, None)])
def test_what_a_prefill_engine_was_told_is_taken_back_when_the_ratio_changes_meanwhile(
    before: float | None, after: float | None
) -> None:
    engine = Engine(before, free=0, remote_free=0)
    engine.arrive(320)
    engine.admission.set_ratio(after)
    engine.waiting.drop("r0")
    assert engine.pool.client.waiting == 0
