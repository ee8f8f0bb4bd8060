"""What the kernel says of another process."""

import contextlib
from pathlib import Path


def is_stopped(pid: int) -> bool:
    """Whether a process was stopped, by SIGSTOP or by a debugger. False if it is not there."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] in ("T", "t")


def works(pid: int) -> bool:
    """Whether any thread of a process runs, wants to run, or waits for a disk or for memory; False if it is not there.

    One that was stopped, or whose threads all sleep, does not work. One that gets no CPU does (csrc/shm/process.h).
    """
    for stat in Path(f"/proc/{pid}/task").glob("*/stat"):
        with contextlib.suppress(OSError):
            if stat.read_text().rpartition(")")[2].split()[0] in ("R", "D"):
                return True
    return False
