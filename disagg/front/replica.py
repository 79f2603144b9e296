"""Replica: what the router knows of one attention replica, and how loaded it takes it to be.

The router's book has every request that it has sent. So all of them count, whether the replica knows of them yet or
not. The replica reports what the book cannot know. Its reports come with beats, about a second old, and in no order
with its news about requests. They therefore hold only what an old report cannot make wrong:

- The tokens left of a prompt, by uid. They only fall, so the smallest number counts. A prompt that no report names
  counts in full.
- The pages of aborted requests that a transfer may still write. No request of the book owns them.
"""

from collections.abc import KeysView, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from disagg.control.messages import Hello, Load
from disagg.front.known import Known
from model.pages import PAGE
from parallel.interface import LOOPBACK


@dataclass(eq=False)
class Replica:
    """Ranks that serve together, the requests that the router has given them, and their latest report."""

    id: str
    hello: Hello
    load: Load | None = None  # as reported
    stats: dict[str, float] = field(default_factory=dict)  # as reported, every few seconds
    reported: float = 0.0  # time.monotonic() when `stats` came
    finished: bool = False  # was Finish sent, because its job drains?
    _pages: dict[int, int] = field(default_factory=dict)  # by uid: of KV that a request may fill in the end
    _left: dict[int, int] = field(default_factory=dict)  # by uid: tokens left of a prompt without a first token
    _prefixes: dict[int, Sequence[int]] = field(default_factory=dict)  # by uid: pages that it brings to the cache
    pages: int = 0  # the sum of `_pages`
    queued_tokens: int = 0  # the sum of `_left`

    def __str__(self) -> str:
        """Return its role, and the addresses of its machines if there may be several."""
        hosts = sorted({member.host for member in self.hello.members} - {LOOPBACK, "::1"})
        return f"{self.hello.role} replica" + (f" at {' and '.join(hosts)}" if hosts else "")

    @property
    def requests(self) -> KeysView[int]:
        """The uids of the requests that decode here."""
        return self._pages.keys()

    @property
    def prompts(self) -> KeysView[int]:
        """The uids of the prompts that are computed here, until the router has their first token."""
        return self._left.keys()

    @property
    def is_idle(self) -> bool:
        return not self._pages and not self._left

    @cached_property
    def kept(self) -> Known:
        """What its cache has."""
        return Known(self.capacity if self.hello.caches else 0)

    @property
    def capacity(self) -> int:
        """Pages of KV."""
        return max(1, self.hello.kv_tokens // PAGE)

    @property
    def kv_pages(self) -> int:
        """Pages of KV that are taken: promised to requests, or still held for aborted ones."""
        unwanted = self.load.unwanted_pages if self.load is not None else 0
        return self.pages + min(unwanted, self.capacity)

    @property
    def kv_share(self) -> float:
        return self.kv_pages / self.capacity

    def add_request(self, uid: int, pages: int, prefix: Sequence[int] = ()) -> None:
        """`prefix`: the digests of its first pages."""
        self._pages[uid] = pages
        self.pages += pages
        self._bring(uid, prefix)

    def end_request(self, uid: int) -> None:
        self.pages -= self._pages.pop(uid, 0)
        self._end(uid)

    def add_prompt(self, uid: int, tokens: int, prefix: Sequence[int] = ()) -> None:
        """`tokens`: to be computed. `prefix`: the digests of its first pages."""
        self._left[uid] = tokens
        self.queued_tokens += tokens
        self._bring(uid, prefix)

    def end_prompt(self, uid: int) -> None:
        self.queued_tokens -= self._left.pop(uid, 0)
        self._end(uid)

    def _bring(self, uid: int, prefix: Sequence[int]) -> None:
        if uid not in self._prefixes:  # a unified replica has it as a request and as a prompt
            self._prefixes[uid] = prefix
            self.kept.bring(prefix)

    def _end(self, uid: int) -> None:
        self.kept.brought(self._prefixes.pop(uid, ()))

    def tokens_left(self, uid: int) -> int | None:
        """Return how many tokens of a prompt are not computed, as far as reported. None if it is not here."""
        return self._left.get(uid)

    def hear(self, load: Load) -> None:
        """Take a report, however old it is."""
        self.load = load
        for uid, tokens in load.tokens_left.items():
            known = self._left.get(uid, 0)
            if tokens < known:
                self._left[uid] = tokens
                self.queued_tokens -= known - tokens
