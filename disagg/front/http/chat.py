"""The answers of /v1/chat/completions: whole, and in pieces."""

import msgspec
from msgspec import UNSET, UnsetType

from disagg.front.answer import Answer
from disagg.front.chat_text import whole_message
from disagg.front.http.completions import OwnFields, Usage, own_fields, usage
from disagg.front.http.exchange import Prompt
from disagg.front.http.fields import Asked
from disagg.front.http.token_text import TokenText


class Alternative(msgspec.Struct):
    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(msgspec.Struct):
    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: list[Alternative]


class Logprobs(msgspec.Struct):
    content: list[TokenLogprob]


class Delta(msgspec.Struct, omit_defaults=True):
    """What a piece adds to the message. `role`: only in the first one."""

    role: str | None = None
    content: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[dict] | None = None


class Message(msgspec.Struct):
    role: str
    content: str | None
    refusal: str | None = None
    reasoning_content: str | UnsetType = UNSET
    tool_calls: list[dict] | UnsetType = UNSET


class Choice(OwnFields, omit_defaults=True):
    index: int
    message: Message
    finish_reason: str | None
    logprobs: Logprobs | None


class Piece(OwnFields, omit_defaults=True):
    index: int
    delta: Delta
    finish_reason: str | None
    logprobs: Logprobs | None


class ChatCompletion(msgspec.Struct, omit_defaults=True):
    id: str
    object: str
    created: int
    model: str
    choices: list[Choice]
    usage: Usage | None = None


class ChatChunk(msgspec.Struct, omit_defaults=True):
    id: str
    object: str
    created: int
    model: str
    choices: list[Piece]
    usage: Usage | None = None


class Chat:
    """Makes the answers to one request."""

    prefix = "chatcmpl-"

    def __init__(self, id: str, created: int, model: str, asked: Asked, words: TokenText) -> None:
        self._id, self._rest, self._asked, self._words = id, (created, model), asked, words
        self._begun = False

    def whole(self, prompts: list[Prompt]) -> ChatCompletion:
        (prompt,) = prompts
        chat, answer = prompt.chat, prompt.answer
        assert chat is not None and answer is not None
        message = Message(**whole_message(chat.deltas()))
        logprobs = self._logprobs(answer.token_ids, answer.logprobs or [])
        reason, own = chat.finish_reason(answer.finish_reason), own_fields(answer, self._asked)
        choice = Choice(0, message, reason, logprobs, **own)
        return ChatCompletion(self._id, "chat.completion", *self._rest, [choice], usage([answer]))

    def pieces(self, prompt: Prompt) -> list[ChatChunk]:
        """Return the events of a prompt's news."""
        assert prompt.chat is not None
        _, tokens, logprobs, answer = prompt.take()
        deltas = [] if self._begun else [Delta("assistant", "")]
        self._begun = True
        deltas += [Delta(**delta) for delta in prompt.chat.deltas()]
        shown = self._logprobs(tokens, logprobs)
        if shown is not None and tokens and (not deltas or deltas[-1].role is not None):
            deltas.append(Delta(content=""))  # log probabilities of tokens that show no text yet
        events = [self._chunk(Piece(0, delta, None, None)) for delta in deltas]
        if shown is not None and tokens:
            events[-1].choices[0].logprobs = shown
        if answer is not None:
            reason, own = prompt.chat.finish_reason(answer.finish_reason), own_fields(answer, self._asked)
            events.append(self._chunk(Piece(0, Delta(), reason, None, **own)))
        return events

    def last(self, prompts: list[Prompt]) -> ChatChunk:
        """Return the event with the usage."""
        answers: list[Answer] = [prompt.answer for prompt in prompts if prompt.answer is not None]
        return ChatChunk(self._id, "chat.completion.chunk", *self._rest, [], usage(answers))

    def _chunk(self, piece: Piece) -> ChatChunk:
        return ChatChunk(self._id, "chat.completion.chunk", *self._rest, [piece])

    def _logprobs(self, tokens: list[int], logprobs: list) -> Logprobs | None:
        top, words = self._asked.top_logprobs, self._words
        if top is None:
            return None
        made = []
        for token, pairs in zip(tokens, logprobs, strict=True):
            others = [Alternative(words.text(one), value, list(words.bytes(one))) for one, value in pairs[:top]]
            made.append(TokenLogprob(words.text(token), dict(pairs)[token], list(words.bytes(token)), others))
        return Logprobs(made)
