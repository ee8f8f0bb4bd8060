"""Comparing what is needed with what a version of vLLM has. Pure."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass

from vllm_adrenaline.seams.needs import Need, Override, by_path
from vllm_adrenaline.seams.signature import Signature
from vllm_adrenaline.seams.things import Fact, Missing

Facts = Mapping[str, Fact | Missing | None]
"""What a version has, by path; None where a path leads out of vLLM."""
READ = {"attribute", "property"}
"""Kinds that are read in the same way."""


@dataclass(frozen=True)
class Finding:
    """Something that breaks us, or that moved.

    Attributes:
        path: of what, as in Fact.
        what: in words.
        users: who uses it.
    """

    path: str
    what: str
    users: tuple[str, ...]


def nowhere(path: str) -> list[str]:
    """Say that no other module defines what a path begins with: of a record nothing is known."""
    return []


def check(
    needs: Iterable[Need],
    found: Facts,
    baseline: Mapping[str, Fact],
    made_by_us: Collection[str] = (),
    elsewhere: Callable[[str], list[str]] = nowhere,
) -> list[Finding]:
    """Return what of `needs` a version cannot give.

    Args:
        needs: what the plugin needs.
        found: what the version has.
        baseline: what the version has that the plugin runs with. A member of a subclass of ours that is not in it is
            our own, and takes the place of nothing in vLLM.
        made_by_us: classes of which vLLM never makes our subclass.
        elsewhere: returns the modules that define what a path begins with, except its own.
    """
    uses = by_path(needs)
    findings: dict[tuple[str, str], set[str]] = defaultdict(set)
    gone: set[str] = set()
    for path in sorted(uses, key=len):
        if any(leads_to(other, path) for other in gone):
            continue  # it is told once
        if path not in found:
            what = "was not looked up: record this version again, with adrenaline check-seams --record"
            findings[path, what] = {need.user for need in uses[path]}
            continue
        there, known = found[path], baseline.get(path)
        is_own = known is None and any(need.override for need in uses[path])
        if isinstance(there, Missing) and there.gone and not is_own:
            gone.add(path)
            others = elsewhere(path)
            hint = f"; {' and '.join(others[:3])} define that name" if others else ""
            findings[path, f"is gone: {there.why}{hint}"] = {need.user for need in uses[path]}
            continue
        for need in uses[path]:
            for what in _problems(need, there, known, is_own, made_by_us):
                findings[path, what].add(need.user)
    return [Finding(path, what, tuple(sorted(who))) for (path, what), who in sorted(findings.items())]


def leads_to(path: str, longer: str) -> bool:
    """Whether one can only get to `longer` by way of `path`."""
    return longer.startswith(path) and re.match(r"\W", longer[len(path) :]) is not None


def _problems(
    need: Need, there: Fact | Missing | None, known: Fact | None, is_own: bool, made_by_us: Collection[str]
) -> Iterator[str]:
    if isinstance(there, Missing):
        if not there.gone:
            yield f"cannot be followed ({there.why}): say of which class it is in seams/declared.py"
        return  # a name of our own, as it should be
    if there is None:
        if known is not None:
            yield f"is not vLLM's any more; it was {known.home}"
        return
    if is_own:
        if need.override is not None:
            yield f"is there now ({there.kind}), and ours of the same name would take its place"
        return
    if known is not None and known.kind != there.kind and not {known.kind, there.kind} <= READ:
        yield f"was a {known.kind}, and is a {there.kind}"
        return
    if known is not None and known.shape.startswith("async ") != there.shape.startswith("async "):
        yield "became a coroutine, or was one"
    signature = signature_in(there)
    if need.call is not None and signature is not None:
        yield from signature.lacks(need.call)
    if need.override is not None and need.path.removesuffix("().__init__") not in made_by_us:
        yield from _does_not_replace(need.override, there, signature)


def _does_not_replace(ours: Override, there: Fact, signature: Signature | None) -> Iterator[str]:
    if ours.kind != there.kind and not {ours.kind, there.kind} <= READ:
        yield f"is a {there.kind}, and ours a {ours.kind}"
    elif ours.signature is not None and signature is not None:
        yield from ours.signature.does_not_replace(signature)


def signature_in(fact: Fact) -> Signature | None:
    """Return the signature of what can be called; None where there is none to read."""
    text = fact.shape.removeprefix("async ")
    return Signature(text) if text.startswith("(") and fact.kind != "attribute" else None
