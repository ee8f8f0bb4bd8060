"""Errors in the shape of OpenAI's API, as vLLM sends them, and of Anthropic's. Runs in the proxy's process."""

from __future__ import annotations

from http import HTTPStatus
from typing import Any

from starlette.responses import JSONResponse

RETRY_AFTER_S = 5
REQUEST_ID = "X-Request-Id"
TRY_AGAIN = (HTTPStatus.TOO_MANY_REQUESTS, HTTPStatus.SERVICE_UNAVAILABLE)


class Refused(Exception):
    """A request that the proxy itself answers with an error; `param` names the field of the body that is to blame."""

    def __init__(self, status: int, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.param = status, message, param


def content(status: int, message: str, param: str | None = None) -> dict[str, Any]:
    """Return the JSON of an error as vLLM would answer it. The outer `type` is what clients of Anthropic's API want."""
    try:
        name = HTTPStatus(status).phrase.title().replace(" ", "")
    except ValueError:  # as those of some load balancers before an engine
        name = "Unknown"
    kind = "InternalServerError" if status == HTTPStatus.INTERNAL_SERVER_ERROR else f"{name}Error"
    return {"type": "error", "error": {"message": message, "type": kind, "param": param, "code": status}}


def error_response(status: int, message: str, request_id: str, param: str | None = None) -> JSONResponse:
    """Return an error for a client.

    It names the request, by which the operator finds in the log what a client is not told. One with status 429 or 503
    also says when to try again.
    """
    headers = {REQUEST_ID: request_id}
    if status in TRY_AGAIN:
        headers["Retry-After"] = str(RETRY_AFTER_S)
    if status >= HTTPStatus.INTERNAL_SERVER_ERROR:
        message = f"{message} (request {request_id})"
    return JSONResponse(content(status, message, param), status_code=status, headers=headers)
