"""What happens when a part of the system misbehaves.

Tokens are equal, or the request falls back to equal tokens. Never a wrong one. Who has nothing to do with it goes on.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import aiohttp
import pytest

from tests.engine.conftest import (
    Client,
    Counting,
    Fleet,
    Plain,
    Work,
    engine_core_of,
    eventually,
    executors_of,
    offloads_again,
    run,
    tokens,
    workload,
)

LOSE = 2
TOKENS = 980
"""Of a request under load: it is still decoding when the fault comes."""
WAITED_S = 1.0
"""What one fault makes all steps wait for executors together, at most: by the decode engine's own clock."""
SOON_S = 5.0
"""Within so long a client notices a fault, and no token of others takes longer: on cores that other work may have, too.
Alone it takes a tenth of that (docs/faults.md)."""


def test_messages_late_twice_reordered_or_lost_change_no_token(standard: Fleet, plain: Plain) -> None:
    work = workload(24, seed=51, prompts=[1, 100, 128, 300, 500], outputs=[20, 100, 200])
    wanted = plain.tokens(work)
    count, faults = standard["decode"].counting(), standard.faults("decode")
    deadline = time.monotonic() + 120
    done: Counter[str] = Counter()
    with faults.losing(LOSE):
        while done["lost"] < LOSE and time.monotonic() < deadline:  # after a loss, until it is back, all is local
            assert tokens(standard.door("decode", 0.5).complete(work)) == wanted
            done = Counter(faults.done())
    assert done["lost"] == LOSE
    assert min(done[kind] for kind in ("late", "twice", "reordered", "stale")) > 5
    assert count["remote_attention_rows"] > 0
    assert count["executor_failures"] >= LOSE
    assert count["fallback_requests"] > 0
    assert offloads_again(standard, "decode")
    # No later test has a faulty data plane.
    done = Counter(faults.done())
    assert tokens(standard.door("decode", 0.5).complete(work)) == wanted
    assert faults.done() == done


@dataclass
class Stream:
    """What came of one request: its tokens, and when each piece of them came (seconds, monotonic)."""

    tokens: list[int] = field(default_factory=list)
    times: list[float] = field(default_factory=list)


async def stream_all(client: Client, work: list[Work], streams: list[Stream]) -> None:
    async def one(session: aiohttp.ClientSession, item: Work, into: Stream) -> None:
        async with session.post(f"{client.url}/v1/completions", json=client.body(item, stream=True)) as response:
            assert response.status == 200, await response.text()
            async for line in response.content:
                if line.startswith(b"data: {"):
                    piece = json.loads(line[6:])
                    assert "choices" in piece, piece
                    into.tokens += [t for choice in piece["choices"] for t in choice.get("token_ids") or ()]
                    into.times.append(time.monotonic())

    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        await asyncio.gather(*(one(session, item, into) for item, into in zip(work, streams, strict=True)))


@dataclass
class Load:
    """Offloaded and local requests that one decode engine decodes at once."""

    engines: Fleet
    count: Counting
    offloaded: list[Stream]
    local: list[Stream]
    struck_at: float = 0.0

    def strike(self) -> None:
        """Note that the fault comes now. All requests must be decoding."""
        assert all(5 < len(each.tokens) < TOKENS - 20 for each in self.offloaded + self.local), (
            "it must hit all of them"
        )
        self.struck_at = time.monotonic()

    def seconds_until(self, condition: Callable[[], bool]) -> float:
        """Return after how many seconds since the fault a condition held."""
        assert eventually(condition, seconds=60, poll_s=0.02)
        return time.monotonic() - self.struck_at

    def report(self, what: str, waited_s: float = WAITED_S) -> None:
        """Print what happened; check that steps waited less than `waited_s`, and local requests less than SOON_S."""
        gaps = [(now, now - then) for each in self.local for then, now in zip(each.times, each.times[1:], strict=False)]
        before = sorted(gap for now, gap in gaps if now < self.struck_at)
        p99, longest = before[int(0.99 * len(before))], max(gap for now, gap in gaps if now >= self.struck_at)
        waited = self.count["exposed_wait_seconds"]
        print(f"{what}; steps waited {waited:.2f} s", end="; ")
        print(f"gaps of local requests: p99 {p99:.3f} s before, longest after {longest:.3f} s")
        assert waited < waited_s
        assert longest < SOON_S


@contextlib.contextmanager
def load(engines: Fleet, plain: Plain) -> Iterator[Load]:
    """Serve offloaded and local requests; at the end of the context all of them end with the tokens of plain vLLM."""
    remote = workload(4, seed=71, prompts=[20, 40], outputs=[TOKENS])
    local = workload(4, seed=72, prompts=[20, 40], outputs=[TOKENS])
    wanted = plain.tokens(remote), plain.tokens(local)
    assert offloads_again(engines, "decode")
    made = Load(engines, engines["decode"].counting(), [Stream() for _ in remote], [Stream() for _ in local])
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(lambda: run(stream_all(engines.door("decode", 1), remote, made.offloaded)))
        assert eventually(lambda: all(each.tokens for each in made.offloaded), poll_s=0.005)
        second = pool.submit(lambda: run(stream_all(engines.door("decode", 0), local, made.local)))
        assert eventually(lambda: all(len(each.tokens) > 10 for each in made.local), poll_s=0.005)
        yield made
        first.result()
        second.result()
    assert made.count["offloaded_requests"] == len(remote)
    assert [each.tokens for each in made.offloaded] == wanted[0]
    assert [each.tokens for each in made.local] == wanted[1]


