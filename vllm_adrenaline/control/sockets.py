"""The ZMQ sockets of the control plane: frames and queues are bounded, and each socket has one thread that owns it.

What an address may be is said in addresses.py.
"""

from __future__ import annotations

import contextlib
import os
import socket as std_socket
from pathlib import Path
from urllib.parse import urlsplit

import msgspec
import zmq

from vllm_adrenaline.control import addresses, messages
from vllm_adrenaline.control import keys as curve
from vllm_adrenaline.control.keys import Keys
from vllm_adrenaline.errors import AdrenalineError
from vllm_adrenaline.system import unix_socket
from vllm_adrenaline.system.folders import private_folder

MAX_UNSENT, MAX_UNREAD = 10_000, 64
"""Messages that wait in a socket to be sent, and to be read, at most; of each connection. A sender waits when nobody
reads, so that a flood fills its own memory, and of the reader's no more than MAX_UNREAD frames."""
HANDSHAKE_MS = 10_000
"""After how long a TCP connection is closed that has not said who it is."""
KEEPALIVE = {zmq.TCP_KEEPALIVE: 1, zmq.TCP_KEEPALIVE_IDLE: 60, zmq.TCP_KEEPALIVE_INTVL: 10, zmq.TCP_KEEPALIVE_CNT: 6}
"""So that a TCP connection to a host that is gone does not stay for ever. A process that only sleeps keeps its own."""


def check_free(address: str) -> None:
    """Raise AdrenalineError if something listens at `address`. ZMQ itself would silently take over an ipc path."""
    parts = urlsplit(address)
    if parts.scheme == "ipc":
        in_use = unix_socket.is_in_use(parts.path)
    else:
        with std_socket.socket() as probe:
            in_use = probe.connect_ex((parts.hostname or "", parts.port or 0)) == 0
    if in_use:
        raise AdrenalineError(
            f"{address} is in use, probably by another prefill engine: give this one --adrenaline-listen"
        )


def _bounded(kind: int) -> zmq.Socket[bytes]:
    socket: zmq.Socket[bytes] = zmq.Context.instance().socket(kind)
    socket.setsockopt(zmq.LINGER, 0)
    socket.setsockopt(zmq.MAXMSGSIZE, messages.MAX_FRAME)
    socket.setsockopt(zmq.SNDHWM, MAX_UNSENT)
    socket.setsockopt(zmq.RCVHWM, MAX_UNREAD)
    socket.setsockopt(zmq.HANDSHAKE_IVL, HANDSHAKE_MS)
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
    socket = _bounded(zmq.ROUTER)
    has_keys = keys is not None and parts.scheme == "tcp"
    try:
        if keys is not None and has_keys:
            curve.guard(socket, keys)
        if parts.scheme == "ipc":
            socket.setsockopt(zmq.USE_FD, unix_socket.listen(parts.path).detach())
        socket.bind(address)
    except AdrenalineError:
        socket.close()
        raise
    except (OSError, zmq.ZMQError) as error:
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
        AdrenalineError: the address demands a key, and we have none; or others could listen in its folder.
    """
    parts, keys = urlsplit(address), keys or _active
    if parts.scheme == "ipc":
        private_folder(Path(parts.path).parent)  # made now, so that nobody else makes it before the peer is there
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


def check_welcome(welcome: messages.Welcome, by: str, beyond_loopback: bool) -> None:
    """Raise AdrenalineError unless the prefill engine that we reach at `by` may name the addresses in its welcome.

    They are checked like an operator's. `beyond_loopback`: whether the operator named an interface to other hosts.
    """
    addresses.check_host(welcome.nixl_host, welcome.nixl_port, by, beyond_loopback)
    check_executors(welcome, by)


def check_executors(welcome: messages.Welcome, by: str) -> None:
    """Raise AdrenalineError unless the prefill engine that we reach at `by` may name these executors."""
    for executor in welcome.executors:
        if executor:  # else it does not serve yet
            addresses.check_named(executor, by, has_keys=_active is not None)


def refusal(reason: str, address: str) -> messages.Refused:
    """Return what is told to somebody whom we refuse at `address`, where we listen.

    What we are is told to those only who have proved a key, or are this user.
    """
    told = "the log of who refuses says why" if addresses.lets_anybody_in(address) else reason
    return messages.Refused(told[: messages.MAX_REASON])


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
