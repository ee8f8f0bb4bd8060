"""Rows whose token is thrown away leave their random generators as they were."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from vllm_adrenaline.compat.sampling import without_generators


def runner(unfinished: list[bool], generators: dict[int, str]) -> Any:
    mask = SimpleNamespace(np=np.array([*unfinished, True]))  # rows beyond the batch mean nothing
    return SimpleNamespace(
        discard_request_mask=mask, input_batch=SimpleNamespace(num_reqs=len(unfinished), generators=generators)
    )


def test_rows_of_unfinished_prompts_and_failed_rows_are_sampled_without() -> None:
    generators = {0: "a", 1: "b", 2: "c", 3: "beyond"}
    with without_generators(runner([True, False, False], generators), failed=[2, 2, 7]):
        assert generators == {1: "b", 3: "beyond"}
    assert generators == {0: "a", 1: "b", 2: "c", 3: "beyond"}


def test_they_come_back_when_sampling_fails() -> None:
    generators = {0: "a"}
    with pytest.raises(ZeroDivisionError), without_generators(runner([True], generators)):
        raise ZeroDivisionError
    assert generators == {0: "a"}
