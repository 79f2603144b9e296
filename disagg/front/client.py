"""Client: the interface through which a router answers one request."""

from typing import Protocol

from disagg.front.answer import Answer


class Client(Protocol):
    """The one who waits for a request. Both methods are called from within the router's turn, and must return soon.

    A line of a batch and an HTTP request are clients. After `Router.cancel` neither method is called any more.
    """

    def show(self, piece: str, tokens: list[int], logprobs: list) -> None:
        """Take the next tokens, and the text that may be shown since the last call.

        `piece` may be empty, because a token can end within a character. `logprobs` has one list of (token, log
        probability) per token, or is empty if the request did not ask for them.
        """
        ...

    def deliver(self, answer: Answer) -> None:
        """Take the whole answer. It is the last call."""
        ...
