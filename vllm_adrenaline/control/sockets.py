"""The ZMQ sockets of the control plane: frames and queues are bounded, and each socket has one thread that owns it.

An address is `ipc:///path` (the default, protected by the folder's permissions) or `tcp://host:port`. A TCP address
that is not loopback is refused: there is no key exchange yet.
"""

import contextlib
import os
import socket as std_socket
import tempfile
from pathlib import Path
from urllib.parse import urlsplit

import msgspec
import zmq

from vllm_adrenaline.control import messages
from vllm_adrenaline.errors import AdrenalineError

LOOPBACK = {"127.0.0.1", "localhost", "::1"}
HIGH_WATER_MARK = 10_000
"""Messages that wait in a socket at most, in each direction."""


def default_address() -> str:
    """Return the address at which a prefill engine listens if none is given: the same for all engines of one user."""
    return f"ipc://{tempfile.gettempdir()}/vllm-adrenaline-{os.getuid()}/prefill"


def check_address(address: str) -> str:
    """Return `address` if it has a form that can be used, else raise AdrenalineError."""
    parts = urlsplit(address)
    if parts.scheme == "ipc" and parts.path.startswith("/") and len(parts.path) < 100:
        return address
    if parts.scheme == "tcp":
        try:
            host, port = parts.hostname, parts.port
        except ValueError:
            host, port = None, None
        if host and port is not None:
            if host not in LOOPBACK:
                raise AdrenalineError(
                    f"address {address} is not on this machine: only loopback is supported, for control messages "
                    "are neither encrypted nor authenticated yet"
                )
            return address
    raise AdrenalineError(
        f"address {address!r} is neither ipc:///absolute/path (under 100 characters) nor tcp://host:port"
    )


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
    return socket


def bind(address: str) -> tuple[zmq.Socket[bytes], str]:
    """Return a bound ROUTER socket and the address that it really has. Raises AdrenalineError if it cannot be bound."""
    parts = urlsplit(address)
    if not address.endswith(":*"):
        check_free(address)
    if parts.scheme == "ipc":
        folder = Path(parts.path).parent
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    socket = _bounded(zmq.ROUTER)
    try:
        socket.bind(address)
    except zmq.ZMQError as error:
        socket.close()
        raise AdrenalineError(f"cannot listen at {address}: {error}") from None
    return socket, socket.getsockopt_string(zmq.LAST_ENDPOINT).rstrip("\0")


def unbind(socket: zmq.Socket[bytes], address: str) -> None:
    """Close a bound socket and remove its ipc path."""
    socket.close()
    if address.startswith("ipc://"):
        with contextlib.suppress(OSError):
            os.unlink(urlsplit(address).path)


def connect(address: str) -> zmq.Socket[bytes]:
    """Return a DEALER socket that talks to the ROUTER at `address`, which need not be there yet."""
    socket = _bounded(zmq.DEALER)
    socket.connect(address)
    return socket


def ask_once(address: str, message: messages.Message, timeout_s: float) -> messages.AnyMessage | None:
    """Ask the ROUTER at `address` over a connection of its own; return the answer, as `ask` does."""
    socket = connect(address)
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
