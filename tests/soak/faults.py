"""Faults that come at random, each with what shows that it happened."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable

from tests.engine.conftest import engine_core_of, executors_of


def pause(pid: int, seconds: float) -> None:
    """Stop a process for a while."""
    os.kill(pid, signal.SIGSTOP)
    try:
        time.sleep(seconds)
    finally:
        os.kill(pid, signal.SIGCONT)


def executor_is_killed(groups: dict[str, int]) -> None:
    os.kill(executors_of(groups["prefill"])[0], signal.SIGKILL)


def executor_is_late(groups: dict[str, int]) -> None:
    pause(executors_of(groups["prefill"])[0], 1.0)


def executor_is_stopped(groups: dict[str, int]) -> None:
    """For good: it is killed, and started again."""
    os.kill(executors_of(groups["prefill"])[0], signal.SIGSTOP)


def prefill_engine_hangs(groups: dict[str, int]) -> None:
    pause(engine_core_of(groups["prefill"]), 4.0)


def decode_engine_hangs(groups: dict[str, int]) -> None:
    pause(engine_core_of(groups["decode"]), 3.0)


def decode_engine_sleeps_over_its_lease(groups: dict[str, int]) -> None:
    pause(engine_core_of(groups["second"]), 15.0)


def prefill_engine_is_killed(groups: dict[str, int]) -> None:
    os.killpg(groups["prefill"], signal.SIGKILL)


def decode_engine_is_killed(groups: dict[str, int]) -> None:
    os.killpg(groups["second"], signal.SIGKILL)


Fault = Callable[[dict[str, int]], None]
SHORT: list[Fault] = [
    executor_is_killed,
    executor_is_late,
    executor_is_stopped,
    prefill_engine_hangs,
    decode_engine_hangs,
    decode_engine_sleeps_over_its_lease,
]
"""Faults after which the same engines go on."""
DEADLY: list[Fault] = [prefill_engine_is_killed, decode_engine_is_killed]
"""Faults after which an engine is started again."""
