"""`adrenaline check-seams`: whether a version of vLLM has what the plugin leans on, and what moved between two."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from vllm_adrenaline.compat.versions import CHECKED, RUN, installed_vllm
from vllm_adrenaline.errors import AdrenalineError
from vllm_adrenaline.seams import declared, readers, records
from vllm_adrenaline.seams.check import Facts, Finding, check, nowhere
from vllm_adrenaline.seams.derive import derived
from vllm_adrenaline.seams.lookup import Lookup
from vllm_adrenaline.seams.moved import READ_IT, moved
from vllm_adrenaline.seams.needs import Need
from vllm_adrenaline.seams.source import Tree
from vllm_adrenaline.seams.things import Fact

DESCRIPTION = f"""\
Check that a vLLM has every class, method, signature and attribute that this plugin leans on. Its source is read and
not imported. Without VERSION the installed one is checked. Two VERSIONs show what moved between them, too.

A VERSION is a folder that has the folder vllm, a wheel, an sdist, or a number. {" and ".join(CHECKED)} are recorded
with the plugin. Of every other number pip is asked for the wheel, of which some 11 MB are read.
"""
EPILOG = """\
examples:
  adrenaline check-seams                      the installed vLLM
  adrenaline check-seams 0.34.0               a new one
  adrenaline check-seams 0.33 0.34.0          what is other than in 0.33, and what of that breaks the plugin
  adrenaline check-seams --record 0.34.0      keep what 0.34 has, in a checkout, so that tests can check it

The exit status is 1 if the last of the versions lacks anything.
"""
NUMBER = re.compile(r"(\d+\.\d+)(\.\d+\w*)?")
SHOWN_USERS = 4
"""How many users of something are shown."""


@dataclass(frozen=True)
class Subject:
    """A version that is checked.

    Attributes:
        name: as it is shown.
        facts: what it has of what is needed.
        elsewhere: says which modules define a name (check.check).
    """

    name: str
    facts: Facts
    elsewhere: Callable[[str], list[str]] = nowhere


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.epilog = EPILOG
    parser.add_argument("versions", nargs="*", metavar="VERSION", help="one to check, or two to compare")
    parser.add_argument("--record", action="store_true", help="keep what the VERSION has in this checkout")


@cache
def needs() -> frozenset[Need]:
    """Return all that the plugin needs of vLLM."""
    package = Path(__file__).parent.parent
    ours = Tree(readers.python_files(package.parent, package.name))
    return frozenset({*derived(ours), *declared.declared()})


def look_up(name: str, files: Mapping[str, str]) -> Subject:
    """Look up all that is needed in a source tree."""
    lookup = Lookup(Tree(files), declared.TYPES, declared.ATTACHED)
    return Subject(name, lookup.facts(need.path for need in needs()), lookup.elsewhere)


def subject(version: str | None, recorded: bool = True) -> Subject:
    """Return what a VERSION of the command line has; the installed vLLM for None.

    `recorded`: whether a record may stand for the source.
    """
    if version is None:
        return look_up(f"{installed_vllm() or 'from a checkout'}, as installed", readers.installed())
    if Path(version).exists():
        return look_up(version, readers.local(Path(version)))
    if not NUMBER.fullmatch(version):
        raise AdrenalineError(f"{version} is neither a file, nor a folder, nor a version such as {CHECKED[-1]}.0")
    if recorded and records.path_of(version).exists():
        return Subject(version, records.load(version))
    return look_up(version, readers.fetched(version))


def problems(checked: Subject) -> list[Finding]:
    """Return what a version lacks of what is needed."""
    later = {path: checked.facts[path] for path in declared.REPLACED_LATER if path in checked.facts}
    known = {**records.load(RUN), **later}
    baseline = {path: fact for path, fact in known.items() if isinstance(fact, Fact)}
    return check(needs(), checked.facts, baseline, declared.MADE_BY_US, checked.elsewhere)


def run(options: argparse.Namespace) -> int:
    """Run the command and return its exit status. Raises AdrenalineError for a version that cannot be read."""
    versions: Sequence[str] = options.versions
    if len(versions) > 2:
        raise AdrenalineError("at most two versions are compared")
    subjects = [subject(version, not options.record) for version in versions] or [subject(None)]
    if options.record:
        number = NUMBER.fullmatch(versions[-1] if versions else (installed_vllm() or "").split("+")[0])
        if number is None:
            raise AdrenalineError("only a version that has a number is recorded")
        print(f"kept in {records.store(number[1], subjects[-1].facts)}")
    if len(subjects) == 2:
        print(_moved(*subjects))
    found = problems(subjects[-1])
    print(_checked(subjects[-1], found))
    return 1 if found else 0


def _checked(checked: Subject, found: list[Finding]) -> str:
    count = sum(isinstance(fact, Fact) for fact in checked.facts.values())
    if not found:
        return f"vLLM {checked.name}: all {count} things that the plugin leans on are there, and fit"
    return "\n".join([f"vLLM {checked.name}: {len(found)} things do not fit", *map(_shown, found)])


def _moved(old: Subject, new: Subject) -> str:
    found = moved(needs(), old.facts, new.facts)
    inside = [each for each in found if each.what == READ_IT]
    lines = [f"from vLLM {old.name} to {new.name}, {len(found) - len(inside)} things moved that the plugin leans on"]
    lines += [_shown(each) for each in found if each.what != READ_IT]
    if inside:
        lines.append(f"{len(inside)} functions that it replaces or extends, or that are private, are written anew:")
        lines += [f"  {each.path}\n    used by {_users(each)}" for each in inside]
    return "\n".join([*lines, ""])


def _shown(finding: Finding) -> str:
    return f"  {finding.path}\n    {finding.what}\n    used by {_users(finding)}"


def _users(finding: Finding) -> str:
    more = len(finding.users) - SHOWN_USERS
    return ", ".join(finding.users[:SHOWN_USERS]) + (f" and {more} more" if more > 0 else "")
