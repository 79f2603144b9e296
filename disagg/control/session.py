"""Session: messages between a router and a replica arrive once and in order, even if connections break.

Each end numbers its messages from 1 and keeps them until the other end acknowledges them. After a reconnect it resends
the unacknowledged ones. A session ends with the router, or when the router gives the replica up. Messages of an ended
session are dropped, so one router's tokens can never enter another router's answers.
"""

from collections import deque

import msgspec


class Header(msgspec.Struct, frozen=True, array_like=True):
    """Precedes every message. `number` is 0 for a message that may be lost, such as a Ping."""

    session: str
    number: int = 0
    heard: int = 0  # acknowledgement: the latest number that the sender has received


class Session:
    """One end of a session."""

    def __init__(self, id: str) -> None:
        self.id = id
        self._sent = self._heard = 0
        self._unheard: deque[tuple[int, bytes]] = deque()  # (number, body), not acknowledged yet

    def number(self, body: bytes) -> Header:
        """Keep a new message until it is acknowledged. Returns its header."""
        self._sent += 1
        self._unheard.append((self._sent, body))
        return Header(self.id, self._sent, self._heard)

    @property
    def unnumbered(self) -> Header:
        return Header(self.id, 0, self._heard)

    def hear(self, header: Header) -> bool:
        """Is this the next message? Otherwise it is a repetition, or an earlier message was lost and will be resent."""
        while self._unheard and self._unheard[0][0] <= header.heard:
            self._unheard.popleft()
        if header.number != self._heard + 1:
            return False
        self._heard = header.number
        return True

    def again(self) -> list[tuple[Header, bytes]]:
        """Return all unacknowledged messages, in order."""
        return [(Header(self.id, number, self._heard), body) for number, body in self._unheard]
