"""Serving the front door: in a thread beside supervised engines (`adrenaline up`), or alone (`adrenaline proxy`)."""

from __future__ import annotations

import errno
import socket
import threading
import time
from collections.abc import Sequence

import uvicorn

from vllm_adrenaline.proxy.app import create_app

DRAIN_S = 5
START_S = 10.0


class PortTaken(Exception):
    """The front door's address cannot be bound; the message is for the user."""


def bind(host: str, port: int) -> socket.socket:
    """Return a socket bound to the address, not listening yet: clients are refused until the engines are ready."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except socket.gaierror as error:
        raise PortTaken(f"cannot listen on {host}: {error.strerror}") from None
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            raise PortTaken(f"port {port} on {host} is in use; choose another with --port") from None
        raise PortTaken(f"cannot listen on {host}, port {port}: {error.strerror}") from None
    return listener


def url_of(listener: socket.socket) -> str:
    """Return the URL of a bound socket."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def make_server(prefill: Sequence[str], decode: Sequence[str]) -> uvicorn.Server:
    """Return a server for the front door that finishes running requests for a few seconds when it is stopped."""
    config = uvicorn.Config(
        create_app(prefill, decode), log_level="warning", access_log=False, timeout_graceful_shutdown=DRAIN_S
    )
    return uvicorn.Server(config)


class ServerThread:
    """The front door in a daemon thread of this process."""

    def __init__(self, listener: socket.socket, prefill: Sequence[str], decode: Sequence[str]) -> None:
        self._server = make_server(prefill, decode)
        self._thread = threading.Thread(
            target=self._server.run, kwargs={"sockets": [listener]}, name="front-door", daemon=True
        )

    def start(self) -> None:
        """Start serving; return when connections are accepted."""
        self._thread.start()
        deadline = time.monotonic() + START_S
        while not self._server.started:
            if not self._thread.is_alive() or time.monotonic() > deadline:
                raise RuntimeError("the front door did not start")
            time.sleep(0.02)

    @property
    def alive(self) -> bool:
        """Say whether the front door still serves."""
        return self._thread.is_alive()

    def stop(self) -> None:
        """Let running requests finish for a moment, then close the front door."""
        self._server.should_exit = True
        if self._thread.ident is not None:
            self._thread.join(DRAIN_S + START_S)
