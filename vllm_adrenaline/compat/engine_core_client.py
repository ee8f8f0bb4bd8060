"""A patch of an engine core's client: requests reach the core later, and from another thread.

vLLM's LLM gives a request to its engine core at once, from the caller's thread, which then waits for answers. Nothing
can be asked of another engine in between (vllm/v1/engine/core_client.py, SyncMPClient; 0.32 run, 0.33 read).
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from vllm_adrenaline.errors import AdrenalineError

if TYPE_CHECKING:
    from vllm.v1.engine import EngineCoreRequest
    from vllm.v1.engine.core_client import SyncMPClient


def divert(
    client: SyncMPClient, take: Callable[[EngineCoreRequest], None], drop: Callable[[list[str]], None]
) -> Callable[[EngineCoreRequest], None]:
    """Have new requests given to `take` instead of to the core; return what gives the core one, from any thread.

    Args:
        client: of the core. It knows nothing of requests that it was not given, and waits for their answers all the
            same.
        take: gets each request.
        drop: gets the ids of requests that are aborted, before the core does.

    Raises:
        AdrenalineError: the core runs in this process, where no other thread may give it anything.
    """
    from vllm.v1.engine.core_client import SyncMPClient

    if not isinstance(client, SyncMPClient):
        raise AdrenalineError(
            "LLM(...) with offloading needs an engine core of its own process: unset VLLM_ENABLE_V1_MULTIPROCESSING"
        )
    send, add, abort = client._send_input, client.add_request, client.abort_requests
    lock = threading.Lock()

    def send_alone(kind: Any, request: Any) -> None:
        with lock:  # a socket belongs to one thread at a time
            send(kind, request)

    def abort_both(request_ids: list[str]) -> None:
        if request_ids:  # vLLM says so after every step
            drop(request_ids)
            abort(request_ids)

    for name, method in {"_send_input": send_alone, "add_request": take, "abort_requests": abort_both}.items():
        setattr(client, name, method)
    return add
