"""Exchange: one HTTP request's prompts at the router, from their submission to the last answer."""

import asyncio
import time
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

    def __init__(self, index: int, user: UserRequest, text: str, hold: bool, heard: Callable[[], None]) -> None:
        """`text`: the prompt's, for echo. `hold`: is only the whole answer news? `heard` is called at every change."""
        self.index, self.user, self.prompt_text, self._hold, self._heard = index, user, text, hold, heard
        self.begun = False  # is there a token?
        self.piece, self.tokens, self.logprobs = "", list[int](), list[list]()  # since the task's last look
        self.answer: Answer | None = None
        self.seen = False  # has the task taken the answer?
        self.closed = False  # has the client got all it wants, or gone?
        self.tracked: Tracked
        self.chat: ChatText | None = None  # only for messages

    def show(self, piece: str, tokens: list[int], logprobs: list) -> None:
        self.piece += piece
        self.tokens += tokens
        self.logprobs += logprobs
        self.begun = True
        self._heard()

    def deliver(self, answer: Answer) -> None:
        self.answer = answer
        self._heard()

    @property
    def has_news(self) -> bool:
        pending = not self._hold and (self.piece or self.tokens)
        return bool(pending) or (self.answer is not None and not self.seen)

    def take(self) -> tuple[str, list[int], list[list], Answer | None]:
        """Return the text, tokens and log probabilities since the last call, and the answer once it is there."""
        news = self.piece, self.tokens, self.logprobs, self.answer
        self.piece, self.tokens, self.logprobs, self.seen = "", [], [], self.answer is not None
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
        self._router, self._timeouts, self._wake = router, timeouts, wake
        self._began, self._heard = time.monotonic(), asyncio.Event()
        self.prompts = [Prompt(i, user, texts[i], hold, self._heard.set) for i, user in enumerate(users)]
        for prompt in self.prompts:
            prompt.tracked = router.submit(prompt.user, prompt)
        wake()

    @property
    def finished(self) -> bool:
        return all(prompt.seen for prompt in self.prompts)

    async def news(self) -> list[Prompt]:
        """Wait for news, and return the prompts that have some. Raises HttpError for a prompt without a good answer."""
        while not (ready := [prompt for prompt in self.prompts if prompt.has_news]):
            self._heard.clear()
            await self._wait()
        for prompt in ready:
            if prompt.answer is not None and prompt.answer.error is not None:
                raise failure(prompt.answer)
        return ready

    async def answers(self) -> list[Answer]:
        """Wait for all answers. Raises HttpError if one of them has none."""
        while not self.finished:
            for prompt in await self.news():
                prompt.take()
        return [prompt.answer for prompt in self.prompts if prompt.answer is not None]

    async def _wait(self) -> None:
        limits = [(self._timeouts.total, "in all")]
        if not any(prompt.begun for prompt in self.prompts):
            limits.append((self._timeouts.first_token, "to its first token"))
        seconds, what = min(((s, what) for s, what in limits if s is not None), default=(None, ""))
        try:
            left = None if seconds is None else max(0.0, self._began + seconds - time.monotonic())
            async with asyncio.timeout(left):
                await self._heard.wait()
        except TimeoutError:
            raise HttpError(504, f"the request took over {seconds:g} s {what} (--request-timeout)") from None

    def close(self) -> None:
        """Cancel what has no answer yet."""
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
