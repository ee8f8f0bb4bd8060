"""What the parts of the CUDA library (tools/build_cuda.py) have in common for Python: loading it, and its errors."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from ctypes import c_char_p, c_int, c_size_t
from pathlib import Path
from typing import Any

Signatures = Mapping[str, tuple[Any, Sequence[Any]]]
"""Of functions, by name: the type of what they return, and those of their arguments."""


class CudaBinding:
    """A part of the library: some of its functions.

    Attributes:
        path: where the library is.
    """

    def __init__(self, path: Path, signatures: Signatures, sizes: Mapping[str, type[ctypes.Structure]]) -> None:
        """Load the library.

        Args:
            path: where it is.
            signatures: of the functions that are called.
            sizes: structures, by the function that says how many bytes the library has for one.

        Raises:
            OSError: it does not load.
            RuntimeError: it was built of other sources.
        """
        self.path = path
        self._lib = ctypes.CDLL(str(path))
        every = {**signatures, **{name: (c_size_t, []) for name in sizes}, "adrenaline_error": (c_char_p, [c_int])}
        for name, (result, arguments) in every.items():
            function = getattr(self._lib, name)
            function.restype, function.argtypes = result, arguments
        if any(getattr(self._lib, name)() != ctypes.sizeof(structure) for name, structure in sizes.items()):
            raise RuntimeError(f"{path} was built of other sources")

    def _check(self, error: int) -> None:
        if error:
            raise RuntimeError(f"CUDA: {self._lib.adrenaline_error(error).decode()}")
