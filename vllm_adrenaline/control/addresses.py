"""Addresses of the control plane: which of them may be used, an operator's and those that a peer names.

An address is `ipc:///path` (the default, protected by the folder's permissions) or `tcp://host:port`. Who connects to
a TCP address may demand a key there, and writes it into the address: `tcp://KEY@host:port`. Both sides have to prove
their keys then, and everything is encrypted (CURVE; keys.py). Beyond loopback that is a must, unless the operator says
that it is not (--adrenaline-insecure).
"""

from __future__ import annotations

import contextlib
import os
import re
import socket
import tempfile
from urllib.parse import urlsplit

from vllm_adrenaline.control import keys as curve
from vllm_adrenaline.errors import AdrenalineError
from vllm_adrenaline.system import machine

LOOPBACK = {"127.0.0.1", "localhost", "::1"}
EVERY_INTERFACE = {"0.0.0.0", "::", "*"}
HOST_NAME = re.compile(r"[0-9A-Za-z_]([0-9A-Za-z_.-]{0,252}[0-9A-Za-z_])?")
"""A name or an IPv4 address. Nothing in it means anything to those who write it into an address."""


def default() -> str:
    """Return the address at which a prefill engine listens if none is given: the same for all engines of one user."""
    return f"ipc://{tempfile.gettempdir()}/vllm-adrenaline-{os.getuid()}/prefill"


def check(address: str, binds: bool = False, has_keys: bool = False, insecure: bool = False) -> str:
    """Return `address` if it can be used.

    Args:
        address: what an operator says, or a peer.
        binds: whether we are to listen there, or else to connect.
        has_keys: whether we have a key of our own, and if we listen an allow-list.
        insecure: whether other machines may be talked to without keys.

    Raises:
        AdrenalineError: it has no form that can be used, or other machines would be trusted without a key.
    """
    parts = urlsplit(address)
    if parts.scheme == "ipc" and parts.path.startswith("/") and len(parts.path) < 100:
        return address
    host, port = _host_of(address)
    if parts.scheme != "tcp" or host is None or port is None:
        raise AdrenalineError(
            f"address {address!r} is neither ipc:///absolute/path (under 100 characters) nor tcp://host:port"
        )
    key = parts.username
    if key is not None:
        if binds:
            raise AdrenalineError(f"address {address}: whoever listens there has no key in its address")
        curve.parse(key, f"what stands before the @ of the address of {host}")
        if not has_keys:
            raise AdrenalineError(f"whoever listens at {host}:{port} wants to know our key: give --adrenaline-key")
    if host in EVERY_INTERFACE:
        raise AdrenalineError(f"address {address} is of every interface: name the address of one")
    if host not in LOOPBACK and not insecure and (not has_keys if binds else key is None):
        wanted = (
            "--adrenaline-key and --adrenaline-allow"
            if binds
            else "--adrenaline-key, and its public key in the address, tcp://KEY@host:port"
        )
        raise AdrenalineError(
            f"address {address} is not loopback: give {wanted} (docs/security.md); or --adrenaline-insecure, and then "
            "everybody who reaches this network can read, write and end what is served"
        )
    return address


def _host_of(address: str) -> tuple[str | None, int | None]:
    """Return host and port of a TCP address; None for what is not there, or is none."""
    parts = urlsplit(address)
    try:
        return parts.hostname, parts.port
    except ValueError:
        return None, None


def sibling(address: str, suffix: str) -> str:
    """Return an address to bind beside `address`: the same folder, or any free port of the same host."""
    parts = urlsplit(address)
    return f"{address}.{suffix}" if parts.scheme == "ipc" else f"tcp://{parts.hostname}:*"


def for_descriptors(address: str) -> str:
    """Return where whoever listens at `address` passes descriptors (system/descriptors.py).

    Beside a socket that is a file it is one, too. A TCP address has a name without a file, known where its network is.
    """
    parts = urlsplit(address)
    if parts.scheme == "ipc":
        return f"{parts.path}.fd"
    host = parts.hostname or ""
    with contextlib.suppress(OSError):
        host = socket.gethostbyname(host)
    return f"\0vllm-adrenaline/{host}:{parts.port}"


def vicinity(address: str) -> str:
    """Return what is equal in two processes that can pass each other descriptors beside `address`, and in no others.

    A file is reached from every namespace of its host that shows it. A name is known in one network namespace.
    """
    return machine.boot() if urlsplit(address).scheme == "ipc" else machine.network()


def where_is(vicinity: str) -> str:
    """Return in words where processes are that are in another vicinity than we are."""
    is_here = vicinity.partition("/")[0] == machine.boot()
    return "in another network namespace of this host" if is_here else "on another host"


def how_to_share_memory(vicinity: str) -> str:
    """Return what lets processes of another vicinity share memory with ours, to be said after a refusal."""
    return "; or name an ipc:// address in a folder that both see" if where_is(vicinity) != "on another host" else ""


def lets_anybody_in(address: str) -> bool:
    """Whether anybody who reaches this address can talk to who listens there: it is TCP, and has no key."""
    parts = urlsplit(address)
    return parts.scheme == "tcp" and parts.username is None


def check_named(address: str, by: str, has_keys: bool) -> str:
    """Return `address` if the peer that we reach at `by` may name it: it wants the same key, and is no further away.

    Raises AdrenalineError if it may not. `has_keys`: whether we have a key of our own.
    """
    host, peer = _host_of(by)[0], urlsplit(by).username
    if urlsplit(address).username != peer:
        raise AdrenalineError(f"the prefill engine at {by} names {address}, which has not its key")
    return check(address, has_keys=has_keys, insecure=host is not None and host not in LOOPBACK)


def check_host(host: str, port: int, by: str, beyond_loopback: bool) -> None:
    """Raise AdrenalineError unless the peer that we reach at `by` may name this host and port to connect to.

    `beyond_loopback`: whether the operator named an interface to other hosts.
    """
    if not HOST_NAME.fullmatch(host) or host in EVERY_INTERFACE or not 0 < port < 1 << 16:
        raise AdrenalineError(f"the prefill engine at {by} names {host!r}, port {port}, which is no address of a host")
    if host not in LOOPBACK and not beyond_loopback:
        raise AdrenalineError(
            f"the prefill engine at {by} names the host {host} for its KV cache, and this engine has no "
            "--adrenaline-interface"
        )
