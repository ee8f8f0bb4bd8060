"""Faults at moments that are hard to hit: between a prompt and its answer, and between a start and the first step."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from pathlib import Path

import aiohttp
import pytest

from tests.engine.conftest import Fleet, Plain, eventually, executors_of, offloads_again, run, tokens, workload

SOON_S = 5.0
"""Within so long blocks are free, on cores that other work may have, too (docs/faults.md says what it takes alone)."""


async def leave_after(url: str, bodies: list[dict[str, object]], seconds: float) -> int:
    """Send requests and leave after some time; return how many had not ended by then."""
    async with aiohttp.ClientSession() as session:
        asked = [asyncio.create_task(session.post(f"{url}/v1/completions", json=body)) for body in bodies]
        _, left = await asyncio.wait(asked, timeout=seconds)
        for each in left:
            each.cancel()
        await asyncio.gather(*left, return_exceptions=True)
        return len(left)


@pytest.mark.extended
def test_clients_that_leave_at_any_moment_leave_no_block_behind(standard: Fleet) -> None:
    """Before and while the prompt is computed, between prefill and decode, during the claim, and while it decodes."""
    work = workload(4, seed=81, prompts=[600, 40], outputs=[400])
    count, door = standard["decode"].counting(), standard.door("decode", 0.5)
    assert offloads_again(standard, "decode")
    door = standard.door("decode", 0.5)
    placed, longest = [], 0.0
    for delay in (0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.08, 0.15, 0.3, 0.6):
        before = count["offloaded_requests"] + count["local_requests"]
        left = run(leave_after(door.url, [door.body(each) for each in work], delay))
        gone = time.monotonic()
        assert left == len(work), "they must leave before their answers"
        assert eventually(lambda: standard["prefill"].settle() == 0 == standard["decode"].settle(), poll_s=0.02)
        longest = max(longest, time.monotonic() - gone)
        placed.append(count["offloaded_requests"] + count["local_requests"] - before)
    print(f"placed before their clients left: {placed} of {len(work)}; blocks free after at most {longest:.2f} s")
    assert min(placed) < len(work) == max(placed), "some left before they were placed, and some afterwards"
    assert longest < SOON_S


def has_channel(executor: int) -> bool:
    """Whether a decode engine is attached to an executor."""
    return "memfd:adrenaline-channel" in Path(f"/proc/{executor}/maps").read_text()


@pytest.mark.extended
def test_an_executor_that_is_killed_as_it_starts_or_before_its_first_step_costs_nothing(
    standard: Fleet, plain: Plain
) -> None:
    work = workload(4, seed=82, prompts=[100, 300], outputs=[60])
    wanted = plain.tokens(work)
    prefill, killed = standard["prefill"].pid, list[int]()

    def there_is_another() -> bool:
        return any(each not in killed for each in executors_of(prefill))

    def attached() -> bool:
        return there_is_another() and any(has_channel(each) for each in executors_of(prefill) if each not in killed)

    for moment in (there_is_another, there_is_another, attached):  # serving; starting; attached, with no step yet
        assert eventually(moment, seconds=120, poll_s=0.005)
        (executor,) = (each for each in executors_of(prefill) if each not in killed)
        os.kill(executor, signal.SIGKILL)
        killed.append(executor)
        assert tokens(standard.door("decode", 1).complete(work)) == wanted
    assert len(set(killed)) == 3
    assert offloads_again(standard, "decode")
    assert tokens(standard.door("decode", 1).complete(work)) == wanted
