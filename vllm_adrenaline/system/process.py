"""What the kernel says of another process."""

from pathlib import Path


def is_stopped(pid: int) -> bool:
    """Whether a process was stopped, by SIGSTOP or by a debugger. False if it is not there."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] in ("T", "t")
