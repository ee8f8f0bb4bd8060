"""What a soak takes for growth, and that it does not pass because nobody looked."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.engine.conftest import Work
from tests.soak import traffic
from tests.soak.__main__ import Soak, report
from tests.soak.traffic import Traffic
from tests.soak.trends import trend
from tests.unit.test_control import eventually


def noisy(slope: float, noise: float, count: int = 100) -> list[tuple[float, float]]:
    """Return samples of every two seconds; `slope` is by hour."""
    rng = random.Random(3)
    return [(2.0 * i, 50 + slope * 2 * i / 3600 + rng.gauss(0, noise)) for i in range(count)]


def test_a_line_is_found_in_samples_without_noise() -> None:
    found = trend("memory", "MiB", 5.0, noisy(72.0, 0.0))
    assert abs(found.slope - 72) < 1e-6
    assert found.error < 1e-6
    assert abs(found.last - found.first - 72 * 198 / 3600) < 1e-9
    assert found.verdict == "grows"


def test_growth_within_its_error_or_below_its_bound_is_none() -> None:
    assert trend("blocks", "%", 0.0, noisy(0.0, 5.0)).verdict == "flat"
    assert trend("memory", "MiB", 80.0, noisy(72.0, 0.0)).verdict == "flat"
    assert trend("memory", "MiB", 80.0, noisy(-500.0, 0.0)).verdict == "flat", "less is not growth"


def test_growth_that_noise_does_not_hide_is_seen() -> None:
    assert trend("memory", "MiB", 10.0, noisy(300.0, 1.0)).verdict == "grows"


def test_few_samples_say_nothing() -> None:
    assert trend("memory", "MiB", 0.0, noisy(1000.0, 0.0, count=5)).verdict == "few"
    assert trend("memory", "MiB", 0.0, []).verdict == "few"


def test_a_run_without_samples_or_with_a_watcher_that_ended_is_not_passed(tmp_path: Path) -> None:
    nobody: Any = None
    clients: Any = SimpleNamespace(outcomes=Counter(equal=5), wrong=[])
    for minutes, is_passed in ((60, False), (1, True)):
        soak = Soak(nobody, minutes, seed=0)
        soak.end = 60.0 * minutes
        soak.samples.add("memory", "decode", 1, soak.end, 5.0)
        assert report(soak, clients, tmp_path) == is_passed

    def sample() -> None:
        raise ValueError("what was read is no number")

    soak._until_done(sample)
    assert not report(soak, clients, tmp_path)


def test_an_answer_that_is_none_is_wrong_and_clients_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    async def ask(*_: object) -> list[int]:
        asked.append(1)
        raise KeyError("choices")

    for name in ("PAUSE_S", "RETRY_S"):
        monkeypatch.setattr(traffic, name, 0.001)
    for name in ("_whole", "_streamed"):
        monkeypatch.setattr(Traffic, name, ask)
    with Traffic("http://nobody", [(Work([1], 1), [5])], lambda seconds: None, seed=0) as clients:
        eventually(lambda: len(asked) > 3 * traffic.AT_ONCE)
    assert len(clients.wrong) >= len(asked)
