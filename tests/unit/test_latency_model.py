"""The models of what a share of the device makes of latencies, and what they are asked."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_adrenaline.colocation.model import LAMBDAS, Model, Point
from vllm_adrenaline.colocation.model import smallest_prefill_share as smallest


@given(st.floats(0.01, 1), st.floats(0, 0.5), st.sampled_from(LAMBDAS[:5]))
def test_the_models_find_their_parameters_again(a: float, b: float, lam: float) -> None:
    model = Model(LAMBDAS)
    for share in (0.3, 0.5, 0.7, 0.9):
        model.add(Point(share, a / (share - lam) + b))
    assert model.at(0.4) == pytest.approx(a / (0.4 - lam) + b, rel=0.02)


@pytest.mark.parametrize(("a", "b", "lam"), [(0.6809, 0.022, 0.1), (0.6284, 0.3818, 0.0)])
def test_the_models_fit_noisy_latencies_as_well_as_in_the_paper(a: float, b: float, lam: float) -> None:
    """The paper's two examples of a fit, with 2 % of noise: R^2 is above 0.99."""
    rng = random.Random(7)
    shares = [0.25 + 0.05 * number for number in range(15)]
    true = [a / (share - lam) + b for share in shares]
    model = Model(LAMBDAS if lam else (0.0,))
    for share, seconds in rng.sample(list(zip(shares, true, strict=True)), len(shares)):
        model.add(Point(share, seconds * rng.gauss(1, 0.02)))
    mean = sum(true) / len(true)
    error = sum((model.at(share) - seconds) ** 2 for share, seconds in zip(shares, true, strict=True))
    assert 1 - error / sum((seconds - mean) ** 2 for seconds in true) > 0.99


def test_the_models_forget_a_load_that_is_over() -> None:
    model = Model()
    for _ in range(Model.KEPT):
        model.add(Point(0.5, 2.0))
    for share in (0.5, 0.55, 0.6, 0.65, 0.7, 0.75):
        model.add(Point(share, 0.5 / share))
    assert model.at(0.5) < 1.5


def test_the_smallest_share_that_meets_the_objective() -> None:
    latency = {1.0: 0.2, 0.5: 0.4, 0.25: 0.8}
    assert smallest(latency, 0.4) == pytest.approx(0.5)
    assert smallest(latency, 0.6) == pytest.approx(1 / 3)
    assert smallest(latency, 2.0) == 0.25
    assert smallest(latency, 0.1) == 1.0
