"""The compile check of csrc/cuda reads the compiler's report right, and knows what the kernels need."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from tests.unit.cuda_emulator import KERNELS, ROOT, Emulator, build_library, kept_programs
from vllm_adrenaline.native import cuda

TOOL = ROOT / "tools" / "build_cuda.py"
KERNEL = "ptxas info    : Compiling entry function '_ZN10adrenaline4cuda43_X"
REPORT = f"""
{KERNEL}13attend_kernelINS0_4Bf16ENS0_3Fp8ELi128EEEvNS0_4CallE' for 'sm_80'
    48 bytes stack frame, 52 bytes spill stores, 96 bytes spill loads
ptxas info    : Used 168 registers, used 1 barriers, 48 bytes cumulative stack size, 576 bytes cmem[0]
{KERNEL}13attend_kernelINS0_4HalfES3_Li64EEEvNS0_4CallE' for 'sm_80'
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 134 registers, used 1 barriers, 576 bytes cmem[0]
{KERNEL}11plan_kernelENS0_5BatchEPi' for 'sm_80'
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 31 registers, used 1 barriers, 392 bytes cmem[0], 8 bytes cmem[2]
"""


@pytest.fixture(scope="module")
def tool() -> Iterator[ModuleType]:
    spec = importlib.util.spec_from_file_location("build_cuda", TOOL)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules["build_cuda"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    del sys.modules["build_cuda"]


def test_the_compilers_report_is_understood(tool: ModuleType) -> None:
    spilling, clean = tool.report(REPORT)
    assert (spilling.message, spilling.cache, spilling.head_size) == ("Bf16", "Fp8", 128)
    assert (spilling.registers, spilling.spilled) == (168, 52)
    assert (clean.message, clean.cache, clean.head_size) == ("Half", "Half", 64)
    assert (clean.registers, clean.spilled) == (134, 0)
    assert spilling.spilled > spilling.spill_bound
    assert clean.spilled <= clean.spill_bound


def test_shared_memory_is_counted_as_the_kernels_lay_it_out(
    tool: ModuleType, pytestconfig: pytest.Config, tmp_path_factory: pytest.TempPathFactory
) -> None:
    emulator = Emulator(build_library(kept_programs(pytestconfig, tmp_path_factory), KERNELS, ["-O1"]))
    for message, cache, head in KERNELS:
        kernel = tool.Kernel(message, cache, head, 200, 0)
        for stages in cuda.STAGES:
            kind = cuda.Kind(message == "Half", cache == "Fp8", head)
            assert kernel.shared_bytes(stages) == emulator.shared_bytes(kind, stages)


def test_blocks_fit_before_stages_are_added(tool: ModuleType) -> None:
    assert tool.Kernel("Bf16", "Bf16", 128, 168, 0).fit("90a") == (2, 3)  # 70.5 KiB each
    kernel = tool.Kernel("Bf16", "Bf16", 128, 190, 0)
    assert kernel.fit("90a") == (3, 2)  # 104.5 KiB each
    assert kernel.fit("80") == (2, 2)
    assert kernel.fit("120") == (2, 1)
    assert tool.Kernel("Bf16", "Bf16", 128, 255, 0).fit("90a") == (3, 2)


def test_without_nvcc_the_check_says_so(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(TOOL), "check"], env={"PATH": str(tmp_path)}, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (0, "csrc/cuda is not compiled: there is no nvcc\n")


@pytest.mark.extended
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
def test_the_library_is_built_and_knows_the_structures_of_python(tmp_path: Path) -> None:
    out = tmp_path / "libadrenaline_cuda.so"
    done = subprocess.run(
        [sys.executable, str(TOOL), "library", str(out), "--arch", "90a"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    cuda.CudaLibrary(out)
