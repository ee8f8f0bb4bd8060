"""Anonymous memory files (memfds) that engines share.

They have no name, so that nothing is left behind. Their size is fixed for ever: whoever could shrink a file could end
every process that has it mapped (SIGBUS). What is in a frozen file is fixed for ever, too.
"""

import fcntl
import os

from vllm_adrenaline.errors import AdrenalineError

_SIZE = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW
SEALS = _SIZE | fcntl.F_SEAL_SEAL


def create(name: str, size: int, seals: int = SEALS) -> int:
    """Return the descriptor of a new memory file of `size` bytes, all zero. The caller closes it."""
    fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, size)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
    except BaseException:
        os.close(fd)
        raise
    return fd


def create_unfrozen(name: str, size: int) -> int:
    """Return the descriptor of a new memory file that is to be filled, and then frozen. The caller closes it."""
    return create(name, size, _SIZE)


def freeze(fd: int) -> None:
    """Let nobody write into the file any more, this process included. Private mappings of it may be written.

    Raises OSError while it is mapped to be written.
    """
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SEAL)


def check(fd: int, size: int, what: str, frozen: bool = False) -> None:
    """Raise AdrenalineError unless a peer's file has `size` bytes and can never have fewer, or, if frozen, others.

    The message calls the file `what`.
    """
    try:
        seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
    except OSError:  # no memory file
        seals = 0
    if not seals & fcntl.F_SEAL_SHRINK:
        raise AdrenalineError(f"{what} is no memory file of fixed size (F_SEAL_SHRINK)")
    if frozen and not seals & fcntl.F_SEAL_WRITE:
        raise AdrenalineError(f"{what} can still be written (no F_SEAL_WRITE)")
    if (found := os.fstat(fd).st_size) != size:
        raise AdrenalineError(f"{what} has {found} bytes and should have {size}")
