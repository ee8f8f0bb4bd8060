"""Descriptors that processes of one host pass to each other, in whatever PID namespaces they are (SCM_RIGHTS).

A server offers what others may have of its process. Who connects says in one packet which offer it wants, and deposits
descriptors of its own under a token that it has drawn at random. Control messages carry the token. So whoever gets the
message takes what was deposited with him, by somebody who knew the token, and never something of another process.

A packet comes whole or not at all (SOCK_SEQPACKET). Nobody but this user is listened to (SO_PEERCRED).
"""

from __future__ import annotations

import array
import contextlib
import logging
import os
import secrets
import select
import socket
import struct
import threading
import time
from collections.abc import Sequence

from vllm_adrenaline.errors import AdrenalineError
from vllm_adrenaline.system import unix_socket
from vllm_adrenaline.system.process import open_own

logger = logging.getLogger("vllm.adrenaline")

MAX_DESCRIPTORS = 4
"""That are passed at a time, at most."""
TOKEN_BYTES = 16
CLIENT_S, KEEP_S = 1.0, 60.0
"""How long a client may take to say what it wants, and a server to answer; how long a deposit is kept."""
MAX_CLIENTS, MAX_DEPOSITS = 64, 256
"""Clients that have said nothing yet, and deposits that nobody has taken yet: the oldest of too many goes."""
PROCESS = 0
"""The offer of every server: the descriptors of its process (process.open_own)."""
PAUSE_S = 0.1
"""After a failure that may last, such as too many open files."""

_REQUEST = struct.Struct(f"<8s{TOKEN_BYTES}sI")
_MAGIC = b"adrpass1"
_GIVEN, _REFUSED = b"\x01", b"\x00"
_CREDENTIALS = struct.Struct("3i")


class Unreachable(AdrenalineError):
    """Nobody passes descriptors there, or does not pass these, or not yet."""


def exchange(address: str, deposited: Sequence[int], wanted: int = PROCESS) -> tuple[bytes, list[int]]:
    """Deposit descriptors with the server at `address`, which stay open here, and get some of its own.

    Args:
        address: a path, or a name that begins with a zero byte.
        deposited: at most MAX_DESCRIPTORS.
        wanted: the number of the server's offer.

    Returns:
        The token of the deposit, and what the server offers. The caller closes that.

    Raises:
        Unreachable: nobody is there, or does not answer in CLIENT_S, or does not offer this, or not yet.
        AdrenalineError: another user is there, or too many files are open here.
    """
    token = secrets.token_bytes(TOKEN_BYTES)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
        connection.settimeout(CLIENT_S)
        try:
            connection.connect(address)
            _check_user(connection)
            socket.send_fds(connection, [_REQUEST.pack(_MAGIC, token, wanted)], list(deposited))
            answer, found, is_cut = _receive(connection, 2)
        except OSError as error:
            raise Unreachable(f"nobody passes descriptors at {_in_words(address)}: {error}") from None
    if answer == _GIVEN and not is_cut:
        return token, found
    close(found)
    if is_cut:
        raise AdrenalineError(f"descriptors from {_in_words(address)} found no room: too many files are open here")
    raise Unreachable(f"who passes descriptors at {_in_words(address)} does not pass these, or not yet")


def introduce(address: str, more: Sequence[int] = (), wanted: int = PROCESS) -> tuple[bytes, list[int]]:
    """Deposit the pidfd of this process, and `more` behind it. All else is as in `exchange`."""
    ours = os.pidfd_open(os.getpid())
    try:
        return exchange(address, [ours, *more], wanted)
    finally:
        os.close(ours)


