"""A data plane that delays, doubles, reorders and loses messages: tokens are equal, or the request falls back to equal
tokens. Never a wrong one."""

from __future__ import annotations

import time
from collections import Counter

from tests.engine.conftest import Fleet, Plain, offloads_again, tokens, workload

LOSE = 2


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
