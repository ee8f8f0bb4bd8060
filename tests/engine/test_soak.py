"""A minute of the soak: every answer right or to be asked for again, and every block back."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.soak.__main__ import soak


@pytest.mark.extended
def test_a_minute_of_mixed_traffic_and_faults(tmp_path: Path) -> None:
    assert soak(minutes=1, seed=1, out=tmp_path)
