"""Child processes that do not outlive the thread that started them. Standard library only."""

import ctypes
import os
import signal
import sys
from collections.abc import Sequence

# Runs first in the child, then becomes the command: SIGTERM for it (PR_SET_PDEATHSIG) when its starter ends.
# A preexec_fn would do the same, but can deadlock when the parent has other threads.
_DIE_WITH_PARENT = """\
import ctypes, os, signal, sys
ctypes.CDLL(None).prctl(1, signal.SIGTERM)
if os.getppid() != int(sys.argv[1]):
    sys.exit(1)
os.execvp(sys.argv[2], sys.argv[2:])
"""


def dying_with_parent(command: Sequence[str]) -> list[str]:
    """Return a command line that runs `command`, and ends it by SIGTERM when the calling thread ends."""
    return [sys.executable, "-I", "-S", "-c", _DIE_WITH_PARENT, str(os.getpid()), *command]


def end_with_parent(starter: int) -> None:
    """Have this process ended by SIGTERM when the thread that started it ends, which is one of process `starter`."""
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)
    if os.getppid() == 1 != starter:  # it has ended already; in a container the starter itself may be process 1
        os.kill(os.getpid(), signal.SIGTERM)