class Server(threading.Thread):
    """The thread that offers descriptors of this process, and keeps what others deposit until it is taken.

    Attributes:
        address: where it listens.
        offers: descriptors by the number of the offer, which stay open; PROCESS is there. Whoever has more adds them.
    """

    def __init__(self, address: str) -> None:
        """Listen at `address`: a path, or a name that begins with a zero byte.

        Raises AdrenalineError if somebody listens there, or it cannot be listened at.
        """
        super().__init__(name="adrenaline-descriptors", daemon=True)
        self.address = address
        if not address.startswith("\0") and unix_socket.is_in_use(address, socket.SOCK_SEQPACKET):
            raise AdrenalineError(f"{address} is in use: another engine listens there")
        try:
            self._listener = unix_socket.listen(address, socket.SOCK_SEQPACKET)
        except OSError as error:
            raise AdrenalineError(f"cannot listen at {_in_words(address)}: {error}") from None
        self.offers: dict[int, Sequence[int]] = {PROCESS: open_own()}
        self._clients: dict[int, tuple[socket.socket, float]] = {}  # by descriptor, with the deadline; the oldest first
        self._lock = threading.Lock()  # guards what follows
        self._deposits: dict[bytes, tuple[float, list[int]]] = {}  # by token, with its end; the oldest first
        self._bell = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._stopping = threading.Event()

    def take(self, token: bytes, count: int) -> list[int]:
        """Return what was deposited under `token`: `count` descriptors, which the caller closes. Nobody gets it again.

        Raises AdrenalineError if nothing was, or so many were not, or it was taken, or was not for too long.
        """
        with self._lock:
            _, found = self._deposits.pop(token, (0.0, None))
        if found is None:
            raise AdrenalineError("no descriptors were passed to this process with the message, or not lately")
        if len(found) != count:
            close(found)
            raise AdrenalineError(f"{len(found)} descriptors were passed with the message, and not {count}")
        return found

    def stop(self) -> None:
        """End the thread, if it was started, once, and close what was deposited."""
        self._stopping.set()
        os.eventfd_write(self._bell, 1)
        if self.is_alive():
            self.join(timeout=2)
        self._listener.close()
        if not self.address.startswith("\0"):
            with contextlib.suppress(OSError):
                os.unlink(self.address)
        for client, _ in self._clients.values():
            client.close()
        with self._lock:
            for _, found in self._deposits.values():
                close(found)
            self._deposits.clear()
        close([*self.offers.pop(PROCESS), self._bell])

    # Own thread

    def run(self) -> None:
        while not self._stopping.is_set():
            try:
                self._turn()
            except Exception:
                logger.exception("descriptors are not passed to somebody")
                time.sleep(PAUSE_S)

    def _turn(self) -> None:
        """Sleep until somebody comes, says what he wants, or has taken too long."""
        poller = select.poll()
        for each in (self._bell, self._listener.fileno(), *self._clients):
            poller.register(each, select.POLLIN)
        with self._lock:
            ends = [end for end, _ in self._deposits.values()]
        ends += [end for _, end in self._clients.values()]
        wait_ms = max(0.0, 1000 * (min(ends) - time.monotonic())) if ends else None
        ready = {each for each, _ in poller.poll(wait_ms)}
        for key in ready & self._clients.keys():
            client, _ = self._clients.pop(key)
            with client:
                self._serve(client)
        if self._listener.fileno() in ready:
            self._accept()
        self._forget_late()

    def _accept(self) -> None:
        client, _ = self._listener.accept()
        try:
            _check_user(client)
        except AdrenalineError as error:
            logger.warning("descriptors are not passed: %s", error)
            client.close()
            return
        client.setblocking(False)
        self._clients[client.fileno()] = client, time.monotonic() + CLIENT_S
        if len(self._clients) > MAX_CLIENTS:
            oldest, _ = self._clients.pop(next(iter(self._clients)))
            oldest.close()

    def _serve(self, client: socket.socket) -> None:
        """Take the one packet of a client, and answer it. One that left, or does not read, gets no answer."""
        with contextlib.suppress(OSError):
            packet, found, is_cut = _receive(client, _REQUEST.size + 1)
            if not packet:
                close(found)
                return
            offer: Sequence[int] | None = None
            try:
                offer = self._keep(packet, found, is_cut)
            except AdrenalineError as error:
                logger.warning("a request for descriptors is refused: %s", error)
            if offer is None:
                close(found)
            socket.send_fds(client, [_REFUSED if offer is None else _GIVEN], offer or ())

    def _keep(self, packet: bytes, found: list[int], is_cut: bool) -> Sequence[int] | None:
        """Keep what came with a packet, and return the offer that it wants. None: there is none (yet).

        Raises AdrenalineError if the packet is none of `exchange`. Nothing is kept then, nor for None.
        """
        if is_cut:
            raise AdrenalineError(f"it has more than {MAX_DESCRIPTORS} descriptors, or too many files are open here")
        if len(packet) != _REQUEST.size or not packet.startswith(_MAGIC):
            raise AdrenalineError(f"its {len(packet)} bytes are none")
        _, token, wanted = _REQUEST.unpack(packet)
        offer = self.offers.get(wanted)
        with self._lock:
            if token in self._deposits:
                raise AdrenalineError("its token is in use")
            if offer is not None:
                self._deposits[token] = time.monotonic() + KEEP_S, found
            if len(self._deposits) > MAX_DEPOSITS:
                close(self._deposits.pop(next(iter(self._deposits)))[1])
        return offer

    def _forget_late(self) -> None:
        now = time.monotonic()
        for key in [key for key, (_, end) in self._clients.items() if end <= now]:
            self._clients.pop(key)[0].close()
        with self._lock:
            for token in [token for token, (end, _) in self._deposits.items() if end <= now]:
                close(self._deposits.pop(token)[1])


def _receive(connection: socket.socket, size: int) -> tuple[bytes, list[int], bool]:
    """Return a packet of at most `size` bytes, its descriptors, and whether there were more than found room.

    The standard library's recv_fds has them inherited by child processes: it does not use its flags (Python 3.11).
    """
    found = array.array("i")
    space = socket.CMSG_LEN(MAX_DESCRIPTORS * found.itemsize)
    packet, ancillary, flags, _ = connection.recvmsg(size, space, socket.MSG_CMSG_CLOEXEC)
    for level, kind, data in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            found.frombytes(data[: len(data) - len(data) % found.itemsize])
    return packet, list(found), bool(flags & socket.MSG_CTRUNC)


def _check_user(connection: socket.socket) -> None:
    """Raise AdrenalineError unless the other side runs as this user."""
    size = _CREDENTIALS.size
    _, user, _ = _CREDENTIALS.unpack(connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size))
    if user != os.geteuid():
        raise AdrenalineError(f"the other process runs as user {user}, and this one as {os.geteuid()}")


def _in_words(address: str) -> str:
    return address.replace("\0", "@", 1)


def close(found: Sequence[int]) -> None:
    """Close descriptors that were passed."""
    for each in found:
        os.close(each)
