"""Exchange: one HTTP request's prompts at the router, from their submission to the last answer."""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

from starlette.types import Receive

from disagg.front.answer import Answer
from disagg.front.chat_text import ChatText
from disagg.front.http.errors import HttpError
from disagg.front.http.limits import Timeouts
from disagg.front.parse import UserRequest
from disagg.front.router import Router
from disagg.front.tracked import Tracked

LATER = {"retry-after": "1"}


class Prompt:
    """The client of one prompt. It collects what the router shows until the request's task looks."""

    def __init__(self, index: int, user: UserRequest, text: str, hold: bool, heard: Callable[["Prompt"], None]) -> None:
        """`text`: the prompt's, for echo. `hold`: is only the whole answer news? `heard` is called at all news."""
        self.index, self.user, self.prompt_text, self._hold, self._heard = index, user, text, hold, heard
        self.begun = False  # is there a token?
        self._pieces, self._tokens, self._logprobs = list[str](), list[int](), list[list]()  # since the last `take`
        self.answer: Answer | None = None
        self.closed = False  # has the client got all it wants, or gone?
        self.tracked: Tracked
        self.chat: ChatText | None = None  # only for messages

    def show(self, piece: str, tokens: list[int], logprobs: list) -> None:
        self._pieces.append(piece)
        self._tokens += tokens
        self._logprobs += logprobs
        self.begun = True
        if not self._hold:
            self._heard(self)

    def deliver(self, answer: Answer) -> None:
        self.answer = answer
        self._heard(self)

    def take(self) -> tuple[str, list[int], list[list], Answer | None]:
        """Return the text, tokens and log probabilities since the last call, and the answer once it is there."""
        news = "".join(self._pieces), self._tokens, self._logprobs, self.answer
        self._pieces, self._tokens, self._logprobs = [], [], []
        return news


class Exchange:
    def __init__(
        self,
        router: Router,
        users: list[UserRequest],
        texts: list[str],
        hold: bool,
        timeouts: Timeouts,
        wake: Callable[[], None],
    ) -> None:
        """Submit the requests. `texts`: of their prompts. `hold`: as in `Prompt`. `wake`: starts the router's turn."""
        self._router, self._wake, self._loop = router, wake, asyncio.get_running_loop()
        self._fresh: dict[int, Prompt] = {}  # those with news, by index
        self._change = self._loop.create_future()  # what the task waits for
        self._late: HttpError | None = None
        self._left = len(users)  # prompts whose answer was not among the news yet
        limits = [(timeouts.total, False), (timeouts.first_token, True)]
        self._timers = [
            self._loop.call_later(seconds, self._end, seconds, to_first)
            for seconds, to_first in limits
            if seconds is not None
        ]
        self.prompts = [Prompt(i, user, texts[i], hold, self._hear) for i, user in enumerate(users)]
        for prompt in self.prompts:
            prompt.tracked = router.submit(prompt.user, prompt)
        wake()

    @property
    def finished(self) -> bool:
        return not self._left

    async def news(self) -> list[Prompt]:
        """Wait for news, and return the prompts that have some. Raises HttpError for a prompt without a good answer."""
        while not self._fresh:
            if self._late is not None:
                raise self._late
            self._change = self._loop.create_future()
            await self._change
        ready, self._fresh = list(self._fresh.values()), {}
        for prompt in ready:
            if prompt.answer is not None:
                if prompt.answer.error is not None:
                    raise failure(prompt.answer)
                self._left -= 1
        return ready

    async def answers(self) -> None:
        """Wait for all answers. Raises HttpError if one of them has none."""
        while not self.finished:
            await self.news()

    def _hear(self, prompt: Prompt) -> None:
        self._fresh[prompt.index] = prompt
        if not self._change.done():
            self._change.set_result(None)

    def _end(self, seconds: float, to_first: bool) -> None:
        """A time limit is over: in all, or to the first token."""
        if to_first and any(prompt.begun for prompt in self.prompts):
            return
        what = "to its first token" if to_first else "in all"
        self._late = HttpError(504, f"the request took over {seconds:g} s {what} (--request-timeout)")
        if not self._change.done():
            self._change.set_result(None)

    def close(self) -> None:
        """Cancel what has no answer yet."""
        for timer in self._timers:
            timer.cancel()
        for prompt in self.prompts:
            self._router.cancel(prompt.tracked)
            prompt.closed = True
        self._wake()


def failure(answer: Answer) -> HttpError:
    """Return the error of an answer: the request's own fault, or that of the deployment."""
    assert answer.error is not None
    return HttpError(400, answer.error) if answer.refused else HttpError(503, answer.error, headers=LATER)


async def while_connected(receive: Receive, work: Coroutine[Any, Any, None]) -> None:
    """Do `work` unless the client leaves meanwhile. Raises what `work` raises.

    The body must have been read: the next message of the connection then says that the client has gone.
    """
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(_disconnect(receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            task.result()
    finally:
        for one in (task, gone):
            one.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
