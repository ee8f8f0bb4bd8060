"""The metrics of an engine, read from outside over HTTP."""

from __future__ import annotations

from vllm_adrenaline.errors import AdrenalineError
from vllm_adrenaline.proxy.limits import API_KEY_ENV, api_key
from vllm_adrenaline.proxy.snapshot import Snapshot
from vllm_adrenaline.system import http_get

TIMEOUT_S = 10


def get_page(url: str, path: str) -> bytes:
    """Return a page of an engine, or of a proxy that may want the API key.

    Raises OSError or ValueError when there is none.
    """
    key = api_key(None)
    headers = {} if key is None else {"Authorization": f"Bearer {key}"}
    status, page = http_get.get(url, path, TIMEOUT_S, headers)
    if status == 401:
        raise ValueError(f"status 401: set {API_KEY_ENV} to the API key")
    if status != 200:
        raise ValueError(f"status {status}")
    return page


class EngineMetrics:
    """The metrics of one engine, read anew at every call."""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")

    def text(self) -> str:
        """Return the page itself. Raises OSError or ValueError when there is none."""
        return get_page(self.url, "/metrics").decode()

    def read(self) -> Snapshot:
        """Return all metrics. Raises AdrenalineError when no engine answers within ten seconds."""
        try:
            text = self.text()
            if "\nvllm:" not in text:
                raise ValueError("what is there has no metrics of vLLM")
            return Snapshot(text)
        except (OSError, ValueError) as error:
            raise AdrenalineError(f"no engine answers at {self.url}/metrics: {error}") from None

    def _now(self) -> Snapshot:
        try:
            return self.read()
        except AdrenalineError:
            return Snapshot("")

    def value(self, name: str) -> float:
        """Return the sum of a metric over its labels; 0 if the engine does not have it."""
        return self._now().value(name)

    def all(self) -> dict[str, float]:
        """Return every metric by name, added up over its labels."""
        return self._now().values

    def blocks(self) -> int:
        """Return how many KV blocks the engine has."""
        return self._now().blocks()

    def offloaded(self) -> int:
        """Return how many requests had their attention run elsewhere so far."""
        return int(self.value("vllm:adrenaline_offloaded_requests_total"))
