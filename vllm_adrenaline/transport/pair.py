"""A process group of two: one end here, the other in a process that may be on another host. Gloo, over TCP.

Gloo wants a store at which both ends meet. Ours is no server: what one end says there is carried to the other in the
handshake, over the control plane, which is authenticated (messages.Contact). Neither end needs a world; vLLM's own, if
there is one, is not touched. torch.distributed's object collectives are never used, for they pickle.

Messages of a direction arrive in the order in which they were sent. Both ends know the size of each before it comes.
They must: gloo ends a process that receives more than it expects, and takes less for enough (docs/vllm-notes.md).
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from datetime import timedelta
from typing import Any

import torch
from torch._C._distributed_c10d import ProcessGroupGloo, Store

from vllm_adrenaline.control.messages import Contact
from vllm_adrenaline.errors import AdrenalineError
from vllm_adrenaline.system.network import address_of

CONNECT_S = 10.0
"""How long the two ends may take to find each other."""
KEEPALIVE = {socket.TCP_KEEPIDLE: 2, socket.TCP_KEEPINTVL: 1, socket.TCP_KEEPCNT: 3, socket.TCP_USER_TIMEOUT: 5000}
"""When TCP gives up a peer that says nothing at all: after some 5 s, whether we have sent it something or not."""
FOREVER_S = 365 * 86400.0
TAG = 0


class Disconnected(AdrenalineError):
    """The other end is gone, or was too late, or is not who it should be. A disconnected pair stays so."""


class Relay(Store):
    """The store of one end: `told` is what gloo says there, `heard` what the other end's gloo said at its own."""

    def __init__(self) -> None:
        super().__init__()
        self.told: dict[str, bytes] = {}
        self._heard: dict[str, bytes] = {}
        self._changed = threading.Condition()
        self._is_closed = False

    def hear(self, values: dict[str, bytes]) -> None:
        """Take what was said at the other end."""
        with self._changed:
            self._heard |= values
            self._changed.notify_all()

    def close(self) -> None:
        """End all waiting."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()

    def await_told(self, timeout_s: float) -> bool:
        """Wait until gloo has said something; return whether it has."""
        with self._changed:
            return self._changed.wait_for(lambda: bool(self.told), timeout_s)

    # What gloo calls

    def set(self, key: str, value: Any) -> None:
        with self._changed:
            self.told[key] = value
            self._changed.notify_all()

    def wait(self, keys: list[str], timeout: timedelta | None = None) -> None:
        with self._changed:
            is_there = self._changed.wait_for(
                lambda: self._is_closed or set(keys) <= self.told.keys() | self._heard.keys(), CONNECT_S
            )
            if not is_there or self._is_closed:
                raise RuntimeError("the other end of a process group did not say where it is")

    def get(self, key: str) -> bytes:
        self.wait([key])
        return self.told[key] if key in self.told else self._heard[key]

    def has_extended_api(self) -> bool:
        return False


def _sockets() -> dict[int, str]:
    """Return the sockets of this process: which it is, by its descriptor."""
    found = {}
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            target = os.readlink(f"/proc/self/fd/{name}")
            if target.startswith("socket:"):
                found[int(name)] = target
    return found


def _is_tcp(each: socket.socket) -> bool:
    return each.family == socket.AF_INET and each.type == socket.SOCK_STREAM


_making = threading.Lock()
"""Held while a listening socket of gloo's is looked for among those that are new."""


def _listen(host: str) -> tuple[Any, int]:
    """Return a new device of gloo's, and the port at which it listens. Gloo itself does not tell."""
    with _making:
        before = set(_sockets().values())
        device = ProcessGroupGloo.create_device(hostname=host)
        ports = []
        for fd, target in _sockets().items():
            if target in before:
                continue
            with contextlib.suppress(OSError), socket.socket(fileno=os.dup(fd)) as each:
                if _is_tcp(each) and each.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
                    ports.append(each.getsockname()[1])
    if len(ports) != 1:  # somebody else in this process began to listen at the same time
        raise AdrenalineError("cannot tell at which port gloo listens: trying again helps")
    return device, ports[0]


