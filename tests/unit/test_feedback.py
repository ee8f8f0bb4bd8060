"""Costs follow what steps really take, in bounded steps, and stay still when nothing has changed."""

import random

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_adrenaline.placement.costs import Costs
from vllm_adrenaline.placement.feedback import DEADBAND, LARGEST, WINDOW, Feedback, Step
from vllm_adrenaline.placement.output_length import OutputLengths

COSTS = Costs(step=[(1, 0.010), (64, 0.050)], local=2e-6, remote=[2e-6, 3e-6])


def step(true: Costs, noise: float = 1.0) -> Step:
    remote = [true.remote_seconds(e, 4, 2_000) * noise for e in range(2)]
    local = true.local * 4_000 * noise
    exposed = max(0.0, max(remote) - local)
    return Step(12, 4_000, [2_000, 2_000], true.other(12) * noise + local + exposed, local, remote, exposed)


def after(believed: Costs, true: Costs, windows: int, noise: float = 0.0) -> Feedback:
    rng, feedback = random.Random(1), Feedback(believed)
    for _ in range(windows * WINDOW):
        feedback.observe(step(true, 1 + noise * rng.uniform(-1, 1)))
    return feedback


@given(st.floats(0.2, 5), st.floats(0.2, 5), st.floats(0.2, 5))
def test_a_wrong_profile_heals(local: float, remote: float, other: float) -> None:
    wrong = Costs([(1, 0.010 * other), (64, 0.050 * other)], 2e-6 * local, [2e-6 * remote, 3e-6])
    healed = after(wrong, COSTS, windows=10).costs
    assert healed.local == pytest.approx(COSTS.local, rel=0.06)
    assert healed.remote == pytest.approx(COSTS.remote, rel=0.06)
    assert healed.other(12) == pytest.approx(COSTS.other(12), rel=0.06)


def test_one_window_moves_little() -> None:
    assert after(COSTS, Costs(COSTS.step, 2e-5, COSTS.remote), windows=1).costs.local == pytest.approx(2e-6 * LARGEST)


def test_noise_moves_nothing() -> None:
    assert after(COSTS, COSTS, windows=50, noise=0.1).corrections == 0


def test_an_executor_without_rows_keeps_its_costs() -> None:
    feedback = Feedback(COSTS)
    for _ in range(3 * WINDOW):
        feedback.observe(Step(4, 4_000, [2_000, 0], 0.03, 0.016, [0.008, 0.0], 0.0))
    assert feedback.costs.remote[0] > COSTS.remote[0]
    assert feedback.costs.remote[1] == COSTS.remote[1]


def test_steps_that_compute_prompts_say_nothing_of_decoding() -> None:
    feedback = Feedback(COSTS)
    for _ in range(WINDOW):
        feedback.observe(Step(4, 4_000, [0, 0], 0.0, 0.0, [0.0, 0.0], 0.0))
    assert feedback.corrections == 0


FAR = Costs(step=[(1, 0.010), (64, 0.050)], local=2e-6, remote=[2e-6, 3e-6], link=[0.003, 0.0])


def far_step(link: float) -> Step:
    """Return a step with rows of the far executor alone."""
    local, remote = 2e-6 * 4_000, 2e-6 * 2_000
    exposed = max(0.0, remote + link - local)
    return Step(12, 4_000, [2_000, 0], FAR.other(12) + local + exposed, local, [remote, 0.0], exposed)


def test_a_link_that_becomes_slower_is_noticed_and_one_that_is_fast_again_as_well() -> None:
    feedback = Feedback(FAR)
    for _ in range(10 * WINDOW):
        feedback.observe(far_step(link=0.003))
    assert feedback.costs.link == FAR.link, "it hides, as it did"
    for _ in range(10 * WINDOW):
        feedback.observe(far_step(link=0.020))
    assert feedback.costs.link == [pytest.approx(0.020, rel=0.06), 0.0]
    for _ in range(10 * WINDOW):
        feedback.observe(far_step(link=0.001))
    assert feedback.costs.link[0] <= 0.004 * (1 + DEADBAND), "what hides it is all that is known"


def test_one_step_that_had_to_wait_among_many_that_did_not_says_little_of_the_link() -> None:
    feedback = Feedback(FAR)
    for number in range(10 * WINDOW):
        feedback.observe(far_step(link=0.005 if number % WINDOW == 0 else 0.003))
    assert feedback.costs.link == FAR.link


def test_what_rows_take_on_the_way_is_no_part_of_the_link() -> None:
    far = msgspec.structs.replace(FAR, exchange=100e-6)
    feedback = Feedback(far)
    for _ in range(10 * WINDOW):
        whole = far.remote_seconds(0, 30, 2_000)
        here = 2e-6 * 500
        step = Step(40, 500, [2_000, 0], far.other(40) + whole, here, [0.004, 0.0], whole - here, [30, 0])
        feedback.observe(step)
    assert feedback.costs.link == far.link


def test_a_link_over_which_nothing_is_sent_any_more_is_tried_again_one_day() -> None:
    feedback = Feedback(FAR)
    for _ in range(10 * WINDOW):
        feedback.observe(far_step(link=0.020))
    believed = feedback.costs.link
    for _ in range(10 * WINDOW):
        feedback.observe(Step(12, 4_000, [2_000, 2_000], 0.05, 0.008, [0.004, 0.006], 0.016))
    assert feedback.costs.link == believed, "whose link was waited for is not known"
    windows = 0
    while feedback.costs.link[0] > FAR.link[0]:
        windows += 1
        for _ in range(WINDOW):
            feedback.observe(Step(12, 4_000, [0, 0], 0.03, 0.0, [0.0, 0.0], 0.0))
    assert 100 < windows < 300, "which takes minutes"
    assert feedback.costs.link == FAR.link


def test_growth_is_learned_from_answers_that_ended() -> None:
    lengths = OutputLengths()
    assert lengths.expected_growth(10, 8_000) == OutputLengths.PRIOR
    assert lengths.expected_growth(10, 50) == 40
    for tokens in [100] * 10 + [300] * 10:
        lengths.ended(tokens)
    assert lengths.expected_growth(0, 8_000) == 200
    assert lengths.expected_growth(150, 8_000) == 150, "what is longer than 100 ends at 300"
    assert lengths.expected_growth(500, 8_000) == OutputLengths.PRIOR, "nobody knows"


@given(st.lists(st.integers(0, 500)), st.integers(0, 600), st.integers(0, 600))
def test_nobody_is_expected_to_grow_beyond_its_limit(ended: list[int], generated: int, limit: int) -> None:
    lengths = OutputLengths()
    for tokens in ended:
        lengths.ended(tokens)
    assert 0 <= lengths.expected_growth(generated, limit) <= max(0, limit - generated)
