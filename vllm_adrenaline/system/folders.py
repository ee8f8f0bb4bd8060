"""Where files are kept: the user's cache, and private folders that last as long as one run."""

from __future__ import annotations

import fcntl
import os
import shutil
import stat
import tempfile
from contextlib import suppress
from pathlib import Path

LONGEST_PARENT = 80
"""Characters of a path below which Unix sockets can be. The kernel's limit for a socket's whole path is 107 bytes."""
PREFIX = "adrenaline-"
OWNER = "owner"
"""The file in a runtime folder that is locked as long as the process that made the folder lives."""

_locks: list[int] = []


def cache_folder(*parts: str) -> Path:
    """Return the folder of this plugin, or one below it, in the user's cache: $XDG_CACHE_HOME, or ~/.cache.

    The folder is not made.
    """
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache").joinpath("vllm-adrenaline", *parts)


def make_private(folder: Path) -> Path:
    """Make a folder and those that it is in, where they are missing, for this user only, under any umask."""
    if not folder.is_dir():
        make_private(folder.parent)
        folder.mkdir(mode=0o700, exist_ok=True)
    return folder


def runtime_folder() -> Path:
    """Make a new private folder, whose path is short enough for Unix sockets in it; the caller removes it.

    Those of this user whose makers were killed before they could do that are removed now.
    """
    folder = tempfile.gettempdir()
    parent = Path(folder if len(folder) < LONGEST_PARENT else "/tmp")
    for path in parent.glob(f"{PREFIX}*"):
        if _is_abandoned(path):
            shutil.rmtree(path, ignore_errors=True)
    made = Path(tempfile.mkdtemp(prefix=PREFIX, dir=parent))
    lock = os.open(made / f"{OWNER}.new", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    fcntl.flock(lock, fcntl.LOCK_EX)
    os.rename(made / f"{OWNER}.new", made / OWNER)  # now it can be found, and is locked already
    _locks.append(lock)
    return made


def _is_abandoned(folder: Path) -> bool:
    """Say whether a runtime folder of this user was made by a process that is gone."""
    with suppress(OSError):
        found = folder.lstat()
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
            return False
        lock = os.open(folder / OWNER, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        finally:
            os.close(lock)
    return False