def test_an_executor_that_stands_still_costs_others_less_than_a_second_and_a_half(
    standard: Fleet, plain: Plain
) -> None:
    executor = executors_of(standard["prefill"].pid)[0]
    with load(standard, plain) as under:
        under.strike()
        os.kill(executor, signal.SIGSTOP)
        noticed = under.seconds_until(lambda: under.count["executor_failures"] > 0)
        ended = under.seconds_until(lambda: executor not in executors_of(standard["prefill"].pid))
    assert under.count["fallback_requests"] == len(under.offloaded)
    assert under.count["executor_failures"] == 1
    assert offloads_again(standard, "decode")
    back = time.monotonic() - under.struck_at
    under.report(f"noticed {noticed:.2f}, killed {ended:.2f}, offloads again {back:.1f} s")
    assert noticed < SOON_S
    assert under.count["executor_returns"] == 1


def test_an_executor_that_stood_still_for_a_second_is_not_killed_and_is_used_again(
    standard: Fleet, plain: Plain
) -> None:
    executors = executors_of(standard["prefill"].pid)
    with load(standard, plain) as under:
        under.strike()
        os.kill(executors[0], signal.SIGSTOP)
        time.sleep(1)
        os.kill(executors[0], signal.SIGCONT)
    assert offloads_again(standard, "decode")
    under.report(f"offloads again {time.monotonic() - under.struck_at:.1f} s")
    assert under.count["executor_returns"] == 1
    assert under.count["executor_failures"] == 1
    assert under.count["fallback_requests"] == len(under.offloaded)
    assert executors_of(standard["prefill"].pid) == executors


@pytest.mark.extended
def test_an_executor_that_is_killed_costs_others_nothing_to_speak_of(standard: Fleet, plain: Plain) -> None:
    executor = executors_of(standard["prefill"].pid)[0]
    with load(standard, plain) as under:
        under.strike()
        os.kill(executor, signal.SIGKILL)
        noticed = under.seconds_until(lambda: under.count["executor_failures"] > 0)
    assert under.count["fallback_requests"] == len(under.offloaded)
    assert offloads_again(standard, "decode")
    back = time.monotonic() - under.struck_at
    under.report(f"noticed {noticed:.2f}, offloads again {back:.1f} s")
    assert noticed < SOON_S


@contextlib.contextmanager
def pulses(pid: int, running_s: float, stopped_s: float) -> Iterator[None]:
    """Let a process run for a tenth of the time, say, in the context."""
    done = threading.Event()

    def beat() -> None:
        while not done.is_set():
            os.kill(pid, signal.SIGSTOP)
            time.sleep(stopped_s)
            os.kill(pid, signal.SIGCONT)
            time.sleep(running_s)

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


@pytest.mark.extended
@pytest.mark.parametrize("period_s", [0.05, 2.0], ids=["in short pieces", "in long pieces"])
def test_an_executor_ten_times_slower_is_not_killed(standard: Fleet, plain: Plain, period_s: float) -> None:
    executors = executors_of(standard["prefill"].pid)
    with load(standard, plain) as under:
        under.strike()
        with pulses(executors[0], period_s / 10, period_s * 9 / 10):
            assert eventually(lambda: all(len(each.tokens) == TOKENS for each in under.local), seconds=200)
    failures = under.count["executor_failures"]
    under.report(f"{failures:.0f} failures", waited_s=WAITED_S if failures else math.inf)
    assert (failures > 0) == (period_s > 1)
    assert executors_of(standard["prefill"].pid) == executors
    assert offloads_again(standard, "decode")


@pytest.mark.extended
def test_a_prefill_engine_that_stands_still_holds_up_nobody_who_does_not_need_it(standard: Fleet, plain: Plain) -> None:
    core = engine_core_of(standard["prefill"].pid)
    with load(standard, plain) as under:
        under.strike()
        os.kill(core, signal.SIGSTOP)
        time.sleep(5)
        done = [len(each.tokens) for each in under.local]
        rows = under.count["remote_attention_rows"]
        os.kill(core, signal.SIGCONT)
    under.report(f"tokens of local requests when it went on: {done}")
    assert rows > 0
    assert under.count["executor_failures"] == 0
    assert offloads_again(standard, "decode")


@pytest.mark.extended
def test_nobody_is_given_up_without_a_fault_on_cores_that_others_keep_busy(standard: Fleet, plain: Plain) -> None:
    """Runs for FAULT_FREE_MINUTES; two processes take what they get of both cores meanwhile."""
    minutes = float(os.environ.get("FAULT_FREE_MINUTES", "2"))
    work = workload(24, seed=73, prompts=[100, 300, 500], outputs=[20, 100, 200])
    wanted = plain.tokens(work)
    assert offloads_again(standard, "decode")
    count = standard["decode"].counting()
    spinning = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(2)]
    longest = 0.0
    try:
        until = time.monotonic() + 60 * minutes
        while time.monotonic() < until:
            began = time.monotonic()
            assert tokens(standard.door("decode", 0.5).complete(work)) == wanted
            longest = max(longest, time.monotonic() - began)
    finally:
        for each in spinning:
            each.kill()
            each.wait()
    print(f"{count['remote_attention_rows']:.0f} rows x layers attended, a batch took up to {longest:.1f} s")
    assert count["remote_attention_rows"] > 0
    assert count["executor_failures"] == 0
    assert count["fallback_requests"] == 0
