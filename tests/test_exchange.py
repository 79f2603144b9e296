"""An exchange wakes its request's task for news alone, and leaves nothing behind."""

import asyncio
import gc
import weakref
from collections.abc import Coroutine
from typing import Any

import pytest

from disagg.front.answer import Answer
from disagg.front.http.errors import HttpError
from disagg.front.http.exchange import Exchange, Prompt
from disagg.front.http.limits import Timeouts
from disagg.front.parse import UserRequest
from disagg.request import Request

NO_LIMITS = Timeouts()
ANSWER = Answer("x", "ab", [1, 2], "length", 1, 2, 0.1, 0.2)


class Desk:
    """A router that takes every request and does nothing."""

    def __init__(self) -> None:
        self.cancelled = 0

    def submit(self, user: UserRequest, client: Prompt) -> None:
        pass

    def cancel(self, tracked: None) -> None:
        self.cancelled += 1


def exchange(count: int, hold: bool = False, timeouts: Timeouts = NO_LIMITS) -> Exchange:
    users = [UserRequest(i, Request(i, [5], 2), []) for i in range(count)]
    return Exchange(Desk(), users, [""] * count, hold, timeouts, lambda: None)


async def is_silent(news: Coroutine[Any, Any, list[Prompt]]) -> bool:
    """Does this wait for news still wait, after all tasks have run?"""
    task = asyncio.ensure_future(news)
    for _ in range(3):
        await asyncio.sleep(0)
    silent = not task.done()
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    return silent


def test_only_prompts_with_news_are_looked_at_and_each_token_is_news_once() -> None:
    async def main() -> None:
        one = exchange(3)
        assert await is_silent(one.news())
        one.prompts[2].show("a", [1], [])
        one.prompts[2].show("b", [2], [])
        (ready,) = await one.news()
        assert ready is one.prompts[2] and ready.take() == ("ab", [1, 2], [], None)
        assert await is_silent(one.news())
        for prompt in one.prompts:
            prompt.deliver(ANSWER)
        assert not one.finished and len(await one.news()) == 3 and one.finished

    asyncio.run(main())


def test_what_is_held_is_news_with_its_answer_alone() -> None:
    async def main() -> None:
        one = exchange(1, hold=True)
        one.prompts[0].show("a", [1], [])
        assert await is_silent(one.news())
        one.prompts[0].show("b", [2], [])
        one.prompts[0].deliver(ANSWER)
        (ready,) = await one.news()
        assert ready.take() == ("ab", [1, 2], [], ANSWER)

    asyncio.run(main())


def test_each_limit_ends_the_wait_unless_it_was_kept() -> None:
    async def main() -> None:
        with pytest.raises(HttpError, match="over 0.01 s to its first token"):
            await exchange(1, timeouts=Timeouts(30, 0.01)).news()
        begun = exchange(1, timeouts=Timeouts(0.05, 0.01))
        begun.prompts[0].show("a", [1], [])
        await begun.news()
        with pytest.raises(HttpError, match="over 0.05 s in all"):
            await begun.news()

    asyncio.run(main())


def test_a_closed_exchange_is_forgotten_before_its_limits_are_over() -> None:
    async def main() -> None:
        one = exchange(2, timeouts=Timeouts(1000, 500))
        one.close()
        assert one._router.cancelled == 2 and all(prompt.closed for prompt in one.prompts)
        left = weakref.ref(one)
        del one
        gc.collect()
        assert left() is None

    asyncio.run(main())
