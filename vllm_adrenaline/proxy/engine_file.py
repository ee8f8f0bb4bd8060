"""A file with the engines behind a proxy, which is watched: engines come and go without a restart of the proxy.

TOML, or JSON if its name ends in .json:

    [[prefill]]
    url = "http://10.0.0.1:8001"

    [[decode]]
    url = "unix:/run/decode.http"
    name = "big"                     # optional: what /engines calls it
"""

from __future__ import annotations

import asyncio
import logging
import os
import re
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec

from vllm_adrenaline.errors import AdrenalineError

WATCH_S = 1.0
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")

logger = logging.getLogger(__name__)


class Entry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One engine: http://host:port, https, or unix: and the path of a socket."""

    url: str
    name: str | None = None


class EngineLists(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The engines of a proxy by kind."""

    decode: list[Entry]
    prefill: list[Entry] = []

    def __post_init__(self) -> None:
        """Raise ValueError for engines that cannot be used."""
        if not self.decode:
            raise ValueError("no decode engine")
        for entry in (*self.prefill, *self.decode):
            if not is_address(entry.url):
                raise ValueError(f"{entry.url!r} is no URL; write http://HOST:PORT, or unix:/PATH")
        names = Counter(name for kind in ("prefill", "decode") for name, _ in self.of(kind))
        for name, count in names.items():
            if count > 1 or not NAME.fullmatch(name):
                raise ValueError(f"{name!r} is the name of {count} engines" if count > 1 else f"{name!r} is no name")
        for kind in ("prefill", "decode"):
            if len({address for _, address in self.of(kind)}) < len(self.of(kind)):
                raise ValueError(f"a {kind} engine is named twice")

    def of(self, kind: str) -> list[tuple[str, str]]:
        """Return the names and addresses of the engines of a kind."""
        entries: list[Entry] = getattr(self, kind)
        return [(each.name or f"{kind}-{number}", each.url.rstrip("/")) for number, each in enumerate(entries)]


def of_addresses(prefill: Sequence[str], decode: Sequence[str]) -> EngineLists:
    """Return the engines at these addresses. Raises AdrenalineError for such that cannot be used."""
    try:
        return EngineLists(decode=[Entry(each) for each in decode], prefill=[Entry(each) for each in prefill])
    except ValueError as error:
        raise AdrenalineError(f"--prefill, --decode: {error}") from None


def is_address(text: str) -> bool:
    """Say whether a text is the address of an engine."""
    return bool(re.match(r"(https?://[^/\s]|unix:/\S)", text))


def load(path: Path) -> EngineLists:
    """Return what the file says. Raises AdrenalineError if it cannot be read or used."""
    decode = msgspec.json.decode if path.suffix == ".json" else msgspec.toml.decode
    try:
        return decode(path.read_bytes(), type=EngineLists)
    except OSError as error:
        raise AdrenalineError(f"--engines {path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:  # msgspec's errors are ValueErrors
        raise AdrenalineError(f"--engines {path}: {error}") from None


async def watch(path: Path, known: EngineLists, change: Callable[[EngineLists], None]) -> None:
    """Call `change` whenever the file says something new. While it cannot be used, all stays as it is, and is logged.

    It is read again when its size, time or inode changes: also where it is a link that is turned to another file.
    """
    last: tuple[int, ...] | None = None
    while True:
        try:
            found = os.stat(path)
            now: tuple[int, ...] = (found.st_ino, found.st_size, found.st_mtime_ns)
        except OSError:
            now = ()
        if now != last:
            last = now
            try:
                new = load(path)
                if new != known:
                    change(new)
                    known = new
                    logger.warning("the engines are now %d prefill, %d decode", len(new.prefill), len(new.decode))
            except AdrenalineError as error:
                logger.error("%s; the engines stay as they were", error)
            except Exception:
                logger.exception("the engines stay as they were")
        await asyncio.sleep(WATCH_S)
