"""Where files are kept: the user's cache, and private folders that last as long as one run."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

LONGEST_PARENT = 80
"""Characters of a path below which Unix sockets can be. The kernel's limit for a socket's whole path is 107 bytes."""


def cache_folder(*parts: str) -> Path:
    """Return the folder of this plugin, or one below it, in the user's cache: $XDG_CACHE_HOME, or ~/.cache.

    The folder is not made.
    """
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache").joinpath("vllm-adrenaline", *parts)


def runtime_folder() -> Path:
    """Make a new private folder, whose path is short enough for Unix sockets in it; the caller removes it."""
    folder = tempfile.gettempdir()
    return Path(tempfile.mkdtemp(prefix="adrenaline-", dir=folder if len(folder) < LONGEST_PARENT else "/tmp"))
