"""Where files are kept: the user's cache, and private folders that last as long as one run."""

from __future__ import annotations

import os
import stat
import tempfile
from pathlib import Path

from vllm_adrenaline.errors import AdrenalineError

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


def private_folder(folder: Path) -> None:
    """Make `folder`, and those above it that are missing, for this user alone; one that is there must be as safe.

    Raises:
        AdrenalineError: it cannot be made, or others could put files there: it is a link, another user's, or others
            may write into it. The message says what to do.
    """
    try:
        for missing in reversed([each for each in (folder, *folder.parents) if not each.exists()]):
            missing.mkdir(mode=0o700, exist_ok=True)
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
