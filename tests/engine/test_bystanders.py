"""Two decode engines on one prefill engine: what happens to one is not noticed by the other."""

from __future__ import annotations

import os
import signal
from concurrent.futures import ThreadPoolExecutor

from tests.engine.conftest import Fleet, Plain, eventually, executors_of, tokens, workload


def test_a_decode_engine_that_is_killed_costs_the_other_nothing(standard: Fleet, plain: Plain) -> None:
    work = workload(4, seed=61, prompts=[100, 300], outputs=[300])
    wanted = plain.tokens(work)
    killed, other, prefill = standard["small"], standard["decode"], standard["prefill"]
    executors = executors_of(prefill.pid)
    lost, count = killed.counting(), other.counting()

    def all_are_offloaded() -> bool:
        running = killed.metrics()["vllm:num_requests_running"]
        return running == len(work) and lost["offloaded_requests"] == len(work) and lost["remote_attention_rows"] > 0

    def serves_alone() -> bool:
        assert tokens(standard.door("decode", 1).complete(work)) == wanted
        return prefill.settle() == 0

    with ThreadPoolExecutor() as pool:
        answers = pool.submit(standard.door("small", 1).complete, work)
        assert eventually(all_are_offloaded)
        os.killpg(killed.pid, signal.SIGKILL)
        assert eventually(serves_alone), "what the killed one had is free"
        assert serves_alone()
        assert answers.exception() is not None
    assert count["executor_failures"] == 0
    assert count["fallback_requests"] == 0
    assert count["remote_attention_rows"] > 0
    assert executors_of(prefill.pid) == executors
