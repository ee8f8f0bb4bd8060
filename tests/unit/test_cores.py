"""Lists of cores as a user writes them, and the executor's priority."""

import os
import subprocess
import sys

import pytest

from vllm_adrenaline import cores
from vllm_adrenaline.errors import AdrenalineError


@pytest.mark.parametrize(
    ("text", "ranks"),
    [
        ("", []),
        ("3", [[3]]),
        ("2-4", [[2, 3, 4]]),
        ("4,0-1", [[0, 1, 4]]),
        ("0|1", [[0], [1]]),
        ("0-1|2, 3", [[0, 1], [2, 3]]),
    ],
)
def test_lists_of_cores(text: str, ranks: list[list[int]]) -> None:
    assert cores.parse(text) == ranks


@pytest.mark.parametrize("text", ["x", "1-", "1..2", "|", "0|", "-1", "3-2", "5000"])
def test_what_is_no_list_of_cores_is_refused(text: str) -> None:
    with pytest.raises(AdrenalineError):
        cores.parse(text)


def test_cores_must_be_there_and_be_as_many_lists_as_ranks() -> None:
    cores.check("", 2)
    cores.check("0", 1)
    with pytest.raises(AdrenalineError, match="this machine has no core 4000"):
        cores.check("4000", 1)
    with pytest.raises(AdrenalineError, match=r"1 rank\(s\); there are 2"):
        cores.check("0", 2)


def priority(*launcher: str) -> tuple[str, int, int]:
    """Ask for promptness in a process of its own; return what it says, its scheduling class and its niceness."""
    code = (
        "import os; from vllm_adrenaline.cores import run_promptly as p; "
        "print(p(), os.sched_getscheduler(0), os.getpriority(os.PRIO_PROCESS, 0), sep=',')"
    )
    command = [*launcher, sys.executable, "-c", code]
    said, kind, nice = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip().split(",")
    return said, int(kind), int(nice)


def test_the_executor_says_which_priority_it_got() -> None:
    said, kind, nice = priority()
    got = {"real-time priority": kind == os.SCHED_FIFO, "niceness -10": nice == -10}
    assert got.get(said, (kind, nice) == (os.SCHED_OTHER, 0))


@pytest.mark.skipif(os.geteuid() != 0, reason="gives up rights that only root has")
def test_without_rights_the_priority_stays_ordinary() -> None:
    drop = ("setpriv", "--bounding-set", "-sys_nice", "--inh-caps", "-sys_nice", "--")
    assert priority(*drop) == ("ordinary priority", os.SCHED_OTHER, 0)
