"""Where files are kept: the user's cache, and private folders that last as long as one run."""

from __future__ import annotations

import fcntl
import os
import shutil
import stat
import tempfile
from contextlib import suppress
from pathlib import Path

from vllm_adrenaline.errors import AdrenalineError

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


def private_folder(folder: Path) -> None:
    """Make `folder`, and those above it that are missing, for this user alone; one that is there must be as safe.

    Raises:
        AdrenalineError: it cannot be made, or others could put files there: it is a link, another user's, or others
            may write into it. The message says what to do.
    """
    try:
        make_private(folder)
        found = os.lstat(folder)
    except OSError as error:
        raise AdrenalineError(f"cannot make the folder {folder} for sockets: {error.strerror}") from None
    if not stat.S_ISDIR(found.st_mode):
        trouble = "is a link, or no folder"
    elif found.st_uid != os.geteuid():
        trouble = f"belongs to the user {found.st_uid}, and this engine runs as {os.geteuid()}"
    elif found.st_mode & 0o022:
        trouble = f"can be written by others (its mode is {stat.S_IMODE(found.st_mode):o})"
    else:
        return
    raise AdrenalineError(
        f"the folder {folder} of a control socket {trouble}: whoever can put a socket there reads what is served. Name "
        "a socket in a folder of this user alone (chmod 700), with --adrenaline-listen and --adrenaline-peers"
    )
