"""What tests on a GPU need: a GPU that torch sees, and the library of csrc/cuda, built for it.

ADRENALINE_CUDA_LIBRARY names a library that is built already.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from vllm_adrenaline.native.cuda import CudaLibrary

TOOL = Path(__file__).parent.parent.parent / "tools" / "build_cuda.py"


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> CudaLibrary:
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU, and torch with CUDA")
    if built := os.environ.get("ADRENALINE_CUDA_LIBRARY"):
        return CudaLibrary(Path(built))
    if shutil.which("nvcc") is None:
        pytest.skip("needs nvcc")
    out = tmp_path_factory.mktemp("cuda") / "libadrenaline_cuda.so"
    subprocess.run([sys.executable, str(TOOL), "library", str(out)], check=True)
    return CudaLibrary(out)
