"""Errors in OpenAI's shape: {"error": {"message", "type", "param", "code"}}."""

import re
from typing import Annotated

import msgspec
from msgspec import Meta
from starlette.requests import Request
from starlette.responses import Response

OTHER_KIND = "invalid_request_error"
KINDS = {  # status -> OpenAI's type; all others have OTHER_KIND
    401: "authentication_error",
    404: "not_found_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "service_unavailable_error",
    504: "timeout_error",
}


class Error(msgspec.Struct):
    message: str
    type: Annotated[str, Meta(extra_json_schema={"enum": sorted({*KINDS.values(), OTHER_KIND})})]
    param: str | None
    code: str | None


class ErrorBody(msgspec.Struct):
    error: Error


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
        kind = KINDS.get(self.status, OTHER_KIND)
        return msgspec.json.encode(ErrorBody(Error(_printable(str(self)), kind, self.param, self.code)))

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
