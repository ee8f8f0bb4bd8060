"""The loader of the native library (csrc/, built by setup.py).

It refuses a library that is missing, or that was built from other sources than those of the checkout. Who uses the
library imports it from library.py.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

from vllm_adrenaline.errors import AdrenalineError
from vllm_adrenaline.native.build_hash import build_hash

BUILD = "pip install --no-build-isolation --editable ."
"""The command that builds the library."""


def load() -> ModuleType:
    """Return the library. Raises AdrenalineError with the command that mends it, if it is missing or stale."""
    sources = Path(__file__).parent.parent.parent / "csrc"
    try:
        library = importlib.import_module("vllm_adrenaline.native._native")
    except ImportError as error:
        fix = f"in {sources.parent}: {BUILD}" if sources.is_dir() else "pip install --force-reinstall vllm-adrenaline"
        raise AdrenalineError(f"the native library of vllm-adrenaline does not load ({error}); {fix}") from None
    if sources.is_dir() and build_hash(sources) != library.SOURCES:
        raise AdrenalineError(
            f"the native library of vllm-adrenaline was built from other sources; in {sources.parent}: {BUILD}"
        )
    return library