class Pair:
    """One end of a process group of two.

    Attributes:
        contact: what the other end has to be told (`connect`).
    """

    def __init__(self, rank: int, interface: str) -> None:
        """Listen. `rank`: 0 on the decode worker, 1 on the executor.

        Raises:
            AdrenalineError: there is no such network interface, or gloo cannot listen there.
        """
        self._rank, self._relay = rank, Relay()
        self._group: Any = None
        self._error: Exception | None = None
        self._socket: socket.socket | None = None
        self._lock = threading.Lock()
        host = address_of(interface)
        try:
            device, self._port = _listen(host)
        except RuntimeError as error:
            raise AdrenalineError(f"cannot listen at {interface}: {error}") from None
        self._maker = threading.Thread(target=self._make, args=(device,), name="adrenaline-pair", daemon=True)
        self._maker.start()
        if not self._relay.await_told(CONNECT_S):
            self.close()
            raise AdrenalineError(f"gloo does not say where it listens at {interface}: {self._error}")
        self.contact = Contact(host, self._port, dict(self._relay.told))

    def _make(self, device: Any) -> None:
        gloo: Any = ProcessGroupGloo
        settings = gloo._Options()  # torch has no other way to say where a group listens
        settings._devices, settings._threads, settings._timeout = [device], 1, timedelta(seconds=CONNECT_S)
        try:
            self._group = ProcessGroupGloo(self._relay, self._rank, 2, settings)
        except Exception as error:
            # Its traceback would keep the device, which would go on listening: the other end would take it for us.
            self._error = error.with_traceback(None)

    def connect(self, contact: Contact) -> None:
        """Connect to the other end, which must do the same. Waits for up to CONNECT_S.

        Raises:
            Disconnected: it does not answer.
        """
        self._relay.hear(contact.values)
        self._maker.join(2 * CONNECT_S)
        if self._group is None:
            raise Disconnected(f"{contact.host}:{contact.port} does not connect: {self._error or 'no answer'}")
        connection = self._find(contact)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in KEEPALIVE.items():
            connection.setsockopt(socket.IPPROTO_TCP, option, value)
        with self._lock:
            self._socket = connection

    def _find(self, contact: Contact) -> socket.socket:
        """Return the connection to the other end, one side of which is a listening port of an end."""
        for fd in _sockets():
            with contextlib.suppress(OSError), socket.socket(fileno=os.dup(fd)) as each:
                if _is_tcp(each):
                    host, port = each.getpeername()
                    if host == contact.host and (port == contact.port or each.getsockname()[1] == self._port):
                        # Not each.dup(), which would make gloo's own socket a blocking one.
                        return socket.socket(fileno=os.dup(fd))
        raise Disconnected(f"there is no connection to {contact.host}:{contact.port}")

    def send(self, message: torch.Tensor) -> Any:
        """Send a tensor, which must not change before the other end has it. Waits for nobody.

        Returns:
            What is to be kept until then.

        Raises:
            Disconnected: the other end is gone.
        """
        try:
            return self._group.send([message], 1 - self._rank, TAG)
        except RuntimeError as error:
            raise _disconnected(error) from None

    def expect(self, message: torch.Tensor) -> Any:
        """Return what `receive` takes: the next message is to be written into this tensor when it comes.

        Raises:
            Disconnected: the other end is gone.
        """
        try:
            return self._group.recv([message], 1 - self._rank, TAG)
        except RuntimeError as error:
            raise _disconnected(error) from None

    @staticmethod
    def receive(expected: Any, timeout_s: float = FOREVER_S) -> None:
        """Wait for a message that was expected.

        Raises:
            Disconnected: it did not come in time, or the other end is gone. Both ends are disconnected then.
        """
        try:
            expected.wait(timedelta(milliseconds=max(1, int(1000 * timeout_s))))
        except RuntimeError as error:
            raise _disconnected(error) from None

    def abort(self) -> None:
        """End the connection, and so the waiting of both ends. Any thread may call it.

        Gloo's own abort() does not end a wait.
        """
        self._relay.close()
        with self._lock:
            if self._socket is not None:
                with contextlib.suppress(OSError):
                    self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """End the connection and let go of everything. Only the thread that sends and receives may call it."""
        self.abort()
        self._maker.join(1.0)  # it may still want to meet the other end, and ends now
        self._group = None
        with self._lock:
            if self._socket is not None:
                self._socket.close()
                self._socket = None


def _disconnected(error: Exception) -> Disconnected:
    """Return what gloo says without its place in the source, and without its advice."""
    said = str(error)
    return Disconnected((said.partition("] ")[2] or said).partition(". This is typically")[0])
