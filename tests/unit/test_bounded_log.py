"""Logs that cannot be flooded: few lines a minute of each cause, and a log file of bounded size."""

from __future__ import annotations

import errno
import logging
import os
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from vllm_adrenaline import plugin
from vllm_adrenaline.launch import process
from vllm_adrenaline.launch.process import EngineProcess
from vllm_adrenaline.system.bounded_log import LINES, SPAN_S, Bounded, bound


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def logger(clock: Clock, caplog: pytest.LogCaptureFixture) -> Iterator[logging.Logger]:
    made = logging.getLogger("adrenaline.test-bounded")
    flood = Bounded(clock)
    made.addFilter(flood)
    caplog.set_level(logging.INFO, made.name)
    yield made
    made.removeFilter(flood)


def flood(logger: logging.Logger, count: int) -> None:
    for number in range(count):
        logger.warning("a stranger with key %d", number)


def test_a_flood_of_one_cause_leaves_few_lines_and_hides_no_other_cause(
    logger: logging.Logger, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    flood(logger, 10_000)
    logger.error("something else")
    assert len(caplog.messages) == LINES + 1
    assert caplog.messages[-1] == "something else"
    clock.now = SPAN_S
    caplog.clear()
    flood(logger, 1)
    assert caplog.messages == [f"a stranger with key 0 ({10_000 - LINES} more lines from here were left out before)"]
    clock.now = 2 * SPAN_S
    caplog.clear()
    flood(logger, 1)
    assert caplog.messages == ["a stranger with key 0"], "none were left out since"


def test_our_logger_is_bounded_in_every_process_that_vllm_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plugin.engine_args, "wrap", lambda *_: None)  # the rest of what is done there
    ours = logging.getLogger("vllm.adrenaline")
    ours.filters.clear()
    plugin.register()
    bound(ours)
    assert sum(isinstance(each, Bounded) for each in ours.filters) == 1


WRITER = """
import sys, time
for number in range(100):
    print(f"line {number} " + 1000 * "x", flush=True)
    if number == 89:
        sys.stdin.close(); open(sys.argv[1], "w").close()
        while __import__("os").path.exists(sys.argv[1]): time.sleep(0.01)
time.sleep(100)
"""


def test_a_log_file_is_bounded_and_what_is_written_last_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process, "LOG_LIMIT", 50_000)
    log, mark = tmp_path / "d.log", tmp_path / "mark"
    engine = EngineProcess("d", [sys.executable, "-c", WRITER, str(mark)], dict(os.environ), log)
    try:
        deadline = time.monotonic() + 20
        while not mark.exists():
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert log.stat().st_size > 50_000
        engine.bound_log()
        assert log.stat().st_size == 0
        mark.unlink()
        while "line 99" not in log.read_text():
            assert time.monotonic() < deadline
            time.sleep(0.01)
        engine.bound_log()
        assert log.read_text().startswith("line 90 "), "it goes on at the beginning of the file, without a gap"
        assert (tmp_path / "d.log.1").read_text().startswith("line 0 ")
    finally:
        engine.terminate()
        engine.finish(time.monotonic() + 1)


def test_a_log_is_cut_when_the_disk_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def copyfile(_: object, to: Path) -> None:
        to.write_bytes(b"a part of it")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(process, "LOG_LIMIT", 10)
    monkeypatch.setattr(shutil, "copyfile", copyfile)
    log = tmp_path / "d.log"
    engine = EngineProcess("d", ["true"], dict(os.environ), log)
    engine.finish(time.monotonic() + 5)
    log.write_text("the disk is full of this")
    engine.bound_log()
    assert (log.stat().st_size, list(tmp_path.iterdir())) == (0, [log])
