"""Where the library of csrc/cuda is, which tools/build_cuda.py makes."""

from __future__ import annotations

import os
from pathlib import Path

from vllm_adrenaline.errors import AdrenalineError
from vllm_adrenaline.native.cuda import CudaLibrary

PATH = "ADRENALINE_CUDA_LIBRARY"
"""Environment variable with the file of the library, where it is not beside this module."""
BESIDE = Path(__file__).parent / "libadrenaline_cuda.so"


def find() -> Path:
    """Return the file of the library, without loading it. Raises AdrenalineError if it is not there."""
    path = Path(os.environ.get(PATH, BESIDE))
    if not path.exists():
        raise AdrenalineError(f"there is no CUDA library at {path}: python tools/build_cuda.py library {path}")
    return path


def load() -> CudaLibrary:
    """Return the library. Raises AdrenalineError if it is not there, or does not fit."""
    path = find()
    try:
        return CudaLibrary(path)
    except (OSError, RuntimeError) as error:
        raise AdrenalineError(
            f"the CUDA library cannot be used: {error}; build it anew with tools/build_cuda.py"
        ) from None
