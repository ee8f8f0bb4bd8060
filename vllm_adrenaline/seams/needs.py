"""What is needed of vLLM, and by whom."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

from vllm_adrenaline.seams.signature import Call, Signature


@dataclass(frozen=True)
class Override:
    """A definition of ours that stands in the place of vLLM's.

    Attributes:
        kind: as in Fact: method, staticmethod, classmethod, property or attribute.
        signature: without the object that a bound method has; None if it is no function.
    """

    kind: str
    signature: Signature | None


@dataclass(frozen=True)
class Need:
    """One use of something of vLLM's.

    Attributes:
        path: of what, as in Fact.
        user: the file and line of ours, or in words who uses it.
        call: how it is called, if it is.
        override: what replaces it, if anything does. A name that vLLM does not have is then a name of our own.
    """

    path: str
    user: str
    call: Call | None = None
    override: Override | None = None


def by_path(needs: Iterable[Need]) -> dict[str, list[Need]]:
    """Return what is needed, by path."""
    found: dict[str, list[Need]] = defaultdict(list)
    for need in needs:
        found[need.path].append(need)
    return found
