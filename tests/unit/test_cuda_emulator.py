"""The emulator of CUDA's primitives does what the PTX manual says, and finds faults that are planted in kernels."""

from __future__ import annotations

import subprocess

import pytest

from tests.unit.cuda_emulator import ASAN, build, kept_programs


@pytest.mark.parametrize(
    "options", [["-O1"], pytest.param(ASAN, marks=pytest.mark.extended)], ids=["plain", "sanitized"]
)
def test_the_emulator_computes_right_and_finds_planted_faults(
    options: list[str], pytestconfig: pytest.Config, tmp_path_factory: pytest.TempPathFactory
) -> None:
    program = build(kept_programs(pytestconfig, tmp_path_factory), "test_emulator.cpp", options)
    done = subprocess.run([str(program)], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, "ok\n"), done.stderr
