"""The paths of the HTTP door, and who may use them."""

import msgspec
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from disagg.front.http import fields
from disagg.front.http.chat import Chat
from disagg.front.http.completions import Completions
from disagg.front.http.errors import HttpError, answer_bug, answer_error
from disagg.front.http.generate import Service, endpoint
from disagg.front.http.information import Information
from disagg.front.http.metrics import render
from disagg.front.http.openapi import document

PROMETHEUS = "text/plain; version=0.0.4; charset=utf-8"
OPEN_PATHS = ("/", "/health")  # need no key; the page asks for it


class NeedsKey:
    """Lets only clients with a key in, except to OPEN_PATHS.

    It is pure ASGI, because Starlette's BaseHTTPMiddleware hides that a client has left.
    """

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app, self._keys = app, service.keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and self._keys and scope["path"] not in OPEN_PATHS:
            given = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
            if not self._keys.admit(given):
                what = "authorization must be 'Bearer KEY' with a key of this server"
                error = HttpError(401, what, code="invalid_api_key", headers={"www-authenticate": "Bearer"})
                await error.response()(scope, receive, send)
                return
        await self._app(scope, receive, send)


def make_app(service: Service) -> ASGIApp:
    about = Information(service)

    async def metrics(request: Request) -> Response:
        return Response(render(service.router), media_type=PROMETHEUS)

    async def openapi(request: Request) -> Response:
        described = document(service.served, service.names, bool(service.keys))
        return Response(msgspec.json.encode(described), media_type="application/json")

    routes = [
        Route("/v1/completions", endpoint(service, fields.completion, Completions), methods=["POST"]),
        Route("/v1/chat/completions", endpoint(service, fields.chat, Chat), methods=["POST"]),
        Route("/", about.page, methods=["GET"]),
        Route("/deployment", about.deployment, methods=["GET"]),
        Route("/v1/models", about.models, methods=["GET"]),
        Route("/v1/models/{name:path}", about.model, methods=["GET"]),
        Route("/tokenize", about.tokenize, methods=["POST"]),
        Route("/detokenize", about.detokenize, methods=["POST"]),
        Route("/health", about.health, methods=["GET"]),
        Route("/metrics", metrics, methods=["GET"]),
        Route("/openapi.json", openapi, methods=["GET"]),
    ]
    handlers = {HttpError: answer_error, HTTPException: answer_path, Exception: answer_bug}
    app = Starlette(routes=routes, exception_handlers=handlers)
    app.router.redirect_slashes = False
    return NeedsKey(app, service)


async def answer_path(request: Request, error: Exception) -> Response:
    """Answer a path or a method that does not exist."""
    assert isinstance(error, HTTPException)
    path = request.url.path
    message = f"{request.method} is not for {path:.60}" if error.status_code == 405 else f"there is no path {path:.60}"
    headers = dict(error.headers or {})
    return HttpError(error.status_code, message, headers=headers).response()
