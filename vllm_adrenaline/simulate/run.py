"""The simulation itself: engines in time, requests through them, and the placement policy that serves real ones."""

from __future__ import annotations

import heapq
import itertools
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from vllm_adrenaline.colocation.controller import Objectives, Phase
from vllm_adrenaline.colocation.tuner import ShareTuner
from vllm_adrenaline.simulate.decode import Decode
from vllm_adrenaline.simulate.device import Device
from vllm_adrenaline.simulate.elastic import Elastic
from vllm_adrenaline.simulate.prefill import Prefill
from vllm_adrenaline.simulate.row import Row
from vllm_adrenaline.simulate.setup import Setup
from vllm_adrenaline.system.statistics import percentile
from vllm_adrenaline.workload.trace import Arrival

UPDATE_S = 0.5
"""Between two updates of the shares of a device (control/server.py, POLL_MS)."""


class Result(msgspec.Struct, frozen=True):
    """What came out: milliseconds, tokens a second, shares of the time from the first arrival to the last token."""

    requests: int
    seconds: float
    throughput_tok_s: float
    ttft_p50_ms: float
    ttft_p90_ms: float
    ttft_p99_ms: float
    tpot_p50_ms: float
    tpot_p90_ms: float
    tpot_p99_ms: float
    steps: int
    mean_rows: float
    offloaded: int
    mapped: int
    preemptions: int
    moved: int
    handed_over: int
    stays: int
    exposed_share: float
    prefill_busy_share: float
    executor_busy_share: float
    placements: dict[str, int]


