"""The ZMQ sockets of the control plane: frames and queues are bounded, and each socket has one thread that owns it.

An address is `ipc:///path` (the default, protected by the folder's permissions) or `tcp://host:port`. Who connects to
a TCP address may demand a key there, and writes it into the address: `tcp://KEY@host:port`. Both sides have to prove
their keys then, and everything is encrypted (CURVE; keys.py). Beyond loopback that is a must, unless the operator says
that it is not (--adrenaline-insecure).
"""

from __future__ import annotations

import contextlib
import os
import socket as std_socket
import tempfile
from pathlib import Path
from urllib.parse import urlsplit

import msgspec
import zmq

from vllm_adrenaline.control import keys as curve
from vllm_adrenaline.control import messages
from vllm_adrenaline.control.keys import Keys
from vllm_adrenaline.errors import AdrenalineError

LOOPBACK = {"127.0.0.1", "localhost", "::1"}
EVERY_INTERFACE = {"0.0.0.0", "::", "*"}
HIGH_WATER_MARK = 10_000
"""Messages that wait in a socket at most, in each direction."""
KEEPALIVE = {zmq.TCP_KEEPALIVE: 1, zmq.TCP_KEEPALIVE_IDLE: 60, zmq.TCP_KEEPALIVE_INTVL: 10, zmq.TCP_KEEPALIVE_CNT: 6}
"""So that a TCP connection to a host that is gone does not stay for ever. A process that only sleeps keeps its own."""


def default_address() -> str:
    """Return the address at which a prefill engine listens if none is given: the same for all engines of one user."""
    return f"ipc://{tempfile.gettempdir()}/vllm-adrenaline-{os.getuid()}/prefill"


def check_address(address: str, binds: bool = False, has_keys: bool = False, insecure: bool = False) -> str:
    """Return `address` if it can be used.

    Args:
        address: what an operator, or a peer, says.
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


def check_free(address: str) -> None:
    """Raise AdrenalineError if something listens at `address`. ZMQ itself would silently take over an ipc path."""
    parts = urlsplit(address)
    if parts.scheme == "ipc":
        with std_socket.socket(std_socket.AF_UNIX) as probe:
            in_use = probe.connect_ex(parts.path) == 0
    else:
        with std_socket.socket() as probe:
            in_use = probe.connect_ex((parts.hostname or "", parts.port or 0)) == 0
    if in_use:
        raise AdrenalineError(
            f"{address} is in use, probably by another prefill engine: give this one --adrenaline-listen"
        )


def sibling(address: str, suffix: str) -> str:
    """Return an address to bind beside `address`: the same folder, or any free port of the same host."""
    parts = urlsplit(address)
    return f"{address}.{suffix}" if parts.scheme == "ipc" else f"tcp://{parts.hostname}:*"


def _bounded(kind: int) -> zmq.Socket[bytes]:
    socket: zmq.Socket[bytes] = zmq.Context.instance().socket(kind)
    socket.setsockopt(zmq.LINGER, 0)
    socket.setsockopt(zmq.MAXMSGSIZE, messages.MAX_FRAME)
    socket.setsockopt(zmq.SNDHWM, HIGH_WATER_MARK)
    socket.setsockopt(zmq.RCVHWM, HIGH_WATER_MARK)
    for option, value in KEEPALIVE.items():
        socket.setsockopt(option, value)
    return socket


_active: Keys | None = None


def use_keys(keys: Keys | None) -> None:
    """Have all TCP sockets that this process makes from now on use these keys; None: it has none.

    Scheduler, worker and executor are made by others, and each of them is a process of its own.
    """
    global _active
    _active = keys


def bind(address: str, keys: Keys | None = None) -> tuple[zmq.Socket[bytes], str]:
    """Return a bound ROUTER socket, and the address by which others connect to it.

    Args:
        address: where to listen.
        keys: those to use for a TCP address; None for those of this process.

    Raises:
        AdrenalineError: it cannot be bound.
    """
    parts, keys = urlsplit(address), keys or _active
    if not address.endswith(":*"):
        check_free(address)
    if parts.scheme == "ipc":
        folder = Path(parts.path).parent
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    socket = _bounded(zmq.ROUTER)
    has_keys = keys is not None and parts.scheme == "tcp"
    try:
        if keys is not None and has_keys:
            curve.guard(socket, keys)
        socket.bind(address)
    except zmq.ZMQError as error:
        socket.close()
        raise AdrenalineError(f"cannot listen at {address}: {error}") from None
    found = socket.getsockopt_string(zmq.LAST_ENDPOINT).rstrip("\0")
    return socket, found.replace("tcp://", f"tcp://{keys.public.hex()}@", 1) if keys is not None and has_keys else found


def unbind(socket: zmq.Socket[bytes], address: str) -> None:
    """Close a bound socket and remove its ipc path."""
    socket.close()
    if address.startswith("ipc://"):
        with contextlib.suppress(OSError):
            os.unlink(urlsplit(address).path)


def connect(address: str, keys: Keys | None = None) -> zmq.Socket[bytes]:
    """Return a DEALER socket that talks to the ROUTER at `address`, which need not be there yet.

    Args:
        address: with the key that is demanded there, if one is.
        keys: our own; None for those of this process.

    Raises:
        AdrenalineError: the address demands a key, and we have none.
    """
    parts, keys = urlsplit(address), keys or _active
    socket = _bounded(zmq.DEALER)
    try:
        if parts.username is not None:
            if keys is None:
                raise AdrenalineError(
                    f"whoever listens at {parts.hostname} wants to know our key: give --adrenaline-key"
                )
            curve.prove(socket, keys, curve.parse(parts.username, f"the key of {parts.hostname}"))
            address = address.replace(f"{parts.username}@", "", 1)
        socket.connect(address)
    except BaseException:
        socket.close()
        raise
    return socket


def ask_once(
    address: str, message: messages.Message, timeout_s: float, keys: Keys | None = None
) -> messages.AnyMessage | None:
    """Ask the ROUTER at `address` over a connection of its own; return the answer, as `ask` does."""
    socket = connect(address, keys)
    try:
        return ask(socket, message, timeout_s)
    finally:
        socket.close()


def ask(socket: zmq.Socket[bytes], message: messages.Message, timeout_s: float) -> messages.AnyMessage | None:
    """Send one message and return the answer. None: nothing came in time, or what came is no message."""
    socket.send(messages.encode(message))
    if not socket.poll(int(timeout_s * 1000)):
        return None
    try:
        return messages.decode(b"".join(socket.recv_multipart()))
    except msgspec.DecodeError:
        return None


def receive(socket: zmq.Socket[bytes]) -> tuple[bytes, messages.AnyMessage] | None:
    """Return who says what on a ROUTER socket at which something has arrived. None: it is no message."""
    frames = socket.recv_multipart()
    try:
        peer, frame = frames
        return peer, messages.decode(frame)
    except (ValueError, msgspec.DecodeError):
        return None


def answer(socket: zmq.Socket[bytes], peer: bytes, message: messages.Message) -> None:
    """Answer a peer of a ROUTER socket. One that is gone, or whose queue is full, gets no answer."""
    with contextlib.suppress(zmq.ZMQError):
        socket.send_multipart([peer, messages.encode(message)], zmq.NOBLOCK)
