"""The paths that generate nothing: the page, models, tokens, health, and the picture of the deployment."""

import asyncio
import time
from pathlib import Path
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from disagg.front.http.body import read_object
from disagg.front.http.deployment import picture
from disagg.front.http.errors import HttpError
from disagg.front.http.exchange import LATER
from disagg.front.http.fields import check_body_model, check_model
from disagg.front.http.generate import Service, refuse
from disagg.front.parse import parse_prompt
from disagg.front.tokenizer import NO_TOKENIZER

MOST_TOKENS = 2**20  # of /detokenize
PAGE = Path(__file__).with_name("page.html")
# The page loads nothing, and talks to this server alone.
FOR_THE_PAGE = {
    "content-security-policy": "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
}


class Model(msgspec.Struct):
    id: str
    object: str
    created: int
    owned_by: str
    max_model_len: int


class Models(msgspec.Struct):
    object: str
    data: list[Model]


class Tokens(msgspec.Struct):
    count: int
    max_model_len: int
    tokens: list[int]


class Text(msgspec.Struct):
    prompt: str


class Health(msgspec.Struct):
    status: str


class Information:
    def __init__(self, service: Service) -> None:
        self._service, self._since = service, int(time.time())

    async def models(self, request: Request) -> Response:
        return _json(Models("list", [self._model()]))

    async def model(self, request: Request) -> Response:
        check_model(request.path_params["name"], self._service.names)
        return _json(self._model())

    def _model(self) -> Model:
        return Model(self._service.names[0], "model", self._since, "moesaic", self._service.served.max_model_len)

    async def health(self, request: Request) -> Response:
        """200 only if a request could be served now."""
        if missing := self._service.router.fleet.missing_roles():
            raise HttpError(503, f"no {' and no '.join(missing)} replica", headers=LATER)
        return _json(Health("ok"))

    async def page(self, request: Request) -> Response:
        return Response(PAGE.read_bytes(), media_type="text/html", headers=FOR_THE_PAGE)

    async def deployment(self, request: Request) -> Response:
        """The replicas and their loads, and where the request is that the query names by its X-Request-Id."""
        service = self._service
        prompt = service.watched.get(request.query_params.get("request", ""))
        return _json(picture(service.router, service.names[0], prompt))

    async def tokenize(self, request: Request) -> Response:
        """The tokens of a prompt or of messages, as a request with them would have."""
        body = await read_object(request)
        check_body_model(body, self._service.names)
        add = body.get("add_special_tokens")
        if add is not None and type(add) is not bool:
            raise HttpError(400, f"add_special_tokens is {add!r:.60}; it must be true or false", "add_special_tokens")
        try:
            tokens = await self._in_thread(parse_prompt, body, self._service.served, add is not False)
        except ValueError as error:
            raise refuse(error) from None
        return _json(Tokens(len(tokens), self._service.served.max_model_len, tokens))

    async def detokenize(self, request: Request) -> Response:
        body = await read_object(request)
        check_body_model(body, self._service.names)
        tokens, size = body.get("tokens"), self._service.served.vocab_size
        if not isinstance(tokens, list) or len(tokens) > MOST_TOKENS:
            raise HttpError(400, f"tokens is {tokens!r:.60}; it must be a list of at most {MOST_TOKENS:,}", "tokens")
        if wrong := [token for token in tokens if type(token) is not int or not 0 <= token < size]:
            raise HttpError(400, f"tokens holds {wrong[0]!r:.60}; each must be an integer in 0..{size - 1}", "tokens")
        if self._service.served.encoder.tokenizer is None:
            raise HttpError(400, f"tokens: {NO_TOKENIZER}", "tokens")
        return _json(Text(await self._in_thread(self._service.words.decode, tokens)))

    async def _in_thread(self, call: Any, *args: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._service.encoder, call, *args)


def _json(value: Any) -> Response:
    return Response(msgspec.json.encode(value), media_type="application/json")
