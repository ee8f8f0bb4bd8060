"""Records of what versions of vLLM have of what the plugin leans on, in this folder's `recorded/`.

So a version can be checked without its source. `adrenaline check-seams --record` makes them. A line stands for a path;
what is not there, or is not vLLM's, is recorded as well, so that a path that nobody looked up can be told from it.
"""

from __future__ import annotations

from pathlib import Path

import msgspec

from vllm_adrenaline.seams.check import Facts
from vllm_adrenaline.seams.things import Fact, Missing

FOLDER = Path(__file__).parent / "recorded"
GONE, UNKNOWN, OUTSIDE = "gone", "not followed", "not vLLM's"
"""Kinds of what is no fact."""


def path_of(version: str) -> Path:
    """Return the file of a minor version, such as "0.32"."""
    return FOLDER / f"{version}.jsonl"


def load(version: str) -> dict[str, Fact | Missing | None]:
    """Return the record of a minor version, by path; empty if there is none."""
    path = path_of(version)
    lines = path.read_bytes().splitlines() if path.exists() else []
    facts = [msgspec.json.decode(line, type=Fact) for line in lines]
    return {fact.path: _read(fact) for fact in facts}


def _read(fact: Fact) -> Fact | Missing | None:
    if fact.kind in (GONE, UNKNOWN):
        return Missing(fact.kind == GONE, fact.home)
    return None if fact.kind == OUTSIDE else fact


def store(version: str, facts: Facts) -> Path:
    """Write the record of a minor version, and return its file."""
    path = path_of(version)
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b"".join(msgspec.json.encode(_written(*each)) + b"\n" for each in sorted(facts.items())))
    return path


def _written(path: str, fact: Fact | Missing | None) -> Fact:
    if isinstance(fact, Missing):
        return Fact(path, GONE if fact.gone else UNKNOWN, fact.why)
    return Fact(path, OUTSIDE, "") if fact is None else fact
