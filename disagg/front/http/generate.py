"""A request on its way: its prompts go to the router, and its answer to the client, whole or streamed."""

import asyncio
import secrets
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.types import Receive, Scope, Send

from disagg.front.chat_text import ChatFormat, ChatText
from disagg.front.http import fields
from disagg.front.http.body import read_object
from disagg.front.http.chat import Chat
from disagg.front.http.completions import Completions
from disagg.front.http.deployment import Watched
from disagg.front.http.errors import HttpError, refusal
from disagg.front.http.exchange import LATER, Exchange, while_connected
from disagg.front.http.fields import Asked
from disagg.front.http.limits import Keys, Timeouts
from disagg.front.http.token_text import TokenText
from disagg.front.parse import Served, UserRequest, known_fields, parse_request
from disagg.front.router import MOST_WAITING, Router

DONE = b"data: [DONE]\n\n"
encode = msgspec.json.Encoder().encode
OWN_NAMES = frozenset({"n", "best_of", "stream", "stream_options", "echo", "top_logprobs", "tool_choice", "model"})


@dataclass
class Service:
    """What the paths share."""

    router: Router
    served: Served
    names: list[str]  # of the model; the first one is shown
    keys: Keys
    timeouts: Timeouts
    wake: Callable[[], None]  # starts the router's next turn
    encoder: ThreadPoolExecutor  # one thread: a long text, or a chat template, must not stop the loop
    words: TokenText
    chat_format: ChatFormat | None  # None: the model has no tokenizer, and so no chat
    watched: Watched = field(default_factory=Watched)

    def refuse_if_full(self, prompts: int) -> None:
        """Raise HttpError if so many more prompts cannot be served soon."""
        if missing := self.router.unavailable:
            raise HttpError(503, f"no request can be served: no {' and no '.join(missing)} replica", headers=LATER)
        if self.router.num_waiting + prompts > MOST_WAITING:
            waiting = f"{self.router.num_waiting} requests are waiting"
            raise HttpError(429, f"{waiting}; at most {MOST_WAITING} may wait", code="queue_full", headers=LATER)

    async def parse(self, lines: list[dict[str, Any]]) -> list[UserRequest]:
        """Parse each prompt's fields, in the encoder's thread. Raises HttpError."""
        try:
            return await asyncio.get_running_loop().run_in_executor(self.encoder, self._parse, lines)
        except ValueError as error:
            raise refuse(error) from None

    def _parse(self, lines: list[dict[str, Any]]) -> list[UserRequest]:
        users = []
        for i, line in enumerate(lines):
            try:
                user = parse_request(line, i, self.served)
                if "messages" in line and self.chat_format is not None:
                    user = msgspec.structs.replace(user, marks=self.chat_format.marks(line.get("tools")))
                users.append(user)
            except ValueError as error:
                raise ValueError(f"prompt {i}: {error}" if len(lines) > 1 else str(error)) from None
        return users


def refuse(error: ValueError) -> HttpError:
    return refusal(error, known_fields() | OWN_NAMES | fields.REFUSED.keys())


def endpoint(service: Service, read: Callable[[dict], Asked], form: type[Completions] | type[Chat]) -> Callable:
    """Return the endpoint of a path. `read` reads its body's fields, `form` makes its answers."""

    async def answer(request: Request) -> Reply:
        body = await read_object(request)
        fields.check_body_model(body, service.names)
        try:
            asked = read(body)
        except ValueError as error:
            raise refuse(error) from None
        service.refuse_if_full(len(asked.lines))
        users = await service.parse(asked.lines)
        service.refuse_if_full(len(users))  # others may have come meanwhile
        id = form.prefix + secrets.token_hex(12)
        maker = form(id, int(time.time()), service.names[0], asked, service.words)
        return Reply(service, users, asked, maker, request.headers.get("x-request-id", ""))

    return answer


class Reply:
    """The response to one request. It ends early, and cancels the request, if the client leaves."""

    def __init__(
        self, service: Service, users: list[UserRequest], asked: Asked, form: Completions | Chat, name: str
    ) -> None:
        """`name`: the client's own id of the request, which may be empty."""
        self._service, self._users, self._asked, self._form, self._name = service, users, asked, form, name

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        service, asked, words = self._service, self._asked, self._service.words
        texts = [""] * len(self._users)
        if asked.echo:
            lines = zip(asked.lines, self._users, strict=True)
            texts = [line.get("prompt") or words.decode(user.request.prompt) for line, user in lines]
        hold = not asked.stream or (asked.echo and asked.top_logprobs is not None)
        exchange = Exchange(service.router, self._users, texts, hold, service.timeouts, service.wake)
        for line, prompt in zip(asked.lines, exchange.prompts, strict=True):
            if "messages" in line and service.chat_format is not None:
                stream, tokens = prompt.tracked.stream, prompt.user.request.prompt
                prompt.chat = ChatText(service.chat_format, stream, tokens, line.get("tools"))
        service.watched.add(self._name, exchange.prompts[0])
        try:
            await while_connected(receive, (self._stream if asked.stream else self._whole)(exchange, send))
        finally:
            exchange.close()

    async def _whole(self, exchange: Exchange, send: Send) -> None:
        await exchange.answers()
        body = encode(self._form.whole(exchange.prompts))
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    async def _stream(self, exchange: Exchange, send: Send) -> None:
        """Send an event for all tokens that wait. The status follows the first news, so that it can be an error."""
        news = await exchange.news()
        headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        try:
            while news:
                events = b"".join([_event(event) for prompt in news for event in self._form.pieces(prompt)])
                await send({"type": "http.response.body", "body": events, "more_body": True})
                news = [] if exchange.finished else await exchange.news()
            last = _event(self._form.last(exchange.prompts)) if self._asked.include_usage else b""
        except HttpError as error:
            last = b"data: " + error.body + b"\n\n"
        await send({"type": "http.response.body", "body": last + DONE})


def _event(piece: msgspec.Struct) -> bytes:
    return b"data: " + encode(piece) + b"\n\n"
