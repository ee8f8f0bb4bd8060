"""The proxy's HTTP server: in a thread beside supervised engines (`adrenaline up`), or alone (`adrenaline proxy`)."""

from __future__ import annotations

import errno
import resource
import socket
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

import uvicorn

from vllm_adrenaline.errors import AdrenalineError
from vllm_adrenaline.proxy import engine_file
from vllm_adrenaline.proxy.app import create_app
from vllm_adrenaline.proxy.connections import Connections
from vllm_adrenaline.proxy.counts import Counts
from vllm_adrenaline.proxy.engine_file import EngineLists
from vllm_adrenaline.proxy.guard import Guard
from vllm_adrenaline.proxy.limits import Limits

CUT_S = 1
"""Time that connections have to be closed in, once nobody waits for requests any more."""
START_S = 10.0
FILES = 64
"""Files that the proxy has open beside the connections of its clients and those to engines."""


def bind(host: str, port: int) -> socket.socket:
    """Return a socket that is bound to the address. It does not listen yet, so that clients are refused until it does.

    `port` 0 chooses a free one. Raises AdrenalineError when the address cannot be bound.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except socket.gaierror as error:
        raise AdrenalineError(f"cannot listen on {host}: {error.strerror}") from None
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            raise AdrenalineError(f"port {port} on {host} is in use; choose another with --port") from None
        raise AdrenalineError(f"cannot listen on {host}, port {port}: {error.strerror}") from None
    return listener


def url_of(listener: socket.socket) -> str:
    """Return the URL of a bound socket."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class Server(uvicorn.Server):
    """A server that drains: once it is to stop, requests under way may end, and others are refused with 503."""

    def __init__(self, config: uvicorn.Config, guard: Guard, drain_s: float) -> None:
        super().__init__(config)
        self._guard, self._drain_s = guard, drain_s
        self._drained_at = 0.0

    def drain(self) -> None:
        """Stop when no request is under way any more, or when they have had their time; at once if called again."""
        if self._guard.drains:
            self.should_exit = True
        self._drained_at = time.monotonic() + self._drain_s
        self._guard.drains = True

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Drain on a signal that ends the process."""
        self._captured_signals.append(sig)
        self.drain()

    async def on_tick(self, counter: int) -> bool:
        """Say whether the server is to stop now; called ten times a second."""
        if self._guard.drains and (not self._guard.under_way or time.monotonic() > self._drained_at):
            self.should_exit = True
        return await super().on_tick(counter)


def make_server(
    engines: EngineLists, limits: Limits | None = None, api_key: str | None = None, watched: Path | None = None
) -> Server:
    """Return the proxy's server; the arguments are those of `create_app`.

    Raises AdrenalineError when this process may not have as many connections as the limits allow.
    """
    limits, counts = limits or Limits(), Counts()
    _allow_files(FILES + limits.max_connections + limits.max_requests)
    guard = create_app(engines, limits, api_key, counts, watched)
    config = uvicorn.Config(
        guard,
        http=Connections(limits, counts).protocol,  # type: ignore[arg-type]
        ws="none",
        h11_max_incomplete_event_size=limits.max_header_bytes,
        timeout_keep_alive=limits.idle_seconds,  # type: ignore[arg-type]
        log_config=None,  # what it says goes where all goes, and is bounded there
        log_level="error",  # of warnings it has one for every client that sends nonsense
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_graceful_shutdown=CUT_S,
    )
    return Server(config, guard, limits.drain_seconds)


def _allow_files(count: int) -> None:
    """Let this process open so many files. Raises AdrenalineError if it may not."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if resource.RLIM_INFINITY not in (soft, hard) and hard < count:
        raise AdrenalineError(
            f"the proxy needs {count} file descriptors, and may have {hard}: raise the limit (ulimit -n), or lower "
            "--max-connections and --max-requests"
        )
    if soft != resource.RLIM_INFINITY and soft < count:
        resource.setrlimit(resource.RLIMIT_NOFILE, (count, hard))


class ServerThread:
    """The proxy's server in a daemon thread of this process, behind a socket of `bind`."""

    def __init__(
        self,
        listener: socket.socket,
        prefill: Sequence[str],
        decode: Sequence[str],
        limits: Limits | None = None,
        api_key: str | None = None,
    ) -> None:
        self._server = make_server(engine_file.of_addresses(prefill, decode), limits, api_key)
        self._thread = threading.Thread(
            target=self._server.run, kwargs={"sockets": [listener]}, name="proxy", daemon=True
        )

    def start(self) -> None:
        """Start serving; return when connections are accepted. Raises RuntimeError when that takes too long."""
        self._thread.start()
        deadline = time.monotonic() + START_S
        while not self._server.started:
            if not self._thread.is_alive() or time.monotonic() > deadline:
                raise RuntimeError("the proxy did not start")
            time.sleep(0.02)

    @property
    def available(self) -> bool:
        """Say whether the proxy still serves."""
        return self._thread.is_alive()

    def stop(self) -> None:
        """Stop serving at once; requests under way are cut."""
        self._server.should_exit = True
        if self._thread.ident is not None:
            self._thread.join(CUT_S + START_S)
