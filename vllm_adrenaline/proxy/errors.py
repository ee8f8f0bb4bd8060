"""Errors in the shape of OpenAI's API, as vLLM sends them. Runs in the proxy's process."""

from __future__ import annotations

from http import HTTPStatus

from starlette.responses import JSONResponse

RETRY_AFTER_S = 5


class Refused(Exception):
    """A request that the proxy itself answers with an error; `param` names the field of the body that is to blame."""

    def __init__(self, status: int, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.param = status, message, param


def error_response(status: int, message: str, param: str | None = None) -> JSONResponse:
    """Return an error as vLLM would answer it. One with status 503 also says when to try again."""
    name = HTTPStatus(status).phrase.title().replace(" ", "")
    kind = "InternalServerError" if status == HTTPStatus.INTERNAL_SERVER_ERROR else f"{name}Error"
    headers = {"Retry-After": str(RETRY_AFTER_S)} if status == HTTPStatus.SERVICE_UNAVAILABLE else None
    content = {"error": {"message": message, "type": kind, "param": param, "code": status}}
    return JSONResponse(content, status_code=status, headers=headers)