class Simulation:
    """One run; `run` returns its result."""

    def __init__(self, setup: Setup, arrivals: Sequence[Arrival]) -> None:
        self.prefills = [Prefill(setup.model, setup.prefill_blocks, setup.block_size) for _ in range(setup.prefill)]
        self.decodes = [Decode(setup, self.prefills, self._pull) for _ in range(setup.decode)]
        self._now = 0.0
        if setup.elastic != "off":
            for engine in self.prefills:
                engine.elastic = Elastic(setup, lambda: self._now, lambda: [decode.slack for decode in self.decodes])
        # On one device: the decode engine of a number shares it with the prefill engine of the same number.
        pairs = min(setup.prefill, setup.decode) if setup.pool != "remote" else 0
        self._devices = [Device(lambda: self._now) for _ in range(pairs)]
        objectives = Objectives(setup.ttft_slo, setup.tpot_slo)
        self.tuners = [ShareTuner.of_two_engines(objectives, setup.model.prefill, device) for device in self._devices]
        self.done: list[Row] = []
        self._pull_seconds = setup.model.pull
        self._order = itertools.count()
        self._events: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        for number, arrival in enumerate(arrivals):
            # Engines of a kind are used in turn, as the proxy does.
            prefill = number % setup.prefill if setup.prefill else 0
            row = Row(arrival.at, arrival.prompt, arrival.output, prefill, number % setup.decode)
            self._at(arrival.at, self._arrive, row)

    def run(self) -> Result:
        """Let everything happen."""
        if self._devices:
            self._at(0.0, self._divide)
        while self._events:
            self._now, _, happen, arguments = heapq.heappop(self._events)
            happen(self._now, *arguments)
        return self._result()

    def _at(self, when: float, happen: Callable[..., None], *arguments: Any) -> None:
        heapq.heappush(self._events, (when, next(self._order), happen, arguments))

    def _divide(self, now: float) -> None:
        """Let the tuners adjust the shares of the devices, now and as long as anything else happens."""
        for number, tuner in enumerate(self.tuners):
            tuner.update(decode.tpot for decode in self.decodes if decode.tpot)
            self._foresee(number)
        if self._events:
            self._at(now + UPDATE_S, self._divide)

    def _arrive(self, now: float, row: Row) -> None:
        if not self.prefills:
            self.decodes[row.decode].arrive(row)
            self._step(now, self.decodes[row.decode])
            return
        self.prefills[row.prefill].queue.append(row)
        self._compute(now, self.prefills[row.prefill])

    def _compute(self, now: float, engine: Prefill) -> None:
        begins = engine.begin(now)
        moved, engine.handed_over = engine.handed_over, []
        for row in moved:
            self.decodes[row.decode].arrive(row)
            self._step(now, self.decodes[row.decode])
        if not begins:
            return
        number = self.prefills.index(engine)
        if number < len(self._devices):
            self._devices[number].start(Phase.PREFILL, engine.done_at - now, now)
            self._foresee(number)
        else:
            self._at(engine.done_at, self._computed, engine)

    def _foresee(self, number: int) -> None:
        """Have the next end of work on a shared device happen, unless something else happens there before."""
        device = self._devices[number]
        if (end := device.next_end()) is not None:
            self._at(end, self._ended, number, device.version)

    def _ended(self, now: float, number: int, version: int) -> None:
        """Work on a shared device is done."""
        device = self._devices[number]
        if version != device.version:
            return
        done = device.finish(now)
        self._foresee(number)
        if Phase.DECODE in done:
            self._stepped(now, self.decodes[number])
        if Phase.PREFILL in done:
            self.prefills[number].done_at = now
            self._computed(now, self.prefills[number])

    def _computed(self, now: float, engine: Prefill) -> None:
        if now < engine.done_at - 1e-12:  # attention took time from it meanwhile
            self._at(engine.done_at, self._computed, engine)
            return
        done = engine.end(now)
        self.done += engine.finished
        engine.finished = []
        number = self.prefills.index(engine)
        for row in done:
            if number < len(self.tuners):
                self.tuners[number].observe_ttft(now - row.arrived)
            self.decodes[row.decode].arrive(row)
            self._step(now, self.decodes[row.decode])
        self._compute(now, engine)

    def _pull(self, now: float, row: Row, remote_blocks: int) -> None:
        self._at(now + self._pull_seconds * row.tokens, self._pulled, row, remote_blocks)

    def _pulled(self, now: float, row: Row, remote_blocks: int) -> None:
        self.prefills[row.prefill].release(remote_blocks)
        self._compute(now, self.prefills[row.prefill])
        self.decodes[row.decode].pulled(row)
        self._step(now, self.decodes[row.decode])

    def _step(self, now: float, decode: Decode) -> None:
        if decode.stepping or not (seconds := decode.begin_step(now)):
            return
        number = self.decodes.index(decode)
        if number < len(self._devices) and decode.computes:
            self._devices[number].start(Phase.DECODE, seconds, now)
            self._foresee(number)
        else:
            self._at(now + seconds, self._stepped, decode)

    def _stepped(self, now: float, decode: Decode) -> None:
        self.done += decode.end_step(now)
        for engine in self.prefills:
            self._compute(now, engine)
        self._step(now, decode)

    def _result(self) -> Result:
        rows, decodes = self.done, self.decodes
        begin, end = min(row.arrived for row in rows), max(row.last_at for row in rows)
        lasted = max(end - begin, 1e-9)
        ttft = [1000 * (row.first_at - row.arrived) for row in rows]
        tpot = [1000 * (row.last_at - row.first_at) / (row.output - 1) for row in rows if row.output > 1]
        placements: Counter[tuple[str, str]] = sum((decode.admission.counts for decode in decodes), Counter())
        steps = max(sum(decode.steps for decode in decodes), 1)
        return Result(
            requests=len(rows),
            seconds=lasted,
            throughput_tok_s=sum(row.output for row in rows) / lasted,
            ttft_p50_ms=percentile(ttft, 0.5),
            ttft_p90_ms=percentile(ttft, 0.9),
            ttft_p99_ms=percentile(ttft, 0.99),
            tpot_p50_ms=percentile(tpot, 0.5),
            tpot_p90_ms=percentile(tpot, 0.9),
            tpot_p99_ms=percentile(tpot, 0.99),
            steps=sum(decode.steps for decode in decodes),
            mean_rows=sum(decode.row_steps for decode in decodes) / steps,
            offloaded=sum(count for (placement, _), count in placements.items() if placement == "offloaded"),
            mapped=sum(count for (placement, _), count in placements.items() if placement == "mapped"),
            preemptions=sum(decode.preemptions for decode in decodes),
            moved=sum(decode.moved for decode in decodes),
            handed_over=sum(row.is_handed_over for row in rows),
            stays=sum(row.stays for row in rows),
            exposed_share=sum(decode.exposed for decode in decodes) / lasted / len(decodes),
            prefill_busy_share=sum(engine.busy for engine in self.prefills) / lasted / max(len(self.prefills), 1),
            executor_busy_share=sum(engine.attended for engine in self.prefills) / lasted / max(len(self.prefills), 1),
            placements={f"{placement}/{reason}": count for (placement, reason), count in placements.items()},
        )
