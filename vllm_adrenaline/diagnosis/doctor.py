"""`adrenaline doctor`: each thing that is wrong, in one line, with what to do."""

from __future__ import annotations

import argparse
from collections.abc import Iterable

from vllm_adrenaline.diagnosis import checks
from vllm_adrenaline.diagnosis.checks import Finding

DESCRIPTION = """\
Check the installation and this machine for what `adrenaline up` and engines need, and the engines at URL if one is
given. Each thing that is wrong is one line that says what to do. A note is about what serves, but worse than it could.
"""
EPILOG = "The exit status is 1 if anything is wrong, and 0 if there are notes at most."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.epilog = EPILOG
    parser.add_argument("engines", nargs="*", metavar="URL", help="engines that run, or a proxy in front of them")
    parser.add_argument("--host", default="127.0.0.1", help="address the proxy is to listen on (default: %(default)s)")
    parser.add_argument(
        "--port", type=int, default=8000, help="port that must be free, unless a URL is given (default: %(default)s)"
    )


def findings(options: argparse.Namespace) -> Iterable[Finding]:
    """Yield what all checks find."""
    yield from checks.installation()
    yield from checks.this_machine()
    if not options.engines:
        yield from checks.room_for_more(options.host, options.port)
    for url in options.engines:
        yield from checks.cluster(url)


def run(options: argparse.Namespace) -> int:
    """Print what is wrong; return 1 if anything is."""
    found = list(findings(options))
    width = max((len(each.about) for each in found), default=0)
    for each in sorted(found, key=lambda each: not each.wrong):
        print(f"{'wrong' if each.wrong else 'note ':5}  {each.about:{width}}  {each.text}")
    wrong = sum(each.wrong for each in found)
    print(f"{wrong} wrong, {len(found) - wrong} note(s)" if found else "nothing is wrong")
    return 1 if wrong else 0
