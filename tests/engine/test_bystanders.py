"""Two decode engines on one prefill engine: what happens to one is not noticed by the other."""

from __future__ import annotations

import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.engine.conftest import Fleet, Plain, eventually, executors_of, offloads_again, tokens, workload


@pytest.mark.extended
def test_an_executor_that_is_late_for_two_decode_engines_serves_both_again(standard: Fleet, plain: Plain) -> None:
    work = workload(4, seed=62, prompts=[100, 300], outputs=[300])
    wanted = plain.tokens(work)
    executors = executors_of(standard["prefill"].pid)
    assert all(offloads_again(standard, name) for name in ("decode", "small"))  # earlier tests have killed some
    counts = {name: standard[name].counting() for name in ("decode", "small")}
    with ThreadPoolExecutor() as pool:
        answers = [pool.submit(standard.door(name, 1).complete, work) for name in counts]
        assert eventually(lambda: all(each["remote_attention_rows"] > 0 for each in counts.values()), poll_s=0.01)
        os.kill(executors[0], signal.SIGSTOP)
        time.sleep(1)
        os.kill(executors[0], signal.SIGCONT)
        assert [tokens(each.result()) for each in answers] == [wanted, wanted]
    assert all(each["executor_failures"] == 1 for each in counts.values()), "it was late for both"
    assert all(offloads_again(standard, name) for name in counts)
    assert executors_of(standard["prefill"].pid) == executors, "nobody has had it killed"


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
