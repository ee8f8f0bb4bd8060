"""Processor cores: those of this machine, and lists of them as a user writes them."""

from __future__ import annotations

import os
import re
from collections.abc import Collection
from pathlib import Path

from vllm_adrenaline.errors import AdrenalineError

MAX_CORES = 4096


def parse(text: str) -> list[list[int]]:
    """Return the cores of each rank in a text like "0-3,8|4-7"; an empty one has no rank. Raises AdrenalineError."""
    ranks = []
    for part in text.split("|") if text else []:
        cores: set[int] = set()
        for item in part.split(","):
            found = re.fullmatch(r"(\d+)(?:-(\d+))?", item.strip())
            if found is None:
                raise AdrenalineError(f"{text!r} is no list of cores: write it like 0-3,8 or, for two ranks, 0-3|4-7")
            cores |= set(range(int(found[1]), int(found[2] or found[1]) + 1))
        if not cores or max(cores) >= MAX_CORES:
            raise AdrenalineError(f"{part!r} in {text!r} names no core, or one beyond {MAX_CORES}")
        ranks.append(sorted(cores))
    return ranks


def ranges(cores: Collection[int]) -> str:
    """Return the cores of one rank as the shortest text that `parse` reads, e.g. "0-3,8"."""
    runs: list[list[int]] = []
    for core in sorted(cores):
        if runs and core == runs[-1][-1] + 1:
            runs[-1][1:] = [core]
        else:
            runs.append([core])
    return ",".join("-".join(map(str, run)) for run in runs)


def check(text: str, ranks: int) -> None:
    """Raise AdrenalineError unless `text` is empty or has cores of this machine for so many ranks."""
    wanted = parse(text)
    if wanted and len(wanted) != ranks:
        raise AdrenalineError(f"--adrenaline-executor-cores {text} is for {len(wanted)} rank(s); there are {ranks}")
    for core in (core for cores in wanted for core in cores):
        if not os.path.exists(f"/sys/devices/system/cpu/cpu{core}"):
            raise AdrenalineError(f"--adrenaline-executor-cores {text}: this machine has no core {core}")


def nodes(cores: Collection[int], root: Path = Path("/sys/devices/system/node")) -> set[str]:
    """Return the NUMA nodes of these cores; none where the system does not tell."""
    found = set()
    for each in root.glob("node[0-9]*/cpulist"):
        if (text := each.read_text().strip()) and not set(cores).isdisjoint(parse(text)[0]):
            found.add(each.parent.name)
    return found


def physical_cores() -> list[int]:
    """Return one processor number for each physical core that this process may use.

    If it may use only one physical core, all its hardware threads are returned.
    """
    allowed = sorted(os.sched_getaffinity(0))
    first: dict[str, int] = {}
    for cpu in allowed:
        siblings = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        try:
            first.setdefault(siblings.read_text().strip(), cpu)
        except OSError:
            first[str(cpu)] = cpu
    cores = list(first.values())
    return cores if len(cores) > 1 else allowed


def split_cores(cores: list[int]) -> tuple[str, str]:
    """Return one half of the cores for the decode engine and the other for the prefill engine, as "0,1" and "2,3".

    The decode engine has the larger half. A single core is in both.
    """
    half = (len(cores) + 1) // 2
    decode, prefill = cores[:half], cores[half:] or cores
    return ",".join(map(str, decode)), ",".join(map(str, prefill))
