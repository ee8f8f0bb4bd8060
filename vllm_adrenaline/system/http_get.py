"""A page over HTTP, from a TCP port or a Unix socket, for who waits for it. Standard library only."""

from __future__ import annotations

import http.client
import socket
import urllib.error
import urllib.request
from collections.abc import Mapping

UNIX = "unix:"
"""How the address of a server at a Unix socket begins; the rest is the path of the socket."""


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: str, timeout_s: float) -> None:
        super().__init__("localhost", timeout=timeout_s)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)


def get(address: str, path: str, timeout_s: float, headers: Mapping[str, str] | None = None) -> tuple[int, bytes]:
    """Return status and body of a page. `address` is a URL, or unix: and the path of a socket.

    Raises OSError when no HTTP server answers there.
    """
    try:
        if address.startswith(UNIX):
            connection = _UnixConnection(address.removeprefix(UNIX), timeout_s)
            try:
                connection.request("GET", path, headers=dict(headers or {}))
                answer = connection.getresponse()
                return answer.status, answer.read()
            finally:
                connection.close()
        request = urllib.request.Request(address + path, headers=dict(headers or {}))
        with urllib.request.urlopen(request, timeout=timeout_s) as page:
            return int(page.status), bytes(page.read())
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read()
    except http.client.HTTPException as error:
        raise ConnectionError(f"no HTTP: {error!r}") from error
