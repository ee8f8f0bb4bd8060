"""Lists of processor cores, as options and environment variables write them."""

import os
import re
from collections.abc import Collection

from vllm_adrenaline.errors import AdrenalineError

MAX_CORES = 4096


def parse(text: str) -> list[list[int]]:
    """Return the cores of each rank in "0-3,8|4-7"; [] for an empty text. Raises AdrenalineError."""
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
    """Return cores as `parse` reads them, the shortest way: 0-3,8."""
    runs: list[list[int]] = []
    for core in sorted(cores):
        if runs and core == runs[-1][-1] + 1:
            runs[-1][1:] = [core]
        else:
            runs.append([core])
    return ",".join("-".join(map(str, run)) for run in runs)


def check(text: str, ranks: int) -> None:
    """Raise AdrenalineError unless `text` is empty, or has cores of this machine for so many ranks."""
    wanted = parse(text)
    if wanted and len(wanted) != ranks:
        raise AdrenalineError(f"--adrenaline-executor-cores {text} is for {len(wanted)} rank(s); there are {ranks}")
    for core in (core for cores in wanted for core in cores):
        if not os.path.exists(f"/sys/devices/system/cpu/cpu{core}"):
            raise AdrenalineError(f"--adrenaline-executor-cores {text}: this machine has no core {core}")
