"""What a soak takes for growth."""

from __future__ import annotations

import random

from tests.soak.trends import trend


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
