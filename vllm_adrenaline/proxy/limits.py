"""What clients and engines may take of the proxy. Each limit is described once, here, and is an option of the commands.

Standard library only: `--help` reads it.
"""

from __future__ import annotations

import argparse
import os
from dataclasses import dataclass, field, fields
from typing import Any

from vllm_adrenaline.errors import AdrenalineError

API_KEY_ENV = "ADRENALINE_API_KEY"
BODIES = 8
"""The bodies of all requests together may have so many times the bytes that one may have."""


def _limit(default: float, text: str) -> Any:
    return field(default=default, metadata={"text": text})


@dataclass(frozen=True)
class Limits:
    """The limits of a proxy. Names that end in `_bytes` are sizes, in `_seconds` times; the others are counts."""

    max_header_bytes: int = _limit(32 * 2**10, "bytes of a request's line and headers")
    max_body_bytes: int = _limit(8 * 2**20, f"bytes of a request's body; all bodies together have {BODIES} times that")
    max_requests: int = _limit(512, "requests under way; a further one is answered with 429")
    max_connections: int = _limit(1024, "connections; a further one takes the place of one that is silent")
    head_seconds: float = _limit(10, "time in which a client has to send a request's headers")
    body_seconds: float = _limit(30, "time in which it has to send the body")
    # Longer than clients and load balancers keep theirs (aiohttp 15 s, nginx 60, AWS 60): whoever closes first must be
    # the one that sends next, else a request can meet the end of its connection.
    idle_seconds: float = _limit(75, "time after an answer until a connection that stays silent is closed")
    reading_seconds: float = _limit(60, "time after which a client that takes nothing of its answer is given up")
    first_byte_seconds: float = _limit(
        600, "time after which an engine that sent nothing of its answer is given up: the whole time of a request "
        "that is not streamed"
    )  # fmt: skip
    drain_seconds: float = _limit(15, "time that requests under way have to end when the proxy is to stop")
    token_seconds: float = _limit(120, "time after which an engine is given up that has begun its answer and is silent")

    def __post_init__(self) -> None:
        """Raise AdrenalineError for a limit that lets nothing through."""
        for each in fields(self):
            if not getattr(self, each.name) > 0:
                raise AdrenalineError(f"{_flag(each.name)} must be more than 0")

    def arguments(self) -> list[str]:
        """Return the options that say the same on a command line."""
        return [f"{_flag(each.name)}={getattr(self, each.name)}" for each in fields(self)]


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add an option for every limit, and the API key."""
    group = parser.add_argument_group("what clients and engines may take of the proxy")
    for each in fields(Limits):
        kind = float if each.name.endswith("_seconds") else int
        text = f"{each.metadata['text']} (default: %(default)s)"
        group.add_argument(_flag(each.name), type=kind, default=each.default, metavar="N", help=text)
    group.add_argument(
        "--api-key",
        metavar="KEY",
        help=f"clients must send it, as `Authorization: Bearer KEY`. ${API_KEY_ENV} is better: others on this machine "
        "can read command lines",
    )


def from_options(options: argparse.Namespace) -> Limits:
    """Return the limits that were asked for. Raises AdrenalineError for one that lets nothing through."""
    return Limits(**{each.name: getattr(options, each.name) for each in fields(Limits)})


def api_key(option: str | None) -> str | None:
    """Return the key that clients must send, from the option or the environment; None asks for none.

    Raises AdrenalineError for a key that is empty or that no header can carry.
    """
    key = os.environ.get(API_KEY_ENV) if option is None else option
    if key is not None and not (key.isascii() and key.isprintable() and key.strip() == key != ""):
        raise AdrenalineError(f"--api-key or ${API_KEY_ENV} is no key: it must be printable ASCII, and not be empty")
    return key
