"""What is not the same in two versions of vLLM, of what the plugin leans on. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from vllm_adrenaline.seams.check import Facts, Finding, leads_to, signature_in
from vllm_adrenaline.seams.needs import Need, by_path
from vllm_adrenaline.seams.signature import differences
from vllm_adrenaline.seams.things import Fact, Missing

READ_IT = "does something else: read it"


def moved(needs: Iterable[Need], old: Facts, new: Facts) -> list[Finding]:
    """Return what moved between two versions. What is reached on several paths is told once."""
    uses = by_path(needs)
    findings: dict[tuple[str, str], tuple[str, set[str]]] = {}
    gone: set[str] = set()
    for path in sorted(uses, key=lambda each: (len(each), each)):
        was, now = old.get(path), new.get(path)
        if any(leads_to(other, path) for other in gone):
            continue
        if isinstance(was, Fact) and not isinstance(now, Fact):
            gone.add(path)
        home = next((each.home for each in (now, was) if isinstance(each, Fact)), path)
        for what in _differences(was, now, uses[path]):
            findings.setdefault((home, what), (path, set()))[1].update(need.user for need in uses[path])
    told = (Finding(path, what, tuple(sorted(who))) for (_, what), (path, who) in findings.items())
    return sorted(told, key=lambda each: (each.path, each.what))


def _differences(was: Fact | Missing | None, now: Fact | Missing | None, uses: list[Need]) -> Iterator[str]:
    if not isinstance(was, Fact):
        if isinstance(now, Fact):
            yield "is new"
        return
    if not isinstance(now, Fact):
        yield "is gone" if isinstance(now, Missing) and now.gone else "cannot be followed any more"
        return
    if was.home != now.home:
        yield f"moved from {was.home} to {now.home}"
    if was.kind != now.kind:
        yield f"was a {was.kind}, and is a {now.kind}"
    if was.shape != now.shape and (now.kind != "class" or any(need.call for need in uses)):
        before, after = signature_in(was), signature_in(now)
        if now.kind == "methods":
            yield from _methods(set(was.shape.split()), set(now.shape.split()))
        elif before is not None and after is not None:
            yield from differences(before, after)
        else:
            yield f"was declared as {was.shape or 'nothing'}, and is as {now.shape or 'nothing'}"
    if was.body != now.body and any(_is_within(need) for need in uses):
        yield READ_IT


def _methods(was: set[str], now: set[str]) -> Iterator[str]:
    """Yield what methods a class got or lost that we have subclasses of: the new ones may have to be ours, too."""
    for names, words in ((now - was, "got the methods"), (was - now, "lost the methods")):
        if names:
            yield f"{words} {', '.join(sorted(names))}"


def _is_within(need: Need) -> bool:
    """Whether it matters what a function does inside: ours takes its place or extends it, or it is private."""
    return need.override is not None or re.search(r"[.:]_[a-z]\w*$", need.path) is not None
