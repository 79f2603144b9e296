"""Errors in OpenAI's shape: {"error": {"message", "type", "param", "code"}}."""

import re

import msgspec
from starlette.requests import Request
from starlette.responses import Response

KINDS = {  # status -> OpenAI's type; any other status below 500 is an invalid_request_error
    401: "authentication_error",
    404: "not_found_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "service_unavailable_error",
    504: "timeout_error",
}


class HttpError(Exception):
    """An answer with an error. `param`: the field that is wrong. `code`: a word for programs."""

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.param, self.code, self.headers = status, param, code, headers or {}

    @property
    def body(self) -> bytes:
        kind = KINDS.get(self.status, "invalid_request_error")
        error = {"message": _printable(str(self)), "type": kind, "param": self.param, "code": self.code}
        return msgspec.json.encode({"error": error})

    def response(self) -> Response:
        return Response(self.body, self.status, self.headers, "application/json")


def refusal(error: ValueError, known: frozenset[str]) -> HttpError:
    """Return the answer to a request that breaks a rule. `known`: the names that may be its `param`."""
    name = re.match(r"(?:prompt \d+: )?([a-z_]+)", str(error))
    return HttpError(400, str(error), name[1] if name and name[1] in known else None)


async def answer_error(request: Request, error: Exception) -> Response:
    """Starlette's handler of HttpError."""
    assert isinstance(error, HttpError)
    return error.response()


async def answer_bug(request: Request, error: Exception) -> Response:
    """Starlette's handler of an exception that nobody expected. uvicorn also logs its traceback."""
    return HttpError(500, "the server failed; its log says why").response()


def _printable(text: str) -> str:
    """Replace halves of surrogate pairs, which UTF-8 cannot encode."""
    return text.encode(errors="replace").decode()
