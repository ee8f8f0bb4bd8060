"""Anonymous memory files (memfds) that engines share.

They have no name, so that nothing is left behind. Their size is fixed for ever: whoever could shrink a file could end
every process that has it mapped (SIGBUS).
"""

import fcntl
import os

from vllm_adrenaline.errors import AdrenalineError

SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


def create(name: str, size: int) -> int:
    """Return the descriptor of a new memory file of `size` bytes, all zero. The caller closes it."""
    fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, size)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, SEALS)
    except BaseException:
        os.close(fd)
        raise
    return fd


def check(fd: int, size: int, what: str) -> None:
    """Raise AdrenalineError unless a peer's file has `size` bytes and can never have fewer.

    The message calls the file `what`.
    """
    try:
        seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
    except OSError:  # no memory file
        seals = 0
    if not seals & fcntl.F_SEAL_SHRINK:
        raise AdrenalineError(f"{what} is no memory file of fixed size (F_SEAL_SHRINK)")
    if (found := os.fstat(fd).st_size) != size:
        raise AdrenalineError(f"{what} has {found} bytes and should have {size}")
