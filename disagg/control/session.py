"""Session: what a router and a replica say to one another arrives once and in order, though connections break.

Each end numbers its messages from 1 and keeps them until the other says that it has heard them. After a reconnect it
says again what was not heard. A session ends with the router, or when the router has given a replica up: what comes of
an ended session is nobody's, so the tokens of one router's requests can never enter another's answers.
"""

from collections import deque

import msgspec


class Header(msgspec.Struct, frozen=True, array_like=True):
    """Before every message. `number` is 0 for those that need not arrive, as a Ping."""

    session: str
    number: int = 0
    heard: int = 0  # the latest number that the sender has heard


class Session:
    """One end's part of a session."""

    def __init__(self, id: str):
        self.id = id
        self._sent = self._heard = 0
        self._unheard: deque[tuple[int, bytes]] = deque()  # (number, body) that the other end may not have yet

    def number(self, body: bytes) -> Header:
        """The header for a new message."""
        self._sent += 1
        self._unheard.append((self._sent, body))
        return Header(self.id, self._sent, self._heard)

    @property
    def unnumbered(self) -> Header:
        return Header(self.id, 0, self._heard)

    def hear(self, header: Header) -> bool:
        """Is this the next message? If not, it was heard before, or one before it was lost and will be said again."""
        while self._unheard and self._unheard[0][0] <= header.heard:
            self._unheard.popleft()
        if header.number != self._heard + 1:
            return False
        self._heard = header.number
        return True

    def again(self) -> list[tuple[Header, bytes]]:
        """All that the other end may not have heard, in order."""
        return [(Header(self.id, number, self._heard), body) for number, body in self._unheard]
