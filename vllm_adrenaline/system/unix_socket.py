"""Unix sockets to which this user alone may connect."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import stat
from pathlib import Path

from vllm_adrenaline.errors import AdrenalineError
from vllm_adrenaline.system.folders import private_folder

BACKLOG = 128
"""Connections that wait to be accepted."""


def is_in_use(path: str, kind: socket.SocketKind = socket.SOCK_STREAM) -> bool:
    """Whether somebody listens at `path`."""
    with socket.socket(socket.AF_UNIX, kind) as probe:
        probe.setblocking(False)
        return probe.connect_ex(path) in (0, errno.EAGAIN)  # EAGAIN: so many wait there already


def listen(path: str, kind: socket.SocketKind = socket.SOCK_STREAM) -> socket.socket:
    """Return a socket that listens at `path`, whatever the umask is, and does not block.

    A path that begins with a zero byte is a name without a file, known in one network namespace (unix(7)). Every user
    may connect to it: who accepts has to look who does.

    Raises:
        AdrenalineError: the folder is not this user's alone, or something else has the path.
        OSError: it cannot be bound.
    """
    is_file = not path.startswith("\0")
    if is_file:
        private_folder(Path(path).parent)
        with contextlib.suppress(FileNotFoundError):
            if not stat.S_ISSOCK(os.lstat(path).st_mode):
                raise AdrenalineError(f"cannot listen at {path}: there is a file that is no socket")
            os.unlink(path)  # left by a process that was killed; the caller has found that nobody listens
    listener = socket.socket(socket.AF_UNIX, kind)
    try:
        if is_file:
            os.fchmod(listener.fileno(), 0o600)  # before it has a path, which gets these permissions
        listener.bind(path)
        listener.listen(BACKLOG)
        listener.setblocking(False)
    except BaseException:
        listener.close()
        raise
    return listener
