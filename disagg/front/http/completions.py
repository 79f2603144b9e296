"""The answers of /v1/completions: whole, and in pieces."""

from typing import Any

import msgspec

from disagg.front.answer import Answer
from disagg.front.http.exchange import Prompt
from disagg.front.http.fields import Asked
from disagg.front.http.token_text import TokenText


class PromptTokensDetails(msgspec.Struct):
    cached_tokens: int


class CompletionTokensDetails(msgspec.Struct):
    accepted_prediction_tokens: int
    rejected_prediction_tokens: int


class Usage(msgspec.Struct, omit_defaults=True):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    completion_tokens_details: CompletionTokensDetails | None = None  # with --speculate


class Logprobs(msgspec.Struct):
    """Parallel lists: an entry per token. None stands for the first token of an echoed prompt, which has none."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class OwnFields(msgspec.Struct, omit_defaults=True, kw_only=True):
    """The fields of a choice that OpenAI's API does not have, in the last piece of an answer: see `own_fields`."""

    experts: dict | None = None  # with return_experts
    prompt_token_ids: list[int] | None = None  # this and the next one with prompt_logprobs
    prompt_logprobs: list | None = None


class Choice(OwnFields, omit_defaults=True):
    index: int
    text: str
    finish_reason: str | None
    logprobs: Logprobs | None


class Completion(msgspec.Struct, omit_defaults=True):
    id: str
    object: str
    created: int
    model: str
    choices: list[Choice]
    usage: Usage | None = None


def usage(answers: list[Answer]) -> Usage:
    prompt = sum(answer.prompt_tokens for answer in answers)
    generated = sum(answer.completion_tokens for answer in answers)
    cached = sum(answer.cached_tokens for answer in answers)
    drafted = [answer for answer in answers if answer.accepted_tokens is not None]
    accepted = sum(answer.accepted_tokens or 0 for answer in drafted)
    rejected = max(0, sum(answer.verified_tokens or 0 for answer in drafted) - accepted)
    details = CompletionTokensDetails(accepted, rejected) if drafted else None
    return Usage(prompt, generated, prompt + generated, PromptTokensDetails(cached), details)


def own_fields(answer: Answer, asked: Asked) -> dict[str, Any]:
    """Return the values of `OwnFields`. An echo shows the prompt's log probabilities elsewhere."""
    names = ["experts"] if asked.echo else ["experts", "prompt_token_ids", "prompt_logprobs"]
    return {name: getattr(answer, name) for name in names}


class Completions:
    """Makes the answers to one request."""

    prefix = "cmpl-"

    def __init__(self, id: str, created: int, model: str, asked: Asked, words: TokenText) -> None:
        self._head, self._asked, self._words = (id, "text_completion", created, model), asked, words
        self._echoed: set[int] = set()  # prompts whose text is part of a piece
        self._offsets: dict[int, int] = {}  # prompt -> characters of its tokens so far, for text_offset

    def whole(self, prompts: list[Prompt]) -> Completion:
        choices = []
        for prompt in prompts:
            answer = prompt.answer
            assert answer is not None
            choices.append(self._choice(prompt, answer.text or "", answer.token_ids, answer.logprobs or [], answer))
        answers = [prompt.answer for prompt in prompts if prompt.answer is not None]
        return Completion(*self._head, choices, usage(answers))

    def pieces(self, prompt: Prompt) -> list[Completion]:
        """Return the events of a prompt's news."""
        return [Completion(*self._head, [self._choice(prompt, *prompt.take())])]

    def last(self, prompts: list[Prompt]) -> Completion:
        """Return the event with the usage."""
        answers = [prompt.answer for prompt in prompts if prompt.answer is not None]
        return Completion(*self._head, [], usage(answers))

    def _choice(self, prompt: Prompt, text: str, tokens: list[int], logprobs: list, answer: Answer | None) -> Choice:
        """`answer`: None as long as more comes."""
        asked, shown = self._asked, None
        begins = asked.echo and prompt.index not in self._echoed
        if begins:
            self._echoed.add(prompt.index)
        if asked.top_logprobs is not None:
            rows: list = list(zip(tokens, logprobs, strict=True))
            if begins:
                assert answer is not None and answer.prompt_logprobs is not None  # `Prompt.hold`: it is whole
                rows = list(zip(prompt.user.request.prompt, answer.prompt_logprobs, strict=True)) + rows
            shown = self._logprobs(prompt, rows, asked.top_logprobs)
        if begins:
            text = prompt.prompt_text + text
        if answer is None:
            return Choice(prompt.index, text, None, shown)
        return Choice(prompt.index, text, answer.finish_reason, shown, **own_fields(answer, asked))

    def _logprobs(self, prompt: Prompt, rows: list[tuple[int, Any]], top: int) -> Logprobs:
        """`rows`: each token with its pairs (token, log probability): the `top` likeliest, and the token itself.

        The first token of an echoed prompt has None. If it is a BOS that the tokenizer added, the text has no place
        for it.
        """
        made = Logprobs([], [], [], [])
        for token, pairs in rows:
            word = self._words.text(token)
            made.text_offset.append(self._offsets.get(prompt.index, 0))
            is_unseen = pairs is None and not prompt.prompt_text.startswith(word)
            self._offsets[prompt.index] = made.text_offset[-1] + (0 if is_unseen else len(word))
            made.tokens.append(word)
            own = dict(pairs)[token] if pairs is not None else None
            made.token_logprobs.append(own)
            made.top_logprobs.append(None if pairs is None else self._top(pairs[:top], token, own))
        return made

    def _top(self, pairs: list, token: int, own: float | None) -> dict[str, float]:
        """Return the likeliest tokens' words, best first. If two tokens have the same word, the likelier one stays."""
        found: dict[str, float] = {}
        for other, value in [*pairs, (token, own)]:
            found.setdefault(self._words.text(other), value)
        return found
