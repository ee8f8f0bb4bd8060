"""What an engine's work takes is measured while other engines start beside it."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from vllm_adrenaline.engine.profiling import shortest_seconds


@pytest.fixture
def one_core() -> Iterator[int]:
    before = os.sched_getaffinity(0)
    core = min(before)
    os.sched_setaffinity(0, {core})
    yield core
    os.sched_setaffinity(0, before)


def compute() -> None:
    for _ in range(400_000):
        pass


def test_work_counts_without_the_time_in_which_others_had_the_core(one_core: int) -> None:
    (alone,) = shortest_seconds(compute)
    spin = f"import os; os.sched_setaffinity(0, {{{one_core}}})\nprint(flush=True)\nwhile True: pass"
    others = [subprocess.Popen([sys.executable, "-c", spin], stdout=subprocess.PIPE) for _ in range(3)]
    try:
        for other in others:
            assert other.stdout is not None
            other.stdout.readline()
        (passed,) = shortest_seconds(compute, is_own_work=False)
        (own,) = shortest_seconds(compute)
    finally:
        for other in others:
            other.kill()
            other.communicate()
    assert passed > 1.5 * alone, "nobody was in the way: the test says nothing"
    assert own < 1.5 * alone


def test_what_waits_for_others_counts_as_it_passes() -> None:
    (passed,) = shortest_seconds(lambda: time.sleep(0.02), is_own_work=False)
    assert passed >= 0.02
